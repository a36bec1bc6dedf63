"""The rows of whole detectors: inference, exports, accuracy, training and memory, sizes, compile times, techniques.

The key of a row describes the measurement in full: the detector, the images as in `2 × 320×480`, the precision.
"""

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import inputs
from .agreement import Disagreement, compare_detections, compare_losses, require_close
from .bench import NO_PEER, Bench, Pair, Rows, WorkerError
from .worker import Arrays


COCO_TRAIN_IMAGES = 118_287  # train2017
COMPARED_STEPS = 4  # losses are averaged over these before they are compared
STEP, IMAGE, IMAGES, LARGE = "2 × 320×480", "1 × 800×1216", "8 × 800×1216", "4 × 800×1344"
FASTER, MASK, DEEP = "faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn", "faster_rcnn_resnet101_fpn"
DENSE = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")
MOBILE, KEYPOINT = "faster_rcnn_mobilenet_v3_large_320_fpn", "keypoint_rcnn_resnet50_fpn"
SWIN = "mask_rcnn_swin_t_fpn"
SQUARE = (("ssd300_vgg16", "300×300"), ("ssdlite320_mobilenet_v3_large", "320×320"))
SMALL, SMALL_STEP, SMALL_IMAGE = "faster_rcnn_resnet18_fpn", "2 × 160×256", "1 × 320×480"  # in a quick run
BATCHES = ("1 × 320×480", "2 × 320×480", "4 × 320×480", "8 × 320×480", "1 × 800×1344", "2 × 800×1344")
BESIDE = {"torchvision": "inference", "torchvision's export in onnxruntime": "onnx"}
# XLA's own options. A process ends if its XLA version does not know the option.
XLA_OPTIONS = {
    "cpu": ("enable_concurrency_optimized_scheduler=false", "enable_fast_math=true", "prefer_vector_width=512"),
    "gpu": ("triton_gemm_any=true", "enable_latency_hiding_scheduler=true"),
}


def parse(images: str) -> tuple[int, tuple[int, int]]:
    """Parses `2 × 320×480` to the batch size, and height and width."""
    batch, height, width = map(int, re.findall(r"\d+", images))
    return batch, (height, width)


def case(kind: str, model: str, images: str, precision: str, weights: str | None) -> tuple[str, Arrays, dict[str, Any]]:
    """Returns name, arrays and options of a case of both sides: `inference`, `onnx` or `training`."""
    (batch, size), options = parse(images), {"name": model, "precision": precision, "weights": weights}
    rng = np.random.default_rng(0)
    arrays = {"images": np.stack([inputs.photograph(rng, size) for _ in range(batch)])}
    if kind != "training":
        return kind, arrays, options
    # The update costs the same at any learning rate; a tiny one keeps the confident initial weights.
    return kind, arrays | inputs.objects(batch, size), options | {"learning_rate": 1e-9}


def _infer(bench: Bench, model: str, images: str, precision: str) -> tuple:
    with bench.pair(fresh=bench.on_host and not bench.quick) as pair:
        _detect(bench, pair, model, images, precision)
        compared = bench.compare(pair, share=2)
    rates = (seconds and parse(images)[0] / seconds for seconds in (compared.ours, compared.theirs))
    return compared.ours, compared.theirs, *compared.cells, *rates


def _detect(bench: Bench, pair: Pair, model: str, images: str, precision: str) -> None:
    """Builds detection on both sides. Reduced precision rounds differently, so results are not compared."""
    agree = compare_detections if precision == "float32" else lambda ours, theirs: None
    agreement = bench.prepare(pair, *case("inference", model, images, precision, bench.weights(model)), agree)
    if precision == "float32":
        bench.memo[model, images] = agreement


def _accuracy(bench: Bench, model: str, images: str) -> tuple:
    if bench.peer_python is None:
        return NO_PEER, None, None, None, None
    if (model, images) not in bench.memo:
        with bench.pair(fresh=bench.on_host and not bench.quick) as pair:
            _detect(bench, pair, model, images, "float32")
    agreed = bench.memo[model, images]
    return agreed.detections, "all", agreed.box, agreed.score, agreed.mask_iou


def _export(bench: Bench, model: str, images: str, beside: str) -> tuple:
    with bench.pair(fresh=True) as pair:
        built = case("onnx", model, images, "float32", bench.weights(model))
        bench.prepare(pair, *built, compare_detections, their_case=BESIDE[beside])
        compared = bench.compare(pair, share=2)
    return compared.ours, compared.theirs, *compared.cells


