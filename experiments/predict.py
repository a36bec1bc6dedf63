"""Detects objects in image files: draws them, and writes COCO results.

    python experiments/predict.py --checkpoint runs/mine --output runs/pictures street.jpg photos/

Each picture goes to `--output` under its own name, with a number where two are the same; `detections.json` there holds
the results of all, `image_id` being the position in `images.json`, which names files and pictures. A file that cannot
be read is reported and the others go on; the exit status is then 1. Folders are read whole, except output folders of
this script within them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _images import find_images, unique_targets
from _shared import (
    Detector,
    ModelName,
    NormName,
    check_ranges,
    console,
    load_detector,
    run,
    selection_of,
    sizes_of,
    write_json,
)
from PIL import ImageFont
from tyro.conf import Positional

from detectax_eqx import Images, data, draw, evaluate, models


# Images are padded to multiples of this, so that few programs serve pictures of many sizes.
SOURCE_STEP = 256


@dataclass
class Options:
    """Options of a prediction."""

    inputs: Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    output: Path
    """Folder for the drawn pictures and detections.json."""
    checkpoint: Path | None = None
    """Output folder of train.py (its best checkpoint is taken), or one of its checkpoints."""
    weights: Path | None = None
    """Instead of --checkpoint: a torchvision .pth or a .safetensors file of --model."""
    model: ModelName | None = None
    """Which detector --weights are for."""
    norm: NormName = "frozen_batch"
    """Norm of the backbone for --weights; torchvision's published COCO detectors want frozen_batch_eps0."""
    annotations: str | None = None
    """COCO JSON whose categories name the classes, for weights that come without names. Others are checked by it."""
    allow_renamed: bool = False
    """Accept --annotations that name the model's category ids otherwise. Their names are then the ones drawn."""
    min_size: int | None = None
    """Short side in pixels that images are resized to; default the checkpoint's, or the detector's own."""
    max_size: int | None = None
    """Longest side in pixels after resizing; default the checkpoint's, or the detector's own."""
    max_pixels: int | None = None
    """Largest image to read, in pixels. Default: Pillow's limit of 179 million, as small files may claim any size."""
    score_threshold: float = 0.5
    """Detections of a lower score (0..1) are neither drawn nor written."""
    nms_threshold: float | None = None
    """IoU above which the lower of two detections of a class is dropped. Default: the detector's own, such as .5."""
    selection: dict[str, float] = field(default_factory=dict)
    """Other fields of the detector's selection, as NAME VALUE NAME VALUE: pre_nms_top_n 500, for instance."""
    max_detections: int = 100
    """Detections kept of an image, those of the highest scores."""
    font: Path | None = None
    """Font file for class names; by default Pillow's, and an installed one for characters that it lacks."""


RANGES = {"positive": "min_size max_size max_pixels max_detections", "in 0..1": "score_threshold nms_threshold"}


def main(options: Options) -> None:
    """Predicts; the exit status is 1 if a file failed."""
    check_ranges(options, RANGES)
    if options.font is not None:
        check_font(options.font)
    pairs = targets_of(options.inputs, options.output)
    detector = load_detector(
        options.model, options.norm, options.weights, options.checkpoint, options.min_size, options.max_size
    )
    selection = selection_of(
        detector.model,
        options.selection,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        max_detections=options.max_detections,
    )
    categories = None if options.annotations is None else data.read_categories(options.annotations)
    file = options.annotations or ""
    category_ids = detector.category_ids(categories, file=file, allow_renamed=options.allow_renamed)
    names = {category.id: category.name for category in (*(detector.categories or ()), *(categories or ()))}
    class_names = [names.get(category_id, str(category_id)) for category_id in category_ids]
    options.output.mkdir(parents=True, exist_ok=True)
    # Both files are there from the start: they mark the folder as this script's, should it be stopped.
    write_results(options.output, [], [])
    results, images, failures = [], [], 0
    for path, target in pairs:
        try:
            image = data.read_image(path, max_pixels=options.max_pixels)
            one = padded(image, detector, len(images))
            detections = models.detect_batch(detector.model, one, selection=selection)
            found = evaluate.to_coco_results(
                detections, one, image_ids=range(len(images) + 1), category_ids=category_ids
            )
            single = first_of(detections)
            picture = draw.draw_detections(
                image, single, class_names=class_names, score_threshold=options.score_threshold, font=options.font
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except (OSError, ValueError) as error:
            failures += 1
            console.print(f"failed {path}: {error}", style="red", highlight=False, soft_wrap=True)
            continue
        results += found
        height, width = image.shape[:2]
        picture_name = str(target.relative_to(options.output))
        images.append(
            {"id": len(images), "file_name": str(path), "height": height, "width": width, "picture": picture_name}
        )
        console.print(f"{path}: {len(found)} objects, {target}", highlight=False, soft_wrap=True)
    write_results(options.output, results, images)
    if failures:
        console.print(f"{failures} of {failures + len(images)} files failed.")
        raise SystemExit(1)


def check_font(path: Path) -> None:
    """Refuses a font that cannot be used, before anything is compiled."""
    try:
        ImageFont.truetype(path, 12)
    except OSError as error:
        raise SystemExit(f"--font {path} cannot be used: {error}.") from None


def write_results(output: Path, results: list[dict[str, Any]], images: list[dict[str, Any]]) -> None:
    """The two JSON files."""
    evaluate.write_results(results, output / "detections.json")
    write_json(output / "images.json", images)


def targets_of(inputs: tuple[Path, ...], output: Path) -> list[tuple[Path, Path]]:
    """Every image file once, and where its picture goes."""
    images = find_images(inputs, output)
    if not images:
        raise SystemExit(f"No image files in {', '.join(map(str, inputs))}.")
    targets = unique_targets(images, output)
    for folder in (path.resolve() for path in inputs if path.is_dir()):
        inside = folder in output.resolve().parents  # it is left out when the folder is read
        if not inside and any(target.resolve().is_relative_to(folder) for target in targets):
            raise SystemExit(f"--output {output} would put pictures among the images of {folder}: give another folder.")
    return [(path, target) for (path, _), target in zip(images, targets, strict=True)]


def padded(image: np.ndarray, detector: Detector, index: int) -> Images:
    """A batch of one image, padded."""
    size = image.shape[0], image.shape[1]
    (bucket,) = data.make_buckets([size], canvases=detector.canvases, **sizes_of(detector.model))
    source = tuple(-(-side // SOURCE_STEP) * SOURCE_STEP for side in size)
    pixels = np.zeros((1, *source, 3), np.uint8)
    pixels[0, : size[0], : size[1]] = image
    sizes = np.array([size], np.int32)
    return Images(pixels, sizes, sizes, np.array([index], np.int32), np.array([True]), canvas=bucket.canvas)


def first_of(detections):
    """The detections of a batch's first image."""
    return jax.tree.map(lambda x: np.asarray(x[0]), detections)


if __name__ == "__main__":
    run(main, Options, __doc__)
