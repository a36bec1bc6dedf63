"""The tables of whole detectors: whether detections agree, detection, training, and the memory of a training step."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import inputs
from .agreement import Agreement, compare_detections, compare_losses
from .bench import NO_PEER, Bench, Row, Table, in_seconds, number, ratio_cells
from .process import Worker


COCO_TRAIN_IMAGES = 118_287  # train2017
OBJECTS = 7  # an image of COCO has 7.3
DENSE = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")
QUICK_STEP = ("faster_rcnn_resnet18_fpn", 2, (160, 256))
QUICK_IMAGE = ("faster_rcnn_resnet18_fpn", 1, (320, 480))
COMPARED_STEPS = 4  # whose losses are averaged before they are compared
LEARNING_RATE = 1e-9  # an update like any other, but the weights stay as decisive as they are


@dataclass(frozen=True)
class Work:
    """A detector on a batch of images."""

    model: str
    batch: int
    size: tuple[int, int]
    precision: str = "float32"

    @property
    def images(self) -> str:
        return f"{self.batch} × {self.size[0]}×{self.size[1]}"

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, self.images, self.precision

    def options(self, bench: Bench) -> dict[str, Any]:
        """The options of both sides' cases."""
        return {"name": self.model, "precision": self.precision, "weights": bench.weights(self.model)}


def inference_table() -> Table:
    """Detection, batch 1 and 8."""
    columns = ("ours s", "torchvision s", "ratio", "spread", "ours images/s", "torchvision images/s")
    return Table("inference", ("model", "images", "precision"), columns, _inference_rows)


def accuracy_table() -> Table:
    """Whether imported weights give torchvision's detections."""
    columns = ("detections", "same labels", "worst box difference, px", "worst score difference", "least mask IoU")
    return Table("accuracy", ("model", "images"), columns, _accuracy_rows)


def training_table() -> Table:
    """Whole steps."""
    columns = (
        "ours s/step", "torchvision s/step", "ratio", "spread", "images/s", "hours an epoch of COCO, extrapolated",
        "ours peak MB", "torchvision peak MB", "memory ratio",
    )  # fmt: skip
    return Table("training", ("model", "images", "precision"), columns, _training_rows)


def memory_table() -> Table:
    """What a training step needs, by its compiled program, and measured where that is quick."""
    columns = ("state and batch MB", "temporaries MB", "together MB", "measured peak MB")
    return Table("memory", ("model", "images"), columns, _memory_rows)


def _inference_works(bench: Bench) -> list[Work]:
    if bench.quick:
        return [Work(*QUICK_IMAGE)]
    faster, mask, deep = "faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn", "faster_rcnn_resnet101_fpn"
    single = [Work(model, 1, inputs.IMAGE_SIZE) for model in (faster, mask, deep, *DENSE)]
    return single + [Work(model, 8, inputs.IMAGE_SIZE) for model in (faster, mask)]


def _in_each_precision(bench: Bench, works: list[Work]) -> list[Work]:
    """An accelerator is measured in all that it has."""
    precisions = ("float32",) if bench.on_host else ("float32", "tf32", "bfloat16")
    return [Work(work.model, work.batch, work.size, precision) for work in works for precision in precisions]


def _inference_rows(bench: Bench) -> list[Row]:
    works = _in_each_precision(bench, _inference_works(bench))
    return [Row(work.key, partial(_infer, bench, work)) for work in works]


def _build_detection(bench: Bench, work: Work, ours: Worker, theirs: Worker | None) -> None:
    """Builds it on both sides, and lets them agree; reduced precision is rounded differently and cannot be compared."""
    arrays = detection_batch(work)
    if theirs is not None:
        theirs.build("inference", arrays, **work.options(bench))
    ours.build("inference", arrays, **work.options(bench))
    found = ours.result()
    if theirs is not None:
        expected = theirs.result()
        if work.precision == "float32":
            bench.memo["agreement", work] = compare_detections(found, expected)


def _infer(bench: Bench, work: Work) -> tuple[str, ...]:
    with bench.pair_for_results() as (ours, theirs):
        _build_detection(bench, work, ours, theirs)
        compared = bench.compare(ours, theirs, share=2)
    rates = [None if seconds is None else work.batch / seconds for seconds in (compared.ours, compared.theirs)]
    seconds = in_seconds(compared.ours), in_seconds(compared.theirs)
    return *seconds, *ratio_cells(compared), *(number(rate) for rate in rates)


def _accuracy_rows(bench: Bench) -> list[Row]:
    return [Row((work.model, work.images), partial(_agree, bench, work)) for work in _inference_works(bench)]


def _agree(bench: Bench, work: Work) -> tuple[str, ...]:
    if bench.peer_python is None:
        return NO_PEER, "", "", "", ""
    if ("agreement", work) not in bench.memo:
        with bench.pair_for_results() as (ours, theirs):
            _build_detection(bench, work, ours, theirs)
    agreed: Agreement = bench.memo["agreement", work]
    iou = "—" if agreed.mask_iou is None else f"{agreed.mask_iou:.4f}"
    return str(agreed.detections), "all", f"{agreed.box:.1e}", f"{agreed.score:.1e}", iou


