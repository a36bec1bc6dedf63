"""What the toolkit set out to reach beside torchvision, on two CPU cores and a GPU, and whether the tables show it."""

import re
from dataclasses import dataclass
from pathlib import Path

from .tables import merge, read_table, runs_on


HEADER = ("work", "wanted", "measured", "met", "run")
FASTER, MASK = "faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn"
DENSE = {"RetinaNet": "retinanet_resnet50_fpn", "FCOS": "fcos_resnet50_fpn"}
STEP, IMAGE = "2 × 320×480", "1 × 800×1216"
LARGE_STEP, IMAGES = "4 × 800×1344", "8 × 800×1216"


@dataclass(frozen=True)
class Target:
    """A bound on a cell of a measured table: at least `least`, or at most `most`."""

    work: str
    table: str
    key: tuple[str, ...]
    column: str = "ratio"
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        unit = "×" if "ratio" in self.column else " s" if self.column.endswith(" s") else ""
        return f"≥ {self.least:g}{unit}" if self.least is not None else f"≤ {self.most:g}{unit}"

    def met(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0)


def _op(work: str, least: float, *key: str) -> Target:
    return Target(work, "ops", key or (work,), least=least)


CPU_TARGETS = (
    _op("nms, 1,000 boxes, spread", 7),
    _op("nms, 10,000 boxes, spread", 4.5),
    _op("class-aware nms, 1,000 proposals × 90 classes", 3),
    _op("multi-level RoIAlign, 1,000×256×7×7", 4),
    _op("multi-level RoIAlign, 512×256×7×7, forward + backward", 3),
    _op("mask paste, 100 onto 800×1216", 2),
    _op("mask paste, 100 onto 800×1216, ours in the memory of its last result", 2),
    _op("backbone + FPN, resnet50, 800×1216", 1.35),
    Target("whole inference, Faster R-CNN", "inference", (FASTER, IMAGE, "float32"), least=1.5),
    Target("whole inference, Mask R-CNN", "inference", (MASK, IMAGE, "float32"), least=1.5),
    Target("ONNX file in onnxruntime, Faster R-CNN", "export", (FASTER, IMAGE, "torchvision"), least=2),
    Target(
        "ONNX file beside torchvision's export, both in onnxruntime",
        "export",
        (FASTER, IMAGE, "torchvision's export in onnxruntime"),
        least=1,
    ),
    Target("training step, Faster R-CNN", "training", (FASTER, STEP, "float32"), least=1.5),
    Target("training step, Mask R-CNN", "training", (MASK, STEP, "float32"), least=1.5),
    Target("peak memory of that step, Faster R-CNN", "training", (FASTER, STEP, "float32"), "memory ratio", least=1),
    Target("peak memory of that step, Mask R-CNN", "training", (MASK, STEP, "float32"), "memory ratio", least=1),
    *(Target(f"whole inference, {name}", "inference", (DENSE[name], IMAGE, "float32"), least=1.5) for name in DENSE),
    *(Target(f"training step, {name}", "training", (DENSE[name], STEP, "float32"), least=1.5) for name in DENSE),
    *(
        Target(f"peak memory of that step, {name}", "training", (DENSE[name], STEP, "float32"), "memory ratio", least=1)
        for name in DENSE
    ),
    Target("data pipeline, boxes", "data", ("boxes",), least=1),
    Target("data pipeline, boxes and masks", "data", ("boxes and masks",), least=1),
    Target("compiling the step, Faster R-CNN, cold", "compile", ("training", FASTER), "cold s", most=60),
    Target("compiling the step, Mask R-CNN, cold", "compile", ("training", MASK), "cold s", most=60),
    Target("the same with the persistent cache, Faster R-CNN", "compile", ("training", FASTER), "cached s", most=10),
    Target("the same with the persistent cache, Mask R-CNN", "compile", ("training", MASK), "cached s", most=10),
    Target("programs an epoch", "compile", ("training", FASTER), "programs an epoch", most=3),
)


GPU_TARGETS = (
    *(_op(f"nms, {n} boxes, {where}", 1) for n in ("1,000", "10,000") for where in ("spread", "in clusters")),
    _op("multi-level RoIAlign, 1,000×256×7×7", 1),
    _op("multi-level RoIAlign, 512×256×7×7, forward + backward", 1),
    *(
        Target(f"whole inference, {name}, {images}, {precision}", "inference", (model, images, precision), least=least)
        for images, least in ((IMAGE, 2), (IMAGES, 1.3))
        for name, model in (("Faster R-CNN", FASTER), ("Mask R-CNN", MASK))
        for precision in ("float32", "tf32", "bfloat16")
    ),
    *(
        Target(f"training step, {name}, bfloat16 against AMP", "training", (model, LARGE_STEP, "bfloat16"), least=1.5)
        for name, model in (("Faster R-CNN", FASTER), ("Mask R-CNN", MASK))
    ),
)


def write_targets(file: Path, hardware: str, *, on_host: bool) -> None:
    """Fills a table of targets from the other tables' rows of some hardware; nothing is measured."""
    runs = runs_on(file, hardware)
    rows = []
    for target in CPU_TARGETS if on_host else GPU_TARGETS:
        header, table = read_table(file, target.table)
        for row in table:
            if row[-1] in runs and row[: len(target.key)] == target.key:
                cell = row[header.index(target.column)]
                value = figure(cell)
                if value is not None:
                    met = "yes" if target.met(value) else "no"
                    rows.append((target.work, target.wanted, cell, met, row[-1]))
    if rows:
        merge(file, "targets" if on_host else "targets-gpu", HEADER, rows, keys=[row[:1] for row in rows])


def figure(cell: str) -> float | None:
    """The number that a cell begins with."""
    found = re.match(r"[\d,]*\.?\d+", cell)
    return float(found[0].replace(",", "")) if found else None
