"""Detects objects in image files: draws them, and writes COCO results.

    python experiments/predict.py --checkpoint runs/mine --output runs/pictures street.jpg photos/

Each picture goes to `--output` under its own name; `detections.json` there holds the results of all, `image_id` being
the position in `images.json`. A file that cannot be read is reported and the others go on; the exit status is then 1.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from _shared import Detector, ModelName, NormName, check_ranges, console, load_detector, run, write_json
from tyro.conf import Positional

from detectax_eqx import Batch, Targets, data, draw, evaluate, models


SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
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
    """Short side in pixels that images are resized to; default the checkpoint's, or 800."""
    max_size: int | None = None
    """Longest side in pixels after resizing; default the checkpoint's, or 1333."""
    max_pixels: int | None = None
    """Largest image to read, in pixels. Default: Pillow's limit of 179 million, as small files may claim any size."""
    score_threshold: float = 0.5
    """Detections of a lower score (0..1) are neither drawn nor written."""
    nms_threshold: float = 0.5
    """IoU above which the lower of two detections of a class is dropped."""
    max_detections: int = 100
    """Detections kept of an image, those of the highest scores."""


RANGES = {"positive": "min_size max_size max_pixels max_detections", "in 0..1": "score_threshold nms_threshold"}


def main(options: Options) -> None:
    """Predicts; the exit status is 1 if a file failed."""
    check_ranges(options, RANGES)
    detector = load_detector(
        options.model, options.norm, options.weights, options.checkpoint, options.min_size, options.max_size
    )
    categories = None if options.annotations is None else data.read_categories(options.annotations)
    file = options.annotations or ""
    category_ids = detector.category_ids(categories, file=file, allow_renamed=options.allow_renamed)
    names = {category.id: category.name for category in (*(detector.categories or ()), *(categories or ()))}
    class_names = [names.get(category_id, str(category_id)) for category_id in category_ids]
    options.output.mkdir(parents=True, exist_ok=True)
    results, images, failures = [], [], 0
    for path, target in targets_of(options.inputs, options.output):
        try:
            image = data.read_image(path, max_pixels=options.max_pixels)
            batch = batch_of(image, detector, len(images))
            detections = models.detect_batch(
                detector.model,
                batch,
                min_size=detector.min_size,
                max_size=detector.max_size,
                score_threshold=options.score_threshold,
                nms_threshold=options.nms_threshold,
                max_detections=options.max_detections,
            )
            found = evaluate.to_coco_results(
                detections, batch, image_ids=range(len(images) + 1), category_ids=category_ids
            )
            single = first_of(detections)
            picture = draw.draw_detections(
                image, single, class_names=class_names, score_threshold=options.score_threshold
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except (OSError, ValueError) as error:
            failures += 1
            console.print(f"failed {path}: {error}", style="red", highlight=False, soft_wrap=True)
            continue
        results += found
        images.append({"id": len(images), "file_name": str(path), "height": image.shape[0], "width": image.shape[1]})
        console.print(f"{path}: {len(found)} objects, {target}", highlight=False, soft_wrap=True)
    evaluate.write_results(results, options.output / "detections.json")
    write_json(options.output / "images.json", images)
    if failures:
        console.print(f"{failures} of {failures + len(images)} files failed.")
        raise SystemExit(1)


def targets_of(inputs: tuple[Path, ...], output: Path) -> list[tuple[Path, Path]]:
    """Every image file, and where its picture goes; a folder's files keep their places below it."""
    pairs = []
    for path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            pairs += [(file, output / f"{file.relative_to(path)}.png") for file in files]
        else:
            pairs.append((path, output / f"{path.name}.png"))
    if not pairs:
        raise SystemExit(f"No image files in {', '.join(map(str, inputs))}.")
    return pairs


def batch_of(image: np.ndarray, detector: Detector, index: int) -> Batch:
    """A batch of one image, padded."""
    size = image.shape[0], image.shape[1]
    (bucket,) = data.make_buckets(
        [size], canvases=detector.canvases, min_size=detector.min_size, max_size=detector.max_size
    )
    source = tuple(-(-side // SOURCE_STEP) * SOURCE_STEP for side in size)
    images = np.zeros((1, *source, 3), np.uint8)
    images[0, : size[0], : size[1]] = image
    sizes = np.array([size], np.int32)
    none = Targets(np.zeros((1, 1, 4), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))
    return Batch(
        images,
        sizes,
        sizes,
        none,
        np.array([index], np.int32),
        np.ones(1, bool),
        np.zeros(1, np.int32),
        canvas=bucket.canvas,
    )


def first_of(detections):
    """The detections of a batch's first image."""
    return jax.tree.map(lambda x: np.asarray(x[0]), detections)


if __name__ == "__main__":
    run(main, Options, __doc__)