def _training_rows(bench: Bench) -> list[Row]:
    if bench.quick:
        works = [Work(*QUICK_STEP)]
    else:
        kinds, bodies = ("faster", "mask"), ("resnet50", "resnet101")
        names = [f"{kind}_rcnn_{body}_fpn" for body in bodies for kind in kinds]
        works = [Work(name, 2, (320, 480)) for name in (*names, *DENSE)]
        if not bench.on_host:
            works += [Work(f"{kind}_rcnn_resnet50_fpn", 4, (800, 1344)) for kind in kinds]
    works = _in_each_precision(bench, works)
    return [Row(work.key, partial(_train, bench, work)) for work in works]


def detection_batch(work: Work) -> dict[str, np.ndarray]:
    """Pictures."""
    rng = np.random.default_rng(0)
    return {"images": np.stack([inputs.photograph(rng, work.size) for _ in range(work.batch)])}


def training_batch(work: Work) -> dict[str, np.ndarray]:
    """Pictures with objects of elliptic masks."""
    rng = np.random.default_rng(0)
    boxes = [inputs.random_boxes(rng, OBJECTS, image_size=work.size, sides=(24, 250)) for _ in range(work.batch)]
    return {
        **detection_batch(work),
        "boxes": np.stack(boxes),
        "labels": rng.integers(0, inputs.NUM_CLASSES, (work.batch, OBJECTS)).astype(np.int32),
        "mask_in_box": inputs.ellipse_in_box(112),
    }


def _train(bench: Bench, work: Work) -> tuple[str, ...]:
    arrays, options = training_batch(work), {**work.options(bench), "learning_rate": LEARNING_RATE}
    with bench.pair() as (ours, theirs), ThreadPoolExecutor(1) as pool:
        if theirs is not None:
            # In bfloat16 torchvision rounds its anchors too, by pixels, and learns other boxes: its float32 judges.
            theirs.build("training", arrays, **options | {"precision": "float32"})
        building = pool.submit(ours.build, "training", arrays, **options)  # while the other side takes its steps
        expected = []
        if theirs is not None:
            expected = [theirs.result() for _ in range(COMPARED_STEPS)]
            if work.precision != "float32":
                theirs.build("training", arrays, **options)
                theirs.result()
        facts = building.result()
        losses = [ours.result() for _ in range(COMPARED_STEPS)]
        if expected:
            compare_losses(losses, expected, rtol=0.01 if work.precision == "float32" else 0.05)
        compared = bench.compare(ours, theirs, share=2)
        other = None if theirs is None else theirs.memory()
        if bench.quick:  # without the process that has only loaded the program
            bench.memo["footprint", work] = facts, ours.memory()
    peak = _footprint(bench, work, options["weights"], measured=True)[1]
    assert peak is not None
    rate = work.batch / compared.ours
    hours = COCO_TRAIN_IMAGES / rate / 3600
    return (
        in_seconds(compared.ours), in_seconds(compared.theirs), *ratio_cells(compared), number(rate),
        number(hours, 0 if hours >= 10 else 2), number(peak, 0), number(other, 0),
        NO_PEER if other is None else f"{other / peak:.2f}×",
    )  # fmt: skip


def _footprint(
    bench: Bench, work: Work, weights: str | None, *, measured: bool
) -> tuple[dict[str, float], float | None]:
    """What a step's program says of its memory, and the peak of a process that runs it."""
    if ("footprint", work) not in bench.memo:
        # A process that compiled keeps some of what that took; the next, which finds the program, is like any later.
        with bench.ours() as ours:
            options = {"name": work.model, "precision": work.precision, "weights": weights}
            facts = ours.build("training", training_batch(work), **options, learning_rate=LEARNING_RATE)
            if measured:
                ours.time()
            bench.memo["footprint", work] = facts, ours.memory() if measured else None
    return bench.memo["footprint", work]


def _memory_rows(bench: Bench) -> list[Row]:
    if bench.quick:
        works = [Work(*QUICK_STEP)]
    else:
        batches = [(batch, (320, 480)) for batch in (1, 2, 4, 8)] + [(batch, (800, 1344)) for batch in (1, 2)]
        works = [Work(f"{kind}_rcnn_resnet50_fpn", *batch) for kind in ("faster", "mask") for batch in batches]
    return [Row((work.model, work.images), partial(_needs, bench, work)) for work in works]


def _needs(bench: Bench, work: Work) -> tuple[str, ...]:
    quick_to_run = work.batch * work.size[0] * work.size[1] <= 800 * 1344
    facts, peak = _footprint(bench, work, None, measured=quick_to_run)
    parts = ("arguments MB", "temp MB", "program MB")
    return *(number(facts.get(part), 0) for part in parts), number(peak, 0)
