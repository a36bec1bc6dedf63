"""The PyTrees that data, models, training and evaluation exchange.

Every field may have leading batch axes (`*b`), so that one type holds a single example or a batch. Everything of
variable length is padded to a fixed capacity, and `valid` marks the real rows.
"""

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int32, Real, UInt8


# On the host, the fields are NumPy arrays, which JAX functions also accept.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = Array | np.ndarray


def _image_remedy(image: Any, name: str) -> str:
    """How to convert `image` to a uint8 `(h, w, c)` array, or an empty string if that is not known."""
    if isinstance(image, str | os.PathLike):
        return f"Read the file: detectax_eqx.data.read_image({name})."
    if hasattr(image, "convert"):
        return f"Convert the Pillow image: np.asarray({name}.convert('RGB'))."
    if not hasattr(image, "dtype") or not hasattr(image, "ndim"):
        return f"Pass an array of uint8 pixels: np.asarray({name}, np.uint8)."
    if "float" in str(image.dtype):
        return (
            f"Pixels are 0..255: {name}.astype(np.uint8), or (255 * {name}).astype(np.uint8) if they lie in 0..1. "
            f"The model itself normalises them."
        )
    if str(image.dtype) == "uint16":
        return f"Scale to 8 bits: ({name} // 257).astype(np.uint8)."
    if image.ndim == 2:
        return f"Give the grayscale image channels: np.repeat({name}[..., None], 3, axis=2)."
    if image.ndim == 4:
        return "It is a batch: map the function over it with jax.vmap, or call detect_batch."
    if not isinstance(image, jax.Array | np.ndarray):
        return f"Convert it: np.asarray({name})."
    return ""


# One decoded image, with the function that writes the remedy in a type error.
Image = Annotated[UInt8[AnyArray, "h w c"], _image_remedy]


class Targets(eqx.Module):
    """The ground truth of an image, padded to `n` rows.

    - `boxes`: `(x0, y0, x1, y1)` in pixels of the image they belong to.
    - `labels`: `0..K-1`, foreground classes only.
    - `valid`: which rows hold an object.
    - `masks`: coverage of each object in its own frame, 0..255 for uint8 and 0..1 otherwise, or `None`.
    - `mask_boxes`: the frame that each mask fills, which is the object's whole box. Cropping an image clips `boxes` but
      not `mask_boxes`, which may extend past the border, so that a mask never has to be resampled. `None` if `masks` is
      `None`.
    - `keypoints`: `(x, y, visibility)` of the `k` points of each object, in the same pixels as `boxes`, or `None`. The
      visibility is COCO's: 0 not labelled, 1 labelled but hidden, 2 visible.
    """

    boxes: Float[AnyArray, "*b n 4"]
    labels: Int32[AnyArray, "*b n"]
    valid: Bool[AnyArray, "*b n"]
    masks: Real[AnyArray, "*b n s t"] | Bool[AnyArray, "*b n s t"] | None = None
    mask_boxes: Float[AnyArray, "*b n 4"] | None = None
    keypoints: Float[AnyArray, "*b n k 3"] | None = None

    def check_labels(self, num_classes: int) -> None:
        """Raises a `ValueError` that names label and image if a valid row's label is not in `0..num_classes - 1`.

        The losses cannot raise an error in a compiled program: there, such a label makes them NaN. This method needs
        concrete values, so call it outside `jax.jit`; during tracing it does nothing. A step of `train.make_train_step`
        calls it for each batch.

        >>> targets = Targets(np.ones((2, 1, 4), "f"), np.array([[0], [3]], "i"), np.ones((2, 1), bool))
        >>> targets.check_labels(3)
        Traceback (most recent call last):
        ValueError: Labels must be in 0..2, but image 1 has label 3 in row 0 of its targets.
        """
        _check_labels(self, num_classes, None, None)


