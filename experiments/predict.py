"""Detects objects in image files, draws them, and writes COCO results.

    python experiments/predict.py --checkpoint runs/mine --output runs/pictures street.jpg photos/

Pictures are written to `--output` under unique names. `detections.json` holds the results of all images; their
`image_id` is an index into `images.json`, which lists files and pictures. A file that cannot be read is reported, the
others are processed, and the exit status is 1. Folders are read recursively, without output folders of this script.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from _images import find_images, unique_targets
from _shared import (
    DetectorOptions,
    Precision,
    SelectionOptions,
    check_ranges,
    console,
    run,
    write_json,
)
from PIL import ImageFont
from tyro.conf import Positional

from detectax_eqx import data, evaluate, zoo


@dataclass
class Options:
    """Options of a prediction."""

    inputs: Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    output: Path = Path("predictions")
    """Folder for pictures, detections.json and images.json."""
    precision: Precision = "float32"
    """Dtype of the network."""
    annotations: str | None = None
    """COCO JSON that names the classes, for weights without names. Existing names are checked against it."""
    allow_renamed: bool = False
    """Accept --annotations with other names for the model's category ids, and draw their names."""
    max_pixels: int | None = None
    """Largest image to read, in pixels. Default: Pillow's limit of 179 million, a guard against decompression bombs."""
    font: Path | None = None
    """Font file for class names. Default: Pillow's, and an installed font for characters that it lacks."""
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    kept: SelectionOptions = field(default_factory=lambda: SelectionOptions(score_threshold=0.5, max_detections=100))

    RANGES: ClassVar[dict[str, str]] = {"positive": "max_pixels"}


def main(options: Options) -> None:
    """Predicts and draws. The exit status is 1 if a file failed."""
    check_ranges(options)
    if options.font is not None:
        check_font(options.font)
    pairs = targets_of(options.inputs, options.output)
    predictor = with_names(options.detector.load(options.precision), options.annotations, options.allow_renamed)
    selection = options.kept.of(predictor.model)
    options.output.mkdir(parents=True, exist_ok=True)
    # Written first, so that the folder is recognised as this script's output even if the script is interrupted.
    write_results(options.output, [], [])
    results, images, failures = [], [], 0
    for path, target in pairs:
        try:
            image = data.read_image(path, max_pixels=options.max_pixels)
            prediction = predictor(image, selection=selection)
            detections = prediction.to_coco(image_id=len(images))
            picture = prediction.draw(score_threshold=selection.score_threshold, font=options.font)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except (OSError, ValueError) as error:
            failures += 1
            console.print(f"failed {path}: {error}", style="red", highlight=False, soft_wrap=True)
            continue
        results += detections
        height, width = image.shape[:2]
        picture_name = str(target.relative_to(options.output))
        images.append(
            {"id": len(images), "file_name": str(path), "height": height, "width": width, "picture": picture_name}
        )
        console.print(f"{path}: {len(detections)} objects, {target}", highlight=False, soft_wrap=True)
    write_results(options.output, results, images)
    if failures:
        console.print(f"{failures} of {failures + len(images)} files failed.")
        raise SystemExit(1)


def with_names(predictor: zoo.Predictor, annotations: str | None, allow_renamed: bool) -> zoo.Predictor:
    """The predictor with the class names of an annotation file, if there is one."""
    if annotations is None:
        return predictor
    categories = data.read_categories(annotations)
    ids = predictor.category_ids(categories, file=annotations, allow_renamed=allow_renamed)
    known = {category.id: category for category in (*(predictor.categories or ()), *categories)}
    return replace(predictor, categories=tuple(known.get(id, data.Category(id, str(id))) for id in ids))


def check_font(path: Path) -> None:
    """Refuses a font that cannot be used, before anything is compiled."""
    try:
        ImageFont.truetype(path, 12)
    except OSError as error:
        raise SystemExit(f"--font {path} cannot be used: {error}.") from None


def write_results(output: Path, results: list[dict[str, Any]], images: list[dict[str, Any]]) -> None:
    """Writes the two JSON files."""
    evaluate.write_results(results, output / "detections.json")
    write_json(output / "images.json", images)


def targets_of(inputs: tuple[Path, ...], output: Path) -> list[tuple[Path, Path]]:
    """Returns pairs of an image file and the picture to write, each file once."""
    images = find_images(inputs, output)
    if not images:
        raise SystemExit(f"No image files in {', '.join(map(str, inputs))}.")
    targets = unique_targets(images, output)
    for folder in (path.resolve() for path in inputs if path.is_dir()):
        inside = folder in output.resolve().parents  # find_images skips it
        if not inside and any(target.resolve().is_relative_to(folder) for target in targets):
            raise SystemExit(f"--output {output} would put pictures among the images of {folder}: give another folder.")
    return [(path, target) for (path, _), target in zip(images, targets, strict=True)]


if __name__ == "__main__":
    run(main, Options, __doc__)
