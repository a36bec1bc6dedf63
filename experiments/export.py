"""Writes a trained detector as a file that other runtimes run, and compares it with the model where stated below.

    python experiments/export.py --checkpoint runs/mine --output detector.onnx --images photos/
    python experiments/export.py --checkpoint runs/mine --output detector.int8.onnx --images photos/
    python experiments/export.py --checkpoint runs/mine --output detector.npz
    python experiments/export.py --checkpoint runs/mine --output detector.safetensors

The suffix says which: `.onnx` for ONNX, compared with the model on images before it is kept; `.int8.onnx` for that in
8-bit integers, calibrated on the same images; `.npz` for StableHLO, which `run_stablehlo.py` runs; `.safetensors` for
the weights alone, with class names and image sizes, as `--weights` of the other scripts takes them. The first two
need `pip install 'detectax_eqx[onnx]'`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """File to write, whose suffix says what: .onnx, .int8.onnx, .npz (StableHLO) or .safetensors (weights)."""
    images: Path | None = None
    """Folder of images to compare and to calibrate on, some dozens like those to come. A .npz needs none."""
    source: tuple[int, int] = (640, 640)
    """Height and width in pixels of the largest image that the file is to take."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels that the network sees. Default: the detector's first canvas; in a .npz, all."""
    batch_size: int = 1
    """Images that the file takes at a time."""
    any_batch: bool = False
    """Take any number of images at a time, instead of --batch-size: .npz alone can."""
    max_images: int = 64
    """Images of --images to use, the first by name."""
    unmatched_score: float = 0.1
    """In the comparison, the score (0..1) up to which a detection may be the model's or the file's alone."""
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    kept: SelectionOptions = field(default_factory=SelectionOptions)


RANGES = {"positive": "source canvas batch_size max_images", "in 0..1": "unmatched_score"}


def main(options: Options) -> None:
    """Exports, and says how large the file is."""
    check_ranges(options, RANGES)
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
    """Refuses a file name that says nothing, and options that do not suit it, before anything is read."""
    if options.output.suffix not in (".onnx", ".npz", ".safetensors"):
        raise SystemExit(f"--output must end in .onnx, .int8.onnx, .npz or .safetensors, got {options.output}.")
    if options.any_batch and options.output.suffix != ".npz":
        raise SystemExit(f"--any-batch needs an --output that ends in .npz, got {options.output}.")
    if options.output.suffix == ".onnx" and (options.images is None or not options.images.is_dir()):
        raise SystemExit(f"--images must be a folder of images to compare on, got {options.images}.")


def save_onnx(
    predictor: zoo.Predictor, options: Options, shape: export.Shape, selection: models.Selection | None
) -> None:
    """In floats, and from those in integers if the file's name says so."""
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
            f"--images {options.images} holds no image of at most --source {shape.source[0]} {shape.source[1]}, and "
            f"{larger} larger ones."
        )
    if larger:
        console.print(f"{larger} images of {options.images} are larger than --source and left out.", highlight=False)
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
            unmatched_score=options.unmatched_score,
            image_names=names,
        )
        if integers:
            export.quantize_onnx(file, options.output, images=images)


if __name__ == "__main__":
    run(main, Options, __doc__)
