"""The whole detector as one function of padded images and their sizes, which is what leaves the toolkit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int16, Int32, UInt8

from .._types import Detections
from ..models import detect


# A PyTree that is called as `FasterRCNN` is and has `num_classes`: `FasterRCNN`, `MaskRCNN`, or a module of your own.
Model = Callable[..., Detections]
Program = Callable[[UInt8[Array, "b h w c"], Int32[Array, "b 2"]], Detections]


@dataclass(frozen=True)
class Shape:
    """The static shape in which an exported program takes images.

    - `batch`: images at a time. `source`: `(height, width)` to which they are padded, bottom and right.
    - `canvas`: `(height, width)` that the network sees, multiples of 32.
    - `channels`: of an image, 3 for RGB.
    """

    batch: int
    source: tuple[int, int]
    canvas: tuple[int, int]
    channels: int = 3

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.source) < 1 or min(self.canvas) < 1 or self.channels < 1:
            raise ValueError(f"batch, source, canvas and channels must be positive, got {self}.")
        if self.canvas[0] % 32 or self.canvas[1] % 32:
            raise ValueError(f"canvas must be a multiple of 32 in height and width, got {self.canvas}.")
        if max(self.canvas) > np.iinfo(np.int16).max:
            raise ValueError(f"canvas must be at most 32736 in height and width, got {self.canvas}.")

    @property
    def name(self) -> str:
        """Such as `1x480x640-800x1344`."""
        return "{}x{}x{}-{}x{}".format(self.batch, *self.source, *self.canvas)


@dataclass(frozen=True)
class Options:
    """How a detector is exported: `detect`'s options, fixed in the file; the defaults are its own.

    Raises a `ValueError` for sizes that are not positive and thresholds outside 0..1.
    """

    min_size: int = 800
    max_size: int = 1333
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name in ("min_size", "max_size", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}.")


DEFAULTS = Options()


def check_class_names(model: Model, class_names: Sequence[str]) -> None:
    """Raises a `ValueError` unless there is a name for each of the model's classes."""
    count = getattr(model, "num_classes", None)
    if not isinstance(count, int):
        raise ValueError(f"model must have num_classes, the number of its classes, got a {type(model).__name__}.")
    if len(class_names) != count:
        raise ValueError(f"class_names must name the model's {count} classes, got {len(class_names)}.")


def detection_program(model: Model, shape: Shape, options: Options = DEFAULTS) -> Program:
    """A function from padded images and their `(height, width)` to detections in each image's own pixels.

    Unlike `models.detect` it finds out for itself to which size an image is to be resized: in a table of all sizes that
    fit the source, since `ops.resized_size` needs the host's double precision. An image that would not fit the canvas
    is made to.
    """
    table = resized_sizes(shape, options)

    def one(image, image_size, resized):
        return detect(
            model,
            image,
            canvas=shape.canvas,
            score_threshold=options.score_threshold,
            nms_threshold=options.nms_threshold,
            max_detections=options.max_detections,
            image_size=image_size,
            resized=resized,
        )

    def program(images: UInt8[Array, "b h w c"], image_sizes: Int32[Array, "b 2"]) -> Detections:
        rows = (image_sizes[:, 0] - 1) * shape.source[1] + image_sizes[:, 1] - 1
        return jax.vmap(one)(images, image_sizes, jnp.asarray(table)[rows].astype(jnp.int32))

    return program


def resized_sizes(shape: Shape, options: Options) -> Int16[np.ndarray, "s 2"]:
    """`ops.resized_size` of every image that fits the source, 1×1 first, row by row."""
    height, width = (np.arange(1, side + 1, dtype=np.float64) for side in shape.source)
    height, width = height[:, None], width[None, :]
    scale = np.minimum(options.min_size / np.minimum(height, width), options.max_size / np.maximum(height, width))
    scale = np.minimum(scale, np.minimum(shape.canvas[0] / height, shape.canvas[1] / width))
    return np.maximum(1, np.floor(np.stack([height * scale, width * scale], axis=2))).astype(np.int16).reshape(-1, 2)
