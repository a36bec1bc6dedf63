"""Writes a trained detector for other runtimes.

    python experiments/export.py --checkpoint runs/mine --output detector.onnx --images photos/
    python experiments/export.py --checkpoint runs/mine --output detector.half.onnx --images photos/
    python experiments/export.py --checkpoint runs/mine --output detector.int8.onnx --images photos/
    python experiments/export.py --checkpoint runs/mine --output detector.npz
    python experiments/export.py --checkpoint runs/mine --output detector.safetensors

The suffix selects the format:

- `.onnx`: ONNX, compared with the model on `--images` before it is written
- `.half.onnx`: the same with convolutions and matrix products in float16
- `.int8.onnx`: the same in 8-bit integers, calibrated on `--images`
- `.npz`: StableHLO, for `run_stablehlo.py`
- `.safetensors`: weights, class names and image sizes, for `--weights` of the other scripts

The first three need `pip install 'detectax_eqx[onnx]'`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from _images import find_images
from _shared import (
    DetectorOptions,
    SelectionOptions,
    check_ranges,
    console,
    run,
)

from detectax_eqx import data, export, models, zoo


@dataclass
class Options:
    """Options of an export."""

    output: Path
    """File to write: .onnx, .half.onnx, .int8.onnx, .npz (StableHLO) or .safetensors (weights)."""
    images: Path | None = None
    """Folder of images to compare and calibrate on, a few dozen typical ones. Only for ONNX."""
    source: tuple[int, int] = (640, 640)
    """Height and width in pixels of the largest input image."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels of the network's input. Default: the detector's first canvas; for .npz, all."""
    batch_size: int = 1
    """Images per call."""
    any_batch: bool = False
    """Take any number of images per call, instead of --batch-size (only for .npz)."""
    max_images: int = 64
    """Use only the first images of --images, by name."""
    unmatched_score: float = 0.1
    """In the comparison, the score up to which a detection may be missing on one side."""
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    kept: SelectionOptions = field(default_factory=SelectionOptions)

    RANGES: ClassVar[dict[str, str]] = {"positive": "source canvas batch_size max_images", "in 0..1": "unmatched_score"}


def main(options: Options) -> None:
    """Exports, and prints the size of the file."""
    check_ranges(options)
    check_output(options)
    predictor = options.detector.load()
    selection = options.kept.of(predictor.model)
    divisor = predictor.model.backbone.divisor
    if options.canvas is not None and any(side % divisor for side in options.canvas):
        raise SystemExit(f"--canvas is {options.canvas}: its sides must be multiples of {divisor}.")
    canvases = predictor.canvases if options.canvas is None else (options.canvas,)
    shapes = [export.Shape(options.batch_size, options.source, canvas) for canvas in canvases]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if options.output.suffix == ".npz":
            export.save_stablehlo(
                predictor.model,
                options.output,
                shapes=shapes,
                class_names=predictor.class_names,
                selection=selection,
                any_batch=options.any_batch,
            )
        elif options.output.suffix == ".safetensors":
            predictor.save_weights(options.output)
        else:
            save_onnx(predictor, options, shapes[0], selection)
    except (ImportError, export.ExportError) as error:
        raise SystemExit(str(error)) from None
    console.print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB", highlight=False)


def check_output(options: Options) -> None:
    """Refuses an unknown suffix, and options that do not suit it, before anything is read."""
    if options.output.suffix not in (".onnx", ".npz", ".safetensors"):
        raise SystemExit(
            f"--output must end in .onnx, .half.onnx, .int8.onnx, .npz or .safetensors, got {options.output}."
        )
    if options.any_batch and options.output.suffix != ".npz":
        raise SystemExit(f"--any-batch needs an --output that ends in .npz, got {options.output}.")
    if options.output.suffix == ".onnx" and (options.images is None or not options.images.is_dir()):
        raise SystemExit(f"--images must be a folder of images to compare on, got {options.images}.")


def save_onnx(
    predictor: zoo.Predictor, options: Options, shape: export.Shape, selection: models.Selection | None
) -> None:
    """Writes an ONNX file in float32, or float16 for `.half.onnx`, and quantises it for `.int8.onnx`."""
    images, names, larger = [], [], 0
    for path, _ in find_images([options.images] if options.images else []):
        if len(images) < options.max_images:
            image = data.read_image(path)
            if image.shape[0] <= shape.source[0] and image.shape[1] <= shape.source[1]:
                images.append(image)
                names.append(str(path))
            else:
                larger += 1
    if not images:
        raise SystemExit(
            f"--images {options.images} holds no image that fits --source {shape.source[0]} {shape.source[1]}; "
            f"{larger} are larger."
        )
    if larger:
        console.print(f"{larger} images of {options.images} are larger than --source and are skipped.", highlight=False)
    with TemporaryDirectory(dir=options.output.parent) as folder:
        integers = options.output.name.endswith(".int8.onnx")
        file = Path(folder) / "float.onnx" if integers else options.output
        export.save_onnx(
            predictor.model,
            file,
            shape=shape,
            images=images,
            class_names=predictor.class_names,
            selection=selection,
            half=options.output.name.endswith(".half.onnx"),
            unmatched_score=options.unmatched_score,
            image_names=names,
        )
        if integers:
            export.quantize_onnx(file, options.output, images=images)


if __name__ == "__main__":
    run(main, Options, __doc__)
