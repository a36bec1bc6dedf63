"""The table of exported detectors in onnxruntime, beside torchvision and beside its own export."""

from functools import partial

from . import inputs
from .agreement import compare_detections
from .bench import Bench, Row, Table, number, ratio_cells
from .rows_detectors import QUICK_IMAGE, Work, detection_batch


BESIDE = {"torchvision": "inference", "torchvision's export in onnxruntime": "onnx"}


def table() -> Table:
    """Our ONNX file against each."""
    columns = ("ours s", "theirs s", "ratio", "spread")
    return Table("export", ("model", "images", "beside"), columns, _rows)


def _rows(bench: Bench) -> list[Row]:
    work = Work(*QUICK_IMAGE) if bench.quick else Work("faster_rcnn_resnet50_fpn", 1, inputs.IMAGE_SIZE)
    return [Row((work.model, work.images, name), partial(_run, bench, work, case)) for name, case in BESIDE.items()]


def _run(bench: Bench, work: Work, case: str) -> tuple[str, ...]:
    arrays = detection_batch(work)
    with bench.pair() as (ours, theirs):
        if theirs is not None:
            theirs.build(case, arrays, **work.options(bench))
        ours.build("onnx", arrays, **work.options(bench))
        found = ours.result()
        if theirs is not None:
            compare_detections(found, theirs.result())
        compared = bench.compare(ours, theirs, share=2)
    return number(compared.ours), number(compared.theirs), *ratio_cells(compared)
