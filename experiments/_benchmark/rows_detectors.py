"""The tables of whole detection and of training."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from . import inputs
from .agreement import compare_detections, compare_losses
from .bench import Bench, Row, Table, number, ratio_cells
from .process import side_by_side


COCO_TRAIN_IMAGES = 118_287  # train2017
LEARNING_RATE = 1e-9  # an update like any other, but the weights stay as decisive as they are
OBJECTS = 7  # an image of COCO has 7.3


@dataclass(frozen=True)
class Work:
    """A detector on a batch of images."""

    model: str
    batch: int
    size: tuple[int, int]
    precision: str = "float32"

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, f"{self.batch} × {self.size[0]}×{self.size[1]}", self.precision


def inference_table() -> Table:
    """Detection, batch 1 and 8."""
    columns = ("ours s", "images/s", "torchvision s", "ratio", "spread")
    return Table("inference", ("model", "images", "precision"), columns, _inference_rows)


def training_table() -> Table:
    """Whole steps."""
    columns = (
        "ours s/step", "torchvision s/step", "ratio", "spread", "images/s", "hours an epoch of COCO, extrapolated",
        "ours peak MB", "torchvision peak MB",
    )  # fmt: skip
    return Table("training", ("model", "images", "precision"), columns, _training_rows)


def _inference_rows(bench: Bench) -> list[Row]:
    if bench.quick:
        works = [Work("faster_rcnn_resnet18_fpn", 1, (320, 480)), Work("mask_rcnn_resnet18_fpn", 1, (320, 480))]
    else:
        works = [
            Work("faster_rcnn_resnet50_fpn", 1, inputs.IMAGE_SIZE),
            Work("mask_rcnn_resnet50_fpn", 1, inputs.IMAGE_SIZE),
            Work("faster_rcnn_resnet101_fpn", 1, inputs.IMAGE_SIZE),
            Work("faster_rcnn_resnet50_fpn", 8, inputs.IMAGE_SIZE),
            Work("mask_rcnn_resnet50_fpn", 8, inputs.IMAGE_SIZE),
        ]
    return [Row(work.key, partial(_infer, bench, work)) for work in works]


def _infer(bench: Bench, work: Work) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    arrays = {"images": np.stack([inputs.photograph(rng, work.size) for _ in range(work.batch)])}
    options = {"name": work.model, "precision": work.precision, "weights": bench.weights(work.model)}
    with bench.pair() as (ours, theirs):
        if theirs is not None:
            theirs.build("inference", arrays, **options)
        ours.build("inference", arrays, **options)
        found = ours.result()
        if theirs is not None:
            compare_detections(found, theirs.result())
        compared = side_by_side(ours, theirs, budget=2 * bench.budget)
    return number(compared.ours), number(work.batch / compared.ours), number(compared.theirs), *ratio_cells(compared)


def _training_rows(bench: Bench) -> list[Row]:
    bodies, size = (("resnet18",), (160, 256)) if bench.quick else (("resnet50", "resnet101"), (320, 480))
    works = [Work(f"{kind}_rcnn_{body}_fpn", 2, size) for body in bodies for kind in ("faster", "mask")]
    return [Row(work.key, partial(_train, bench, work)) for work in works[: 1 if bench.quick else None]]


def training_batch(work: Work) -> dict[str, np.ndarray]:
    """Pictures with objects of elliptic masks."""
    rng = np.random.default_rng(0)
    boxes = [inputs.random_boxes(rng, OBJECTS, image_size=work.size, sides=(24, 250)) for _ in range(work.batch)]
    return {
        "images": np.stack([inputs.photograph(rng, work.size) for _ in range(work.batch)]),
        "boxes": np.stack(boxes),
        "labels": rng.integers(0, inputs.NUM_CLASSES, (work.batch, OBJECTS)).astype(np.int32),
        "mask_in_box": inputs.ellipse_in_box(112),
    }


def _train(bench: Bench, work: Work) -> tuple[str, ...]:
    arrays = training_batch(work)
    options = {"name": work.model, "precision": work.precision, "weights": bench.weights(work.model)}
    options["learning_rate"] = LEARNING_RATE
    with bench.pair() as (ours, theirs):
        if theirs is not None:
            theirs.build("training", arrays, **options)
        ours.build("training", arrays, **options)
        losses = ours.result()
        if theirs is not None:
            compare_losses(losses, theirs.result(), rtol=0.05)
        compared = side_by_side(ours, theirs, budget=2 * bench.budget)
        peaks = [None if worker is None else worker.memory() for worker in (ours, theirs)]
    rate = work.batch / compared.ours
    return (
        number(compared.ours), number(compared.theirs), *ratio_cells(compared), number(rate),
        number(COCO_TRAIN_IMAGES / rate / 3600, 0), *(number(peak, 0) for peak in peaks),
    )  # fmt: skip
