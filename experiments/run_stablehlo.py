"""Runs a detector that `export.py` wrote as StableHLO, without this package: by jax, flatbuffers and Pillow.

    python experiments/run_stablehlo.py detector.npz street.jpg

Prints a line of JSON per image. A file that cannot be read is reported and the others go on; the exit status is then 1.
Compiled programs are kept in a folder beside the detector, so that the next process answers its first image without
compiling. To use a detector in a program of your own, copy `Detector`, `check_version` and `read_image`.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import ExifTags, Image


# What undoes each EXIF orientation: a camera held sideways stores its rows as columns.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Detector:
    """A detector from a file: a call takes images `(h, w, c)` of any size that fits and gives their detections."""

    def __init__(self, path: Path):
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("This is not a whole .npz file of export.py.")
        file = np.load(path)
        if "about" not in file:
            raise ValueError("This .npz file holds no detector: export.py writes one.")
        self.about = json.loads(file["about"].tobytes())
        check_version(self.about)
        jax.config.update("jax_compilation_cache_dir", f"{path}.compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.weights = [jax.device_put(file[f"weights/{i}"]) for i in range(self.about["num_weights"])]
        self._file = file
        self._programs = {}

    def __call__(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Arrays by the names in `about["outputs"]` for each image, of those rows that are valid."""
        shape = self._shape(images)
        batch = shape["batch"] or len(images)  # null where any number will do
        padded = np.zeros((batch, *shape["source"], images[0].shape[2]), np.uint8)
        sizes = np.ones((batch, 2), np.int32)
        for i, image in enumerate(images):
            sizes[i] = image.shape[:2]
            padded[i, : sizes[i, 0], : sizes[i, 1]] = image
        found = [np.asarray(output) for output in self._program(shape["name"])(self.weights, padded, sizes)]
        named = dict(zip(self.about["outputs"], found, strict=True))
        valid = named.pop("valid")
        return [{name: array[i, valid[i]] for name, array in named.items()} for i in range(len(images))]

    def _shape(self, images):
        """The smallest batch and source that the images fit, and of those the canvas that shrinks them least."""
        height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
        fitting = [
            shape
            for shape in self.about["shapes"]
            if (shape["batch"] or len(images)) >= len(images)
            and shape["source"][0] >= height
            and shape["source"][1] >= width
        ]
        if not fitting:
            sources = {(*shape["source"], shape["batch"]) for shape in self.about["shapes"]}
            limits = [f"{h}×{w} pixels" + (f", {batch} at a time" if batch else "") for h, w, batch in sources]
            raise ValueError(
                f"{len(images)} of up to {height}×{width} pixels (height × width): this detector takes images of up to "
                f"{' or '.join(sorted(limits))}. Shrink the image, or export with a larger --source."
            )
        resize = self.about["preprocessing"]["resize"]
        if "size" in resize:  # of both sides, whatever the image's
            wanted = resize["size"] / min(height, width)
        else:
            wanted = min(resize["min_size"] / min(height, width), resize["max_size"] / max(height, width))

        def key(shape):
            fit = min(wanted, shape["canvas"][0] / height, shape["canvas"][1] / width)
            return shape["batch"] or 0, -fit, shape["canvas"][0] * shape["canvas"][1], shape["source"]

        return min(fitting, key=key)

    def _program(self, name):
        if name not in self._programs:
            program = jax.export.deserialize(bytearray(self._file[f"programs/{name}"].tobytes()))
            self._programs[name] = jax.jit(program.call)
        return self._programs[name]


def check_version(about: dict) -> None:
    """Refuses a file that this jax cannot be relied on to run.

    jax reads what it wrote in the past six months, and makes no promise about what a later jax wrote. Each revision of
    the format has a number, of which a jax knows a range.
    """
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    wrote, here = (tuple(int(part) for part in text.split(".")[:3]) for text in (about["jax"], jax.__version__))
    if not oldest <= about["calling_convention"] <= newest or here < wrote:
        raise ValueError(
            f"The file was written by jax {about['jax']} in calling convention {about['calling_convention']}; this is "
            f"jax {jax.__version__}, which reads conventions {oldest} to {newest} of its own and earlier releases. "
            f"Export it again with a jax as old as this one, or install jax {about['jax']}."
        )


def read_image(path: Path) -> np.ndarray:
    """The pixels of an image file as `(h, w, 3)` uint8, just as the detector saw its training images.

    Gray, palette, CMYK and 1-bit images become RGB; an alpha channel is dropped, the colours below it stay. 16-bit gray
    is scaled, 65535 becoming 255. Of an animation, the first frame is read. An EXIF orientation is applied.

    Raises an error for a file that is missing, damaged or no image, and for numbers whose range is not known.
    """
    with Image.open(path) as image:
        if image.format == "PNG":  # Pillow compares its checksums only if asked, and that ends the reading
            image.verify()
            image = Image.open(path)
        with image:
            image.load()
            try:
                transposition = TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            except Exception:  # garbage where EXIF should be says nothing about the pixels
                transposition = None
            rgb = to_rgb(image)
    return np.array(rgb if transposition is None else rgb.transpose(transposition))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 or 32 bits, which Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit values {values.min()}..{values.max()} have no known range; save it with 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("fractions have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def describe(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Detects in image files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path, help="file that export.py wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.detector)
    except Exception as error:  # a damaged archive raises errors of many types, as a damaged image does
        raise SystemExit(f"{arguments.detector}: {describe(error)}") from None
    failures = 0
    for path in arguments.images:
        try:
            image = read_image(path)
        except Exception as error:
            print(f"{path}: cannot be read as an image: {describe(error)}", file=sys.stderr)
            failures += 1
            continue
        try:
            (found,) = detector([image])
        except ValueError as error:
            print(f"{path}: {describe(error)}", file=sys.stderr)
            failures += 1
            continue
        names = [detector.about["class_names"][label] for label in found["labels"]]
        line = {
            "image": str(path),
            "boxes": found["boxes"].tolist(),
            "scores": found["scores"].tolist(),
            "labels": names,
        }
        print(json.dumps(line), flush=True)
    if failures:
        raise SystemExit(f"{failures} of {len(arguments.images)} files failed.")


if __name__ == "__main__":
    main()