def _train(bench: Bench, model: str, images: str, precision: str) -> tuple:
    kind, arrays, options = case("training", model, images, precision, bench.weights(model))
    with bench.pair(fresh=True) as (ours, theirs), ThreadPoolExecutor(1) as pool:
        if theirs is not None:
            # In bfloat16, torchvision also rounds anchors, by pixels; so its float32 losses are the reference.
            theirs.build(kind, arrays, **options | {"precision": "float32"})
        building = pool.submit(ours.build, kind, arrays, **options)  # while the other side runs its steps
        expected = [theirs.result() for _ in range(COMPARED_STEPS)] if theirs is not None else []
        if theirs is not None and precision != "float32":
            theirs.build(kind, arrays, **options)
            theirs.result()
        facts = building.result()
        losses = [ours.result() for _ in range(COMPARED_STEPS)]
        if expected:
            compare_losses(losses, expected, rtol=0.01 if precision == "float32" else 0.05)
        compared = bench.compare((ours, theirs), share=2)
        their_peak = None if theirs is None else theirs.memory()
        if bench.quick:  # skips the separate process that loads the program from the cache
            bench.memo[model, images, precision] = facts, ours.memory()
    peak = _footprint(bench, model, images, precision, weights=options["weights"])[1]
    rate = parse(images)[0] / compared.ours
    epoch, ratio = COCO_TRAIN_IMAGES / rate / 3600, NO_PEER if their_peak is None else their_peak / peak
    return compared.ours, compared.theirs, *compared.cells, rate, epoch, peak, their_peak, ratio


def _footprint(
    bench: Bench, model: str, images: str, precision: str = "float32", *, weights: str | None = None, measured=True
) -> tuple[dict[str, float], Any]:
    """Returns the memory analysis of a step's program and, if `measured`, the peak of a process that runs it."""
    if (model, images, precision) not in bench.memo:
        # A process that compiled keeps some memory; a later one, which loads the cached program, is typical.
        with bench.ours() as ours:
            kind, arrays, options = case("training", model, images, precision, weights)
            facts = ours.build(kind, arrays, **options)
            if measured:
                ours.time()
            bench.memo[model, images, precision] = facts, ours.memory() if measured else None
    return bench.memo[model, images, precision]


def _memory(bench: Bench, model: str, images: str) -> tuple:
    batch, (height, width) = parse(images)
    facts, peak = _footprint(bench, model, images, measured=batch * height * width <= 800 * 1344)
    return *(facts.get(part) for part in ("arguments MB", "temp MB", "program MB")), peak


def _size(bench: Bench, model: str) -> tuple:
    with bench.pair(fresh=False) as pair:
        ours, theirs = (None if w is None else int(w.build("size", name=model)["parameters"]) for w in pair)
    assert ours is not None
    if theirs is not None and theirs != ours:
        raise Disagreement(f"{ours:,} parameters, torchvision's {theirs:,}")
    return ours, ours * 4e-6, ours * 2e-6, theirs


def _compile(bench: Bench, kind: str, model: str, images: str) -> tuple:
    """Measures in two fresh processes, with an empty and then a filled cache."""
    _, arrays, options = case(kind, model, images, "float32", None)
    compiled, whole, peaks, buckets = [], [], [], None
    # This run's own folder, still empty here. Later rows reuse its programs unless they set another folder.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(bench.folder / "programs")}
    for _ in ("cold", "cached"):
        began = time.perf_counter()
        with bench.ours(cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}) as ours:
            facts = ours.build(kind, arrays, **options)
            ours.time()
            whole.append(time.perf_counter() - began)
            compiled.append(facts["compile s"])
            peaks.append(facts["building MB"])
            if kind == "training":
                sizes = np.array(inputs.coco_sizes(np.random.default_rng(0), 5000))
                buckets = ours.build("buckets", {"sizes": sizes})["buckets"]
    return *compiled, *whole, peaks[0], buckets


