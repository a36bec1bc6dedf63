"""The table of the data pipeline."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from . import inputs
from .agreement import Disagreement
from .bench import Bench, Row, Table, number, ratio_cells
from .process import side_by_side


BATCH_SIZE = 2
WORKERS = 2  # threads here, processes there


def table() -> Table:
    """Images decoded and fed, beside torch's DataLoader."""
    columns = ("ours images/s", "torch images/s", "ratio", "spread")
    return Table("data", ("targets", "images"), columns, _rows)


def _rows(bench: Bench) -> list[Row]:
    count = 16 if bench.quick else 96
    described = f"{count} JPEGs 640×480 and 480×640, {BATCH_SIZE} a batch, {WORKERS} workers"
    kinds = (("boxes", False), ("boxes and masks", True))
    return [Row((name, described), partial(_measure, bench, masks, count)) for name, masks in kinds]


def _measure(bench: Bench, masks: bool, count: int) -> tuple[str, ...]:
    with TemporaryDirectory() as folder, bench.pair() as (ours, theirs):
        inputs.write_coco_folder(Path(folder) / "coco", images=count)
        options = {"folder": f"{folder}/coco", "masks": masks, "batch_size": BATCH_SIZE, "workers": WORKERS}
        ours.build("feed", **options)
        sums = ours.result()
        if theirs is not None:
            theirs.build("feed", **options)
            expected = theirs.result()
            for name in sums:
                # Polygons cover parts of pixels here and whole ones there.
                tolerance = 0.02 if name == "area" else 1e-6
                if (abs(sums[name] - expected[name]) > tolerance * abs(expected[name])).any():
                    raise Disagreement(f"{name} add up to {sums[name]}, torch's to {expected[name]}")
        compared = side_by_side(ours, theirs, budget=bench.budget)
    rates = (number(None if seconds is None else count / seconds, 1) for seconds in (compared.ours, compared.theirs))
    return *rates, *ratio_cells(compared)
