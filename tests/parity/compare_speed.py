"""Times this project's detectors beside another library's, in turn, for a page of docs/benchmarks.

    python -m tests.parity.compare_speed --python .venv/bin/python
    python -m tests.parity.compare_speed --python .venv/bin/python --only "vitdet.*inference"
    python -m tests.parity.compare_speed --python .venv/bin/python --library rf_detr

Run it where the library is installed, see detectron2_models.py and rf_detr_models.py. `--python` is the interpreter of
this project's side. The measurement is that of experiments/benchmark.py, whose parts it uses: two processes, A B A B …,
after a check that both detect the same or have the same losses on average.
"""
# pyright: reportMissingImports=false

import os
import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import tyro


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

from _benchmark.agreement import compare_detections, compare_losses
from _benchmark.bench import Worker, side_by_side
from _benchmark.pages import render
from _benchmark.rows_detectors import COMPARED_STEPS, case
from _benchmark.tables import TABLES, Measurements, Run, commit
from benchmark import rounded

from tests.test_detectron2_reference import num_classes


IMAGE, SQUARE, STEP = "1 × 800×1216", "1 × 1024×1024", "2 × 320×480"
KINDS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_mask_rcnn", "retinanet")
# The rows of each library's table, which has the library's name.
ROWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "detectron2": (
        *((f"{kind}_resnet50_fpn_detectron2", "inference", IMAGE) for kind in KINDS),
        ("mask_rcnn_swin_t_fpn", "inference", IMAGE),
        ("mask_rcnn_vitdet_b", "inference", SQUARE),
        ("mask_rcnn_resnet50_fpn_detectron2", "training", STEP),
        ("mask_rcnn_swin_t_fpn", "training", STEP),
        ("mask_rcnn_vitdet_b", "training", STEP),
    ),
    "rf_detr": (
        ("rf_detr_nano", "inference", "1 × 384×384"),
        ("rf_detr_medium", "inference", "1 × 576×576"),
        ("rf_detr_seg_nano", "inference", "1 × 312×312"),
        ("rf_detr_nano", "training", "4 × 384×384"),
    ),
}


@dataclass
class Options:
    """Options of the comparison."""

    python: Path = Path(sys.executable)
    """The interpreter of this project's side."""
    library: Literal["detectron2", "rf_detr"] = "detectron2"
    """The library on the other side."""
    only: str | None = None
    """A regular expression: measure only rows whose cells match; others are unchanged."""
    seconds: float = 20.0
    """Approximate seconds per row; at least three turns of each side."""


def measure(options: Options, name: str, kind: str, images: str, folder: Path) -> tuple[list[Any], Run]:
    """The measured cells of a row, and its run."""
    kind, arrays, settings = case(kind, name, images, "float32", str(folder / f"{name}.npz"))
    settings["num_classes"] = classes = 91 if options.library == "rf_detr" else num_classes(name)
    if kind == "inference":
        settings["threshold"] = 0.5  # of its masks
    if "labels" in arrays:
        arrays = {**arrays, "labels": arrays["labels"] % classes}
    with (
        Worker(sys.executable, f"tests.parity.{options.library}_cases") as theirs,
        Worker(options.python, "_cases.ours") as ours,
    ):
        theirs.build(kind, arrays, **settings)
        ours.build(kind, arrays, **settings)
        count = 1 if kind == "inference" else COMPARED_STEPS
        results = [[side.result() for _ in range(count)] for side in (ours, theirs)]
        if kind == "inference":
            compare_detections(results[0][0], results[1][0])
        else:
            compare_losses(*results, rtol=0.01)
        compared = side_by_side(ours, theirs, budget=options.seconds)
        their_peak, here, there = theirs.memory(), ours.about(), theirs.about()
    with Worker(options.python, "_cases.ours") as ours:  # the process that compiled keeps some of its memory
        ours.build(kind, arrays, **settings)
        ours.time()
        peak = ours.memory()
    run = Run(
        hardware=f"{here['count']} CPU cores ({here['kind']})",
        versions=", ".join(f"{name} {version}" for name, version in (here["versions"] | there["versions"]).items()),
        commit=commit(),
        date=date.today().isoformat(),
        command="`python -m tests.parity.compare_speed`",
    )
    return [compared.ours, compared.theirs, *compared.cells, peak, their_peak], run


def main(options: Options) -> None:
    """Measures the chosen rows, and writes each as soon as it is measured."""
    for variable, value in (("PYTHONPATH", str(ROOT)), ("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))):
        os.environ.setdefault(variable, value)
    table, rows = options.library, ROWS[options.library]
    columns = [*TABLES[table].keys, *TABLES[table].columns]
    with TemporaryDirectory() as folder:
        for key in rows:
            if options.only is None or re.search(options.only, " ".join(key)):
                cells, run = measure(options, *key, Path(folder))
                row = dict(zip(columns, map(rounded, (*key, *cells)), strict=True))
                print(row, flush=True)
                Measurements().add(table, row, run, keys=rows)
                render()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
