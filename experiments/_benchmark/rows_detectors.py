"""The rows of whole detectors: detection, exports, agreement, training and its memory, sizes, compiling, techniques.

A row's key says all of what is measured: the detector's name, images as in `2 × 320×480`, the precision.
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
COMPARED_STEPS = 4  # whose losses are averaged before they are compared
STEP, IMAGE, IMAGES, LARGE = "2 × 320×480", "1 × 800×1216", "8 × 800×1216", "4 × 800×1344"
FASTER, MASK, DEEP = "faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn", "faster_rcnn_resnet101_fpn"
DENSE = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")
SMALL, SMALL_STEP, SMALL_IMAGE = "faster_rcnn_resnet18_fpn", "2 × 160×256", "1 × 320×480"  # of a quick run
BATCHES = ("1 × 320×480", "2 × 320×480", "4 × 320×480", "8 × 320×480", "1 × 800×1344", "2 × 800×1344")
BESIDE = {"torchvision": "inference", "torchvision's export in onnxruntime": "onnx"}
# XLA's own options. One that a version does not know ends the process.
XLA_OPTIONS = {
    "cpu": ("enable_concurrency_optimized_scheduler=false", "enable_fast_math=true", "prefer_vector_width=512"),
    "gpu": ("triton_gemm_any=true", "enable_latency_hiding_scheduler=true"),
}


def parse(images: str) -> tuple[int, tuple[int, int]]:
    """Batch size, and height and width, of `2 × 320×480`."""
    batch, height, width = map(int, re.findall(r"\d+", images))
    return batch, (height, width)


def case(kind: str, model: str, images: str, precision: str, weights: str | None) -> tuple[str, Arrays, dict[str, Any]]:
    """A case of both sides, `inference`, `onnx` or `training`: its name, arrays and options."""
    (batch, size), options = parse(images), {"name": model, "precision": precision, "weights": weights}
    rng = np.random.default_rng(0)
    arrays = {"images": np.stack([inputs.photograph(rng, size) for _ in range(batch)])}
    if kind != "training":
        return kind, arrays, options
    # An update like any other, but the weights stay as decisive as they are.
    return kind, arrays | inputs.objects(batch, size), options | {"learning_rate": 1e-9}


def _infer(bench: Bench, model: str, images: str, precision: str) -> tuple:
    with bench.pair(fresh=bench.on_host and not bench.quick) as pair:
        _detect(bench, pair, model, images, precision)
        compared = bench.compare(pair, share=2)
    rates = (seconds and parse(images)[0] / seconds for seconds in (compared.ours, compared.theirs))
    return compared.ours, compared.theirs, *compared.cells, *rates


def _detect(bench: Bench, pair: Pair, model: str, images: str, precision: str) -> None:
    """Builds detection on both sides. Reduced precision is rounded differently and cannot be compared."""
    agree = compare_detections if precision == "float32" else lambda ours, theirs: None
    found = bench.prepare(pair, *case("inference", model, images, precision, bench.weights(model)), agree)
    if precision == "float32":
        bench.memo[model, images] = found


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
            # In bfloat16 torchvision rounds its anchors too, by pixels, and learns other boxes: its float32 judges.
            theirs.build(kind, arrays, **options | {"precision": "float32"})
        building = pool.submit(ours.build, kind, arrays, **options)  # while the other side takes its steps
        expected = [theirs.result() for _ in range(COMPARED_STEPS)] if theirs is not None else []
        if theirs is not None and precision != "float32":
            theirs.build(kind, arrays, **options)
            theirs.result()
        facts = building.result()
        losses = [ours.result() for _ in range(COMPARED_STEPS)]
        if expected:
            compare_losses(losses, expected, rtol=0.01 if precision == "float32" else 0.05)
        compared = bench.compare((ours, theirs), share=2)
        other = None if theirs is None else theirs.memory()
        if bench.quick:  # without the process that has only loaded the program
            bench.memo[model, images, precision] = facts, ours.memory()
    peak = _footprint(bench, model, images, precision, weights=options["weights"])[1]
    rate = parse(images)[0] / compared.ours
    epoch, ratio = COCO_TRAIN_IMAGES / rate / 3600, NO_PEER if other is None else other / peak
    return compared.ours, compared.theirs, *compared.cells, rate, epoch, peak, other, ratio


def _footprint(
    bench: Bench, model: str, images: str, precision: str = "float32", *, weights: str | None = None, measured=True
) -> tuple[dict[str, float], Any]:
    """The memory that a step's program says it needs, and the peak of a process that runs it, if that is `measured`."""
    if (model, images, precision) not in bench.memo:
        # A process that compiled keeps some of that memory; the next, which finds the program, is like any later.
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
    """In two fresh processes, the first without the program in its cache."""
    _, arrays, options = case(kind, model, images, "float32", None)
    compiled, whole, peaks, buckets = [], [], [], None
    # The run's own folder, which no earlier row has filled: later rows find these programs, unless they have another.
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
    """Ours alone, each technique on against off."""
    from detectax_eqx._xla import TRICKS  # only here: this process starts others, and needs no JAX itself

    table: Rows = {}

    def row(name: str, kind: str, model: str = FASTER, *, on=None, environment=None, both=None, options=None) -> None:
        """`on`: options of the case. `environment`: variables. `options`, `both`: options and variables of both."""
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
        # That scheduler runs all it can at once, and then keeps the values that checkpointing is to spare.
        name, both = f"gradient checkpointing, with `{variables[0][1]}`", dict(variables[:1])
        row(name, "training", on={"checkpoint": True}, both=both)
        variables.append(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"))
    for name, value in variables:
        row(f"`{name}={value}`", "training", environment={name: value})
    for trick in TRICKS:  # ways around the compiler, each turned off on its own
        name, off = f"`DETECTAX_PLAIN={trick}`", {"DETECTAX_PLAIN": trick}
        checkpoint = {"checkpoint": True} if trick == "rematerialisation" else {}
        row(name, "training", MASK, environment=off, options=checkpoint)
        if not checkpoint:
            row(name, "inference", MASK, environment=off)
    return table


def _try(bench: Bench, kind: str, model: str, images: str, on_options, environment, both, options) -> tuple:
    weights = bench.weights(model)  # that detect something, if an earlier table has left any
    weights = weights if weights and Path(weights).exists() else None
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
    """Images decoded and fed, beside torch's DataLoader: two workers, threads here and processes there."""
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
    for name in theirs:  # polygons cover parts of pixels here and whole ones there
        require_close({name: ours[name]}, {name: theirs[name]}, atol=0.02 if name == "area" else 1e-6)


def rows(bench: Bench, table: str) -> Rows:
    """The rows of a table, or the few of a quick run."""
    precisions = ("float32",) if bench.on_host else ("float32", "tf32", "bfloat16")
    detected = [*product((FASTER, MASK, DEEP, *DENSE), [IMAGE]), (FASTER, IMAGES), (MASK, IMAGES)]
    trained = [*product((FASTER, MASK, DEEP, "mask_rcnn_resnet101_fpn", *DENSE), [STEP])]
    trained += [] if bench.on_host else [(FASTER, LARGE), (MASK, LARGE)]
    compiled = [*product(["training"], (FASTER, MASK), [STEP]), *product(["inference"], (FASTER, MASK), [IMAGE])]
    sized = [(f"{kind}_rcnn_resnet{depth}_fpn",) for kind in ("faster", "mask") for depth in (18, 34, 50, 101)]
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
