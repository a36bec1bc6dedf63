"""Runs a StableHLO detector written by `export.py`. Needs jax, flatbuffers and Pillow, but not this package.

    python experiments/run_stablehlo.py detector.npz street.jpg

Prints one line of JSON per image. A file that cannot be read is reported, the others are processed, and the exit status
is 1. Compiled programs are cached in a folder beside the detector, so that the next process does not compile them
again. To use a detector in your own program, copy `Detector`, `check_version` and `read_image`.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import ExifTags, Image


# The transposition that undoes each EXIF orientation: a camera held sideways stores rows as columns.
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
    """A detector loaded from a file.

    Calling it with a list of uint8 images `(h, w, c)` returns their detections. The images may have any size up to the
    exported source size.
    """

    def __init__(self, path: Path):
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("This is not a complete .npz file written by export.py.")
        file = np.load(path)
        if "about" not in file:
            raise ValueError("This .npz file holds no detector: it was not written by export.py.")
        self.about = json.loads(file["about"].tobytes())
        check_version(self.about)
        jax.config.update("jax_compilation_cache_dir", f"{path}.compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.weights = [jax.device_put(file[f"weights/{i}"]) for i in range(self.about["num_weights"])]
        self._file = file
        self._programs = {}

    def __call__(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Returns the valid rows of each output for each image, by the names in `about["outputs"]`."""
        shape = self._shape(images)
        batch = shape["batch"] or len(images)  # null if any batch size is allowed
        padded = np.zeros((batch, *shape["source"], images[0].shape[2]), np.uint8)
        sizes = np.ones((batch, 2), np.int32)
        for i, image in enumerate(images):
            sizes[i] = image.shape[:2]
            padded[i, : sizes[i, 0], : sizes[i, 1]] = image
        outputs = [np.asarray(output) for output in self._program(shape["name"])(self.weights, padded, sizes)]
        named = dict(zip(self.about["outputs"], outputs, strict=True))
        valid = named.pop("valid")
        return [{name: array[i, valid[i]] for name, array in named.items()} for i in range(len(images))]

    def _shape(self, images):
        """Selects the smallest batch and source that the images fit, and then the canvas that shrinks them least."""
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
                f"Got a batch of {len(images)}, up to {height}×{width} pixels (height × width), but the detector takes "
                f"images of up to {' or '.join(sorted(limits))}. Shrink the image, or export with a larger --source."
            )
        resize = self.about["preprocessing"]["resize"]
        if "size" in resize:  # a square, whatever the aspect ratio
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
    """Raises a `ValueError` for files written by an incompatible JAX version.

    JAX reads files that it wrote in the past six months, and gives no guarantee for files of a later release. Each
    revision of the format has a number, and each release of JAX supports a range of them.
    """
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    wrote, here = (tuple(int(part) for part in text.split(".")[:3]) for text in (about["jax"], jax.__version__))
    if not oldest <= about["calling_convention"] <= newest or here < wrote:
        raise ValueError(
            f"The file was written by jax {about['jax']} in calling convention {about['calling_convention']}; this is "
            f"jax {jax.__version__}, which reads conventions {oldest} to {newest} of its own and earlier releases. "
            f"Export it again with this or an older jax, or install jax {about['jax']}."
        )


def read_image(path: Path) -> np.ndarray:
    """Reads an image file as `(h, w, 3)` uint8 RGB, in the same way as images are read for training.

    Gray, palette, CMYK and 1-bit images are converted to RGB. An alpha channel is dropped without blending. 16-bit gray
    is scaled, not clipped: 65535 becomes 255. Only the first frame of an animation is read. The EXIF orientation is
    applied.

    Raises an error if the file is missing, damaged or not an image, or if it holds values of an unknown range.
    """
    with Image.open(path) as image:
        if image.format == "PNG":  # only `verify` compares the checksums, and the file must be opened again after it
            image.verify()
            image = Image.open(path)
        with image:
            image.load()
            try:
                transposition = TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            except Exception:  # damaged EXIF data do not affect the pixels
                transposition = None
            rgb = to_rgb(image)
    return np.array(rgb if transposition is None else rgb.transpose(transposition))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB."""
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
    """The message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Detects objects in image files and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path, help="file that export.py wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.detector)
    except Exception as error:  # damaged archives raise many types of errors, as damaged images do below
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
            (detections,) = detector([image])
        except ValueError as error:
            print(f"{path}: {describe(error)}", file=sys.stderr)
            failures += 1
            continue
        names = [detector.about["class_names"][label] for label in detections["labels"]]
        line = {
            "image": str(path),
            "boxes": detections["boxes"].tolist(),
            "scores": detections["scores"].tolist(),
            "labels": names,
        }
        print(json.dumps(line), flush=True)
    if failures:
        raise SystemExit(f"{failures} of {len(arguments.images)} files failed.")


if __name__ == "__main__":
    main()
