"""Runs a detector that `export.py` wrote as StableHLO, without this package: by jax, flatbuffers and Pillow.

    python experiments/run_stablehlo.py detector.npz street.jpg

Prints a line of JSON for each image. Compiled programs are kept in a folder beside the file, so that the next process
answers its first image without compiling. To use a detector in a program of your own, copy `Detector`.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np


class Detector:
    """A detector from a file: a call takes images `(h, w, 3)` of any size that fits and gives their detections."""

    def __init__(self, path: Path):
        file = np.load(path)
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
        padded = np.zeros((batch, *shape["source"], 3), np.uint8)
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
            raise ValueError(
                f"{len(images)} images of up to {height}×{width} pixels fit none of {self.about['shapes']}."
            )
        options = self.about["options"]
        wanted = min(options["min_size"] / min(height, width), options["max_size"] / max(height, width))

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
            f"Export it anew with a jax as old as this one, or install jax {about['jax']}."
        )


def main() -> None:
    """Detects in image files."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path, help="file that export.py wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.detector)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for path in arguments.images:
        (found,) = detector([np.asarray(Image.open(path).convert("RGB"))])
        names = [detector.about["class_names"][label] for label in found["labels"]]
        line = {
            "image": str(path),
            "boxes": found["boxes"].tolist(),
            "scores": found["scores"].tolist(),
            "labels": names,
        }
        print(json.dumps(line))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