class Detections(eqx.Module):
    """The detections in an image, sorted by descending score and padded to `n` rows.

    - `boxes`: `(x0, y0, x1, y1)` in pixels of the input image.
    - `scores`: 0..1. `labels`: `0..K-1`. `valid`: which rows hold a detection.
    - `masks`: probabilities 0..1, or `None`. A model's `paste` puts them onto an image, given the `frames`.
    - `mask_boxes`: the frame that each mask fills, in the same pixels as `boxes`; `None` if it is the object's box.
    - `keypoints`: `(x, y, score)` of each object's `k` points, in the same pixels as `boxes`, or `None`.
    """

    boxes: Float[AnyArray, "*b n 4"]
    scores: Float[AnyArray, "*b n"]
    labels: Int32[AnyArray, "*b n"]
    valid: Bool[AnyArray, "*b n"]
    masks: Float[AnyArray, "*b n s t"] | None = None
    keypoints: Float[AnyArray, "*b n k 3"] | None = None
    mask_boxes: Float[AnyArray, "*b n 4"] | None = None

    @property
    def frames(self) -> Float[AnyArray, "*b n 4"]:
        """The frame that each mask fills."""
        return self.boxes if self.mask_boxes is None else self.mask_boxes


class Images(eqx.Module):
    """Decoded images, padded at the bottom and right to a common shape: the input of a detector.

    - `pixels`: uint8, usually RGB. `sizes`: `(height, width)` of each image within `pixels`.
    - `original_sizes`: `(height, width)` on disk; it differs from `sizes` only if an oversized image was shrunk while
      decoding.
    - `indices`: position of each image in its dataset. `valid`: false for padding that fills up a batch.
    - `canvas`: `(height, width)` of the network's input. It is static: a program is compiled for each canvas.
    """

    pixels: UInt8[AnyArray, "*b h w c"]
    sizes: Int32[AnyArray, "*b 2"]
    original_sizes: Int32[AnyArray, "*b 2"]
    indices: Int32[AnyArray, "*b"]
    valid: Bool[AnyArray, "*b"]
    canvas: tuple[int, int] = eqx.field(static=True)


class Batch(eqx.Module):
    """Images with their ground truth: the input of training.

    - `targets`: in pixels of `images.pixels`.
    - `overflow`: number of objects that were dropped because an image has more than the capacity.
    """

    images: Images
    targets: Targets
    overflow: Int32[AnyArray, "*b"]

    def __check_init__(self) -> None:
        axes = self.images.valid.shape, self.targets.valid.shape[:-1], self.overflow.shape
        if len(set(axes)) > 1:
            shapes = "{}, {} and {}".format(*axes)
            raise ValueError(f"images, targets and overflow must have the same batch axes, got {shapes}.")

    def check_labels(self, num_classes: int) -> None:
        """`Targets.check_labels` for the images that are `valid`. The error also names its `indices` entry."""
        _check_labels(self.targets, num_classes, self.images.valid, self.images.indices)


class WeightedSum(eqx.Module):
    """A sum and the weight to divide it by, kept separate so that parts of a batch add up exactly.

    The losses of one example are `WeightedSum`s. They are summed over the global batch and divided once, so that one
    device and eight devices give the same result.
    """

    total: Float32[Array, "*b"]
    count: Float32[Array, "*b"]

    def mean(self) -> Float32[Array, "*b"]:
        """`total / max(count, 1)`: 0 with a zero gradient where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


def _check_labels(targets: Targets, num_classes: int, examples: AnyArray | None, indices: AnyArray | None) -> None:
    arrays = [targets.labels, targets.valid, *(() if examples is None else (examples, indices))]
    if any(isinstance(array, Tracer) for array in arrays):
        return
    for start, labels in _parts(targets.labels):
        wrong = (labels < 0) | (labels >= num_classes)
        if not wrong.any():
            continue  # the usual case, in which no other array is fetched from the device
        wrong &= dict(_parts(targets.valid))[start]
        if examples is not None:
            wrong &= dict(_parts(examples))[start][..., None]
        for *image, row in np.argwhere(wrong).tolist():
            label = labels[(*image, row)]
            place = f"row {row} of its targets"
            if not image:
                raise ValueError(f"Labels must be in 0..{num_classes - 1}, but there is {label} in {place}.")
            name = ", ".join(str(axis + start * (position == 0)) for position, axis in enumerate(image))
            if indices is not None:
                name += f" of the batch (index {dict(_parts(indices))[start][tuple(image)]} of its dataset)"
            raise ValueError(f"Labels must be in 0..{num_classes - 1}, but image {name} has label {label} in {place}.")


def _parts(array: AnyArray) -> Generator[tuple[int, np.ndarray], None, None]:
    """The shards of an array that this process holds, each with the position of its first row."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        yield 0, np.asarray(array)
        return
    for shard in array.addressable_shards:
        yield (shard.index[0].start or 0) if shard.index else 0, np.asarray(shard.data)
