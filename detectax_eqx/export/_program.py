"""The program that is exported: the whole detector as one function of padded images and their sizes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from .._types import Detections
from ..models import AbstractDetector, Selection, detect, selected


Program = Callable[[UInt8[Array, "*b h w c"], Int32[Array, "*b 2"]], Detections]
# The table of sizes is int16.
LARGEST_SIDE = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Shape:
    """The static shape of the images that an exported program takes.

    - `batch`: the number of images per call.
    - `source`: the `(height, width)` to which images are padded at the bottom and right.
    - `canvas`: the `(height, width)` of the network's input, multiples of its backbone's `divisor`.
    - `channels`: the number of channels of an image, 3 for RGB.
    """

    batch: int
    source: tuple[int, int]
    canvas: tuple[int, int]
    channels: int = 3

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.source) < 1 or min(self.canvas) < 1 or self.channels < 1:
            raise ValueError(f"batch, source, canvas and channels must be positive, got {self}.")
        if max(self.canvas) > LARGEST_SIDE:
            raise ValueError(f"canvas must be at most {LARGEST_SIDE} in height and width, got {self.canvas}.")

    @property
    def name(self) -> str:
        """Batch, source and canvas, such as `1x480x640-800x1344`."""
        return "{}x{}x{}-{}x{}".format(self.batch, *self.source, *self.canvas)


def checked_selection(model: AbstractDetector, selection: Selection | None) -> Selection:
    """Returns `selection`, or the model's own if it is `None`. It is fixed once a file is exported.

    Raises a `ValueError` for counts that are not positive and thresholds outside 0..1.
    """
    selection = selected(model, selection)
    for field in fields(selection):  # type: ignore[arg-type]
        value = getattr(selection, field.name)
        if field.name.endswith("_threshold") and not 0 <= value <= 1:
            raise ValueError(f"{field.name} must be in 0..1, got {value}.")
        if field.type is int and value < 1:
            raise ValueError(f"{field.name} must be positive, got {value}.")
    return selection


def about_model(
    model: AbstractDetector, class_names: Sequence[str], selection: Selection | None = None
) -> dict[str, Any]:
    """The metadata of every exported file: `class_names`, `preprocessing` and `selection`.

    Raises a `ValueError` unless there is one name per class of the model.
    """
    if len(class_names) != model.num_classes:
        raise ValueError(f"class_names must name the model's {model.num_classes} classes, got {len(class_names)}.")
    return {
        "class_names": list(class_names),
        "preprocessing": asdict(model.preprocessing),
        "selection": asdict(checked_selection(model, selection)),  # type: ignore[call-overload]
    }


def detection_program(model: AbstractDetector, shape: Shape, selection: Selection | None = None) -> Program:
    """Returns a function from padded images and their `(height, width)` to detections in each image's own pixels.

    Unlike `models.detect`, the function computes the size to which each image is resized. It looks the size up in a
    table of all sizes that fit the source, because the rule of `model.preprocessing` needs the host's double precision.
    An image that would exceed the canvas is scaled down to fit.

    - `selection`: which detections are kept, an instance of the detector's selection class; default `model.selection`.
      `models.selected` returns a copy with some fields replaced.

    Raises a `ValueError` for a canvas whose sides are not multiples of `model.backbone.divisor`, and for a selection
    with counts that are not positive or thresholds outside 0..1.
    """
    return jax.vmap(image_program(model, shape, selection))


def named_outputs(detections: Detections) -> dict[str, Array]:
    """The arrays of detections by the names of their fields, in the order of `jax.tree.leaves`."""
    return {name: array for name, array in vars(detections).items() if array is not None}


def image_program(model: AbstractDetector, shape: Shape, selection: Selection | None) -> Program:
    """`detection_program` for one image, `(h, w, c)`, and its size, `(2,)`."""
    selection = checked_selection(model, selection)
    size_on_canvas = resize_rule(model, shape)

    def program(image: UInt8[Array, "h w c"], source_size: Int32[Array, " 2"]) -> Detections:
        return detect(
            model,
            image,
            canvas=shape.canvas,
            selection=selection,
            source_size=source_size,
            canvas_size=size_on_canvas(source_size),
        )

    return program


def resize_rule(model: AbstractDetector, shape: Shape) -> Callable[[Int32[Array, " 2"]], Int32[Array, " 2"]]:
    """Returns a function from an image's size to its size on the canvas, a lookup in a table of all sizes that fit.

    Raises a `ValueError` for a canvas whose sides are not multiples of `model.backbone.divisor`.
    """
    divisor = model.backbone.divisor
    if shape.canvas[0] % divisor or shape.canvas[1] % divisor:
        raise ValueError(f"canvas must be a multiple of {divisor} in height and width, got {shape.canvas}.")
    table = model.preprocessing.resize.table(shape.source, canvas=shape.canvas).astype(np.int16).reshape(-1, 2)

    def size_on_canvas(source_size: Int32[Array, " 2"]) -> Int32[Array, " 2"]:
        row = (source_size[0] - 1) * shape.source[1] + source_size[1] - 1  # sizes start at 1
        return jnp.asarray(table)[row].astype(jnp.int32)

    return size_on_canvas
