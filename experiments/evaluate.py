"""Evaluates a detector on a dataset in COCO format: prints COCO's twelve numbers and the AP of each class.

    python experiments/evaluate.py --checkpoint runs/mine --annotations test.json --images test/ --output runs/mine/test

Writes `detections.json` (COCO results format, in the original images' pixels) and `metrics.json` to `--output`, and
with `--report` a page to look at: curves, what each kind of error costs, and the worst images. `--detections` does the
same for results that are there already, of any detector, without running one.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from _report.evaluation import write_report
from _shared import (
    ModelName,
    NormName,
    check_ranges,
    console,
    evaluate_on,
    load_detector,
    run,
    score_results,
    selection_of,
)

from detectax_eqx import data, evaluate


@dataclass
class Options:
    """Options of an evaluation."""

    annotations: str
    """COCO JSON of the images: a path, or a URL of http, https, gs or s3."""
    images: str
    """Folder that its file names refer to, or a URL."""
    output: Path
    """Folder for detections.json, metrics.json and report.html."""
    box_format: data.BoxFormat = "xywh"
    """How "bbox" is written in the annotations: xywh is COCO's; normalized means fractions of the image's sides."""
    allow_renamed: bool = False
    """Accept annotations that name the model's category ids otherwise. Their names are then the ones shown."""
    report: bool = False
    """Also write report.html, a page that needs nothing else: curves, costs of errors, the worst images."""
    detections: Path | None = None
    """Instead of --checkpoint: a file in COCO's results format, to evaluate without running a detector."""
    checkpoint: Path | None = None
    """Output folder of train.py (its best checkpoint is taken), or one of its checkpoints."""
    weights: Path | None = None
    """Instead of --checkpoint: a torchvision .pth or a .safetensors file of --model."""
    model: ModelName | None = None
    """Which detector --weights are for."""
    norm: NormName = "frozen_batch"
    """Norm of the backbone for --weights; torchvision's published COCO detectors want frozen_batch_eps0."""
    batch_size: int = 1
    """Images a step, on each device."""
    min_size: int | None = None
    """Short side in pixels that images are resized to; default the checkpoint's, or the detector's own."""
    max_size: int | None = None
    """Longest side in pixels after resizing; default the checkpoint's, or the detector's own."""
    score_threshold: float | None = None
    """Detections of a lower score (0..1) are dropped. Default: the detector's own, such as .05."""
    nms_threshold: float | None = None
    """IoU above which the lower of two detections of a class is dropped. Default: the detector's own, such as .5."""
    selection: dict[str, float] = field(default_factory=dict)
    """Other fields of the detector's selection, as NAME VALUE NAME VALUE: pre_nms_top_n 500, for instance."""
    max_detections: int = 100
    """Detections of the highest scores that are kept per image; as many, but at least COCO's 100, count for the
    numbers. With --detections, as many of each class count per image: more than 10."""
    threads: int = 2
    """Threads that decode images."""


RANGES = {"positive": "batch_size min_size max_size max_detections threads", "in 0..1": "score_threshold nms_threshold"}


def main(options: Options) -> None:
    """Evaluates and prints."""
    check_ranges(options, RANGES)
    if options.detections is not None:
        check_no_detector(options)
    dataset = data.load_coco(options.annotations, options.images, box_format=options.box_format)
    console.print(f"{options.annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    if options.detections is not None:
        results = evaluate.read_results(options.detections)
        kinds, limit = kinds_of(results), options.max_detections
        try:
            metrics = score_results(results, dataset, options.output, kinds=kinds, max_detections=limit)
        except ValueError as error:
            raise SystemExit(f"{options.detections}: {error}") from None
    else:
        detector = load_detector(
            options.model, options.norm, options.weights, options.checkpoint, options.min_size, options.max_size
        )
        selection = selection_of(
            detector.model,
            options.selection,
            score_threshold=options.score_threshold,
            nms_threshold=options.nms_threshold,
        )
        metrics = evaluate_on(
            detector,
            dataset,
            options.output,
            batch_size=options.batch_size,
            num_threads=options.threads,
            allow_renamed=options.allow_renamed,
            selection=selection,
            max_detections=options.max_detections,
        )
        results = evaluate.read_results(options.output / "detections.json")
    for kind in metrics.values():
        print(evaluate.format_metrics(kind))
        print(evaluate.format_per_class(kind))
    if options.report:
        write_report(options.output / "report.html", dataset, results, metrics)
        console.print(f"{options.output / 'report.html'} opens in any browser", highlight=False, soft_wrap=True)


# Options that say how to detect, beside the files that a detector is in.
OF_DETECTION = (
    "model",
    "norm",
    "batch_size",
    "min_size",
    "max_size",
    "score_threshold",
    "nms_threshold",
    "selection",
    "allow_renamed",
)


def check_no_detector(options: Options) -> None:
    """Refuses what --detections has no use for, rather than ignoring it."""
    if options.checkpoint is not None or options.weights is not None:
        raise SystemExit("Give either a detector, by --checkpoint or --weights, or --detections.")
    defaults = {one.name: {} if one.default is MISSING else one.default for one in fields(Options)}
    given = [name for name in OF_DETECTION if getattr(options, name) != defaults[name]]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SystemExit(f"{names}: with --detections no detector is run, and this has no effect. Leave it out.")


def kinds_of(results: Sequence[dict[str, Any]]) -> tuple[Literal["bbox", "segm"], ...]:
    """What can be evaluated: boxes, and masks where all results have one; masks alone where none has a box."""
    masks = bool(results) and all(result.get("segmentation") for result in results)
    if masks and not any(result.get("bbox") for result in results):
        return ("segm",)
    return ("bbox", "segm") if masks else ("bbox",)


if __name__ == "__main__":
    run(main, Options, __doc__)
