"""Evaluates a detector on a dataset in COCO format: prints COCO's twelve numbers and the AP of each class.

    python experiments/evaluate.py --checkpoint runs/mine --annotations test.json --images test/ --output runs/mine/test

Writes `detections.json` (COCO results format, in the original images' pixels) and `metrics.json` to `--output`.
"""

from dataclasses import dataclass
from pathlib import Path

from _shared import ModelName, NormName, check_ranges, console, evaluate_on, load_detector, run

from detectax_eqx import data, evaluate


@dataclass
class Options:
    """Options of an evaluation."""

    annotations: str
    """COCO JSON of the images: a path, or a URL of http, https, gs or s3."""
    images: str
    """Folder that its file names refer to, or a URL."""
    output: Path
    """Folder for detections.json and metrics.json."""
    checkpoint: Path | None = None
    """Output folder of train.py (its best checkpoint is taken), or one of its checkpoints."""
    weights: Path | None = None
    """Instead of --checkpoint: a torchvision .pth or a .safetensors file of --model."""
    model: ModelName | None = None
    """Which detector --weights are for."""
    norm: NormName = "frozen_batch"
    """Norm of the backbone for --weights; torchvision's published COCO detectors want frozen_batch_eps0."""
    batch_size: int = 1
    """Images a step."""
    min_size: int | None = None
    """Short side in pixels that images are resized to; default the checkpoint's, or 800."""
    max_size: int | None = None
    """Longest side in pixels after resizing; default the checkpoint's, or 1333."""
    score_threshold: float = 0.05
    """Detections of a lower score (0..1) are dropped."""
    nms_threshold: float = 0.5
    """IoU above which the lower of two detections of a class is dropped."""
    max_detections: int = 100
    """Detections an image."""
    threads: int = 2
    """Threads that decode images."""


RANGES = {"positive": "batch_size min_size max_size max_detections threads", "in 0..1": "score_threshold nms_threshold"}


def main(options: Options) -> None:
    """Evaluates and prints."""
    check_ranges(options, RANGES)
    detector = load_detector(
        options.model, options.norm, options.weights, options.checkpoint, options.min_size, options.max_size
    )
    dataset = data.load_coco(options.annotations, options.images)
    console.print(f"{options.annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    metrics = evaluate_on(
        detector,
        dataset,
        options.output,
        batch_size=options.batch_size,
        num_threads=options.threads,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        max_detections=options.max_detections,
    )
    for kind in metrics.values():
        print(evaluate.format_metrics(kind))
        print(evaluate.format_per_class(kind))


if __name__ == "__main__":
    run(main, Options, __doc__)
