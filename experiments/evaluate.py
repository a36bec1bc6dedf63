"""Evaluates a detector on a dataset in COCO format: prints the COCO metrics and the AP of each class.

    python experiments/evaluate.py --checkpoint runs/mine --annotations test.json --images test/ --output runs/mine/test

Writes `detections.json` (COCO results format, in pixels of the original images) and `metrics.json` to `--output`.
`--report` adds a page with curves, the cost of each kind of error, and the worst images. `--detections` evaluates an
existing results file, of any detector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from _shared import (
    COCO_LIMIT,
    DetectorOptions,
    Kind,
    Precision,
    SelectionOptions,
    check_ranges,
    console,
    evaluate_on,
    run,
    score_results,
)

from detectax_eqx import data, evaluate, report


@dataclass
class Options:
    """Options of an evaluation."""

    annotations: str
    """COCO JSON of the images: a path or a URL (http, https, gs, s3)."""
    images: str
    """Folder that file names in it refer to: a path or a URL."""
    output: Path
    """Folder for detections.json, metrics.json and report.html."""
    box_format: data.BoxFormat = "xywh"
    """Format of "bbox" in the annotations. xywh is COCO's; normalized: fractions of the image's sides."""
    allow_renamed: bool = False
    """Accept annotations with other names for the model's category ids, and show their names."""
    report: bool = False
    """Also write report.html, a self-contained page: curves, costs of errors, the worst images."""
    detections: Path | None = None
    """Evaluate this file in COCO's results format instead of a detector."""
    batch_size: int = 1
    """Images per batch, on each device."""
    precision: Precision = "float32"
    """Dtype of the network."""
    threads: int = 2
    """Decoding threads."""
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    kept: SelectionOptions = field(default_factory=lambda: SelectionOptions(max_detections=100))
    """The metrics count --max-detections per image, at least COCO's 100. With --detections: per image and class, more
    than 10."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "batch_size threads"}


def main(options: Options) -> None:
    """Evaluates and prints."""
    check_ranges(options)
    if options.detections is not None:
        check_no_detector(options)
    dataset = data.load_coco(options.annotations, options.images, box_format=options.box_format)
    console.print(f"{options.annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    if options.detections is not None:
        results = evaluate.read_results(options.detections)
        kinds, limit = kinds_of(results), options.kept.max_detections or COCO_LIMIT
        try:
            metrics = score_results(results, dataset, options.output, kinds=kinds, max_detections=limit)
        except ValueError as error:
            raise SystemExit(f"{options.detections}: {error}") from None
    else:
        predictor = options.detector.load(options.precision)
        selection = options.kept.of(predictor.model)
        metrics = evaluate_on(
            predictor,
            dataset,
            options.output,
            batch_size=options.batch_size,
            num_threads=options.threads,
            allow_renamed=options.allow_renamed,
            selection=selection,
            max_detections=selection.max_detections,
        )
        results = evaluate.read_results(options.output / "detections.json")
    for kind in metrics.values():
        print(evaluate.format_metrics(kind))
        print(evaluate.format_per_class(kind))
    if options.report and metrics.keys() == {"keypoints"}:
        console.print("no report.html: it analyses errors of boxes and masks, and these results have keypoints alone")
    elif options.report:
        report.write_report(options.output / "report.html", dataset, results, metrics)
        console.print(f"{options.output / 'report.html'} opens in any browser", highlight=False, soft_wrap=True)


def check_no_detector(options: Options) -> None:
    """Refuses what --detections has no use for, rather than ignoring it."""
    if options.detector.checkpoint is not None or options.detector.model is not None:
        raise SystemExit("Give either a detector, by --checkpoint or --model, or --detections.")
    plain = Options(annotations="", images="", output=options.output)
    plain.kept.max_detections = options.kept.max_detections
    groups = ((options.detector, plain.detector), (options.kept, plain.kept))
    given = [name for ours, default in groups for name, value in vars(ours).items() if value != vars(default)[name]]
    given += [n for n in ("batch_size", "precision", "allow_renamed") if getattr(options, n) != getattr(plain, n)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SystemExit(f"{names}: with --detections no detector is run, and this has no effect. Leave it out.")


def kinds_of(results: Sequence[dict[str, Any]]) -> tuple[Kind, ...]:
    """What can be evaluated: boxes, and masks or keypoints where all results have them; these alone without boxes."""
    fields: dict[Kind, str] = {"segm": "segmentation", "keypoints": "keypoints"}
    others: tuple[Kind, ...] = tuple(k for k, key in fields.items() if results and all(r.get(key) for r in results))
    return others if others and not any(result.get("bbox") for result in results) else ("bbox", *others)


if __name__ == "__main__":
    run(main, Options, __doc__)