def techniques(bench: Bench) -> Rows:
    """Returns the rows that compare each technique on and off, for this project only."""
    from detectax_eqx._xla import TRICKS  # imported here only: this process itself needs no JAX

    table: Rows = {}

    def row(name: str, kind: str, model: str = FASTER, *, on=None, environment=None, both=None, options=None) -> None:
        """`on`, `environment`: options and variables of the `on` side. `options`, `both`: those of both sides."""
        images = {"training": STEP, "inference": SMALL_IMAGE if bench.quick else IMAGE}[kind]
        measure = partial(_try, bench, kind, model, images, on or {}, environment or {}, both or {}, options or {})
        table[name, f"{kind}, {model}, {images}"] = measure

    if bench.quick:
        row("bfloat16", "inference", SMALL, on={"precision": "bfloat16"})
        return table
    for precision, kind in product(("bfloat16",) if bench.on_host else ("bfloat16", "tf32"), ("inference", "training")):
        row(precision, kind, on={"precision": precision})
    row("gradient checkpointing", "training", on={"checkpoint": True})
    platform = "cpu" if bench.on_host else "gpu"
    variables = [("XLA_FLAGS", f"--xla_{platform}_{option}") for option in XLA_OPTIONS[platform]]
    if bench.on_host:
        # The concurrency-optimised scheduler keeps alive the values that checkpointing recomputes.
        name, both = f"gradient checkpointing, with `{variables[0][1]}`", dict(variables[:1])
        row(name, "training", on={"checkpoint": True}, both=both)
        variables.append(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"))
    for name, value in variables:
        row(f"`{name}={value}`", "training", environment={name: value})
    for trick in TRICKS:  # compiler workarounds, each turned off alone
        model = {"depthwise": MOBILE, "by_example": SWIN}.get(trick, MASK)
        name, off = f"`DETECTAX_PLAIN={trick}`", {"DETECTAX_PLAIN": trick}
        checkpoint = {"checkpoint": True} if trick == "rematerialisation" else {}
        row(name, "training", model, environment=off, options=checkpoint)
        if not checkpoint:
            row(name, "inference", model, environment=off)
    return table


def _decisive_weights(bench: Bench, model: str) -> str | None:
    """Returns the file of weights that detect objects, written by torchvision's side; `None` without it."""
    file = bench.weights(model)
    if file is not None and not Path(file).exists():
        with bench.pair(fresh=True) as (_, theirs):
            assert theirs is not None
            name, arrays, options = case("inference", model, SMALL_IMAGE, "float32", file)
            theirs.build(name, arrays, **options)
    return file


def _try(bench: Bench, kind: str, model: str, images: str, on_options, environment, both, options) -> tuple:
    weights = None if model == SWIN else _decisive_weights(bench, model)  # torchvision has none
    _, arrays, case_options = case(kind, model, images, "float32", weights)
    with bench.ours(both) as off, bench.ours(both | environment) as on:
        try:
            on.about()
        except WorkerError:
            return None, None, "refused by this version", None, None, None
        sides = ((off, case_options | options), (on, case_options | options | on_options))
        facts = [worker.build(kind, arrays, **chosen) for worker, chosen in sides]
        for worker, _ in sides:
            worker.time()
        compared = bench.compare((on, off))
    return compared.theirs, compared.ours, *compared.cells, *(fact.get("temp MB") for fact in facts)


def data(bench: Bench) -> Rows:
    """Returns the rows of data loading beside torch's DataLoader: two threads here, two processes there."""
    count = 16 if bench.quick else 96
    images = f"{count} JPEGs 640×480 and 480×640, 2 per batch, 2 workers"
    return {(name, images): partial(_feed, bench, count, "masks" in name) for name in ("boxes", "boxes and masks")}


def _feed(bench: Bench, count: int, masks: bool) -> tuple:
    folder = bench.folder / "coco"
    if not folder.exists():
        inputs.write_coco_folder(folder, images=count)
    options = {"folder": str(folder), "masks": masks, "batch_size": 2, "workers": 2}
    with bench.pair(fresh=False) as pair:
        bench.prepare(pair, "feed", None, options, _same_sums)
        compared = bench.compare(pair)
    return *(seconds and count / seconds for seconds in (compared.ours, compared.theirs)), *compared.cells


def _same_sums(ours: Arrays, theirs: Arrays) -> None:
    for name in theirs:  # polygon masks are fractional here and binary there
        require_close({name: ours[name]}, {name: theirs[name]}, atol=0.02 if name == "area" else 1e-6)


def rows(bench: Bench, table: str) -> Rows:
    """Returns the rows of a table, or a few of them in a quick run."""
    precisions = ("float32",) if bench.on_host else ("float32", "tf32", "bfloat16")
    detected = [*product((FASTER, MASK, DEEP, *DENSE), [IMAGE]), (FASTER, IMAGES), (MASK, IMAGES)]
    detected += [("faster_rcnn_resnet50_fpn_v2", IMAGE), (KEYPOINT, IMAGE), (MOBILE, SMALL_IMAGE)]
    detected += [(name, f"1 × {side}") for name, side in SQUARE]
    trained = [*product((FASTER, MASK, DEEP, "mask_rcnn_resnet101_fpn", *DENSE, MOBILE), [STEP])]
    trained += [(name, f"2 × {side}") for name, side in SQUARE]
    trained += [] if bench.on_host else [(FASTER, LARGE), (MASK, LARGE)]
    compiled = [*product(["training"], (FASTER, MASK), [STEP]), *product(["inference"], (FASTER, MASK), [IMAGE])]
    sized = [(f"{kind}_rcnn_resnet{depth}_fpn",) for kind in ("faster", "mask") for depth in (18, 34, 50, 101)]
    sized += [(name,) for name in (KEYPOINT, MOBILE, *(name for name, _ in SQUARE))]
    one_image, one_step = (SMALL, SMALL_IMAGE), (SMALL, SMALL_STEP)
    tables: dict[str, tuple[Callable[..., tuple], Iterable[tuple], list[tuple]]] = {
        "size": (_size, sized, [(SMALL,), ("mask_rcnn_resnet18_fpn",)]),
        "compile": (_compile, compiled, [("training", *one_step)]),
        "inference": (_infer, [(*key, p) for key in detected for p in precisions], [(*one_image, "float32")]),
        "export": (_export, [(FASTER, IMAGE, beside) for beside in BESIDE], [(*one_image, b) for b in BESIDE]),
        "accuracy": (_accuracy, detected, [one_image]),
        "training": (_train, [(*key, p) for key in trained for p in precisions], [(*one_step, "float32")]),
        "memory": (_memory, product((FASTER, MASK), BATCHES), [one_step]),
    }
    measure, keys, quick = tables[table]
    return {key: partial(measure, bench, *key) for key in (quick if bench.quick else keys)}
