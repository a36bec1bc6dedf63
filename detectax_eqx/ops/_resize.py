"""Resizing of images by torchvision's rule, with static shapes."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from ._sampling import output_bins


def resized_size(
    image_size: tuple[int, int], *, min_size: float, max_size: float, canvas: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Returns the height and width to which an image is resized before detection.

    The short side becomes `min_size`, unless the long side would then exceed `max_size`. Sides are computed in double
    precision and rounded down, as in torchvision's `GeneralizedRCNNTransform`: a short side of 334 becomes 799, not
    800, since 334 * (800 / 334) is slightly less than 800. With `canvas`, an image that would not fit is shrunk
    further.

    This is Python arithmetic on the host: such cases depend on double precision, which float32 cannot reproduce.

    Raises a `ValueError` if a side is not positive.

    >>> resized_size((480, 640), min_size=800, max_size=1333)
    (800, 1066)
    >>> resized_size((334, 500), min_size=800, max_size=1333)
    (799, 1197)
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be positive, got {height}×{width}.")
    if min_size <= 0 or max_size <= 0:
        raise ValueError(f"min_size and max_size must be positive, got {min_size} and {max_size}.")
    scale = min(min_size / min(height, width), max_size / max(height, width))
    if canvas is not None:
        output_bins(canvas, "canvas")
        scale = min(scale, canvas[0] / height, canvas[1] / width)
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def resize_image(
    image: Float[Array, "h w c"],
    *,
    image_size: Int32[Array, " 2"],
    output_size: Int32[Array, " 2"],
    canvas: tuple[int, int],
    offset: Int32[Array, " 2"] | None = None,
    flip: Bool[Array, ""] | None = None,
) -> Float[Array, "{canvas[0]} {canvas[1]} c"]:
    """Resizes the top-left `image_size` part of `image` to `output_size` and places it on a canvas of static shape.

    Interpolation is bilinear, without antialiasing, with pixel centres at half integers, as in
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`. Both sizes may be traced. Canvas pixels
    outside the resized image are 0.

    - `image_size`, `output_size`: `(height, width)` in pixels.
    - `offset`: `(y, x)`, the pixel of the resized image at the origin of the canvas. Positive values crop the image,
      negative values leave a margin. Default 0.
    - `flip`: whether to mirror the resized image left to right before applying `offset`. Default false.

    Differentiable in `image`. The interpolation is separable, with two gathers per axis.

    Raises a `ValueError` for a canvas without pixels.

    >>> image = jnp.array([[0.0], [1.0]])[..., None]  # 2×1 pixels, one channel
    >>> size, output = jnp.array([2, 1]), jnp.array([4, 1])
    >>> resize_image(image, image_size=size, output_size=output, canvas=(4, 1))[:, 0, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    output_bins(canvas, "canvas")
    rows, row_inside = _axis_taps(canvas[0], image_size[0], output_size[0], None if offset is None else offset[0], None)
    columns, column_inside = _axis_taps(
        canvas[1], image_size[1], output_size[1], None if offset is None else offset[1], flip
    )
    low, high, fraction = rows
    fraction = fraction.astype(image.dtype)[:, None, None]
    image = image[low] * (1 - fraction) + image[high] * fraction  # (H, w, c)
    low, high, fraction = columns
    fraction = fraction.astype(image.dtype)[None, :, None]
    image = image[:, low] * (1 - fraction) + image[:, high] * fraction  # (H, W, c)
    inside = row_inside[:, None, None] & column_inside[None, :, None]
    return jnp.where(inside, image, jnp.zeros((), image.dtype))


def _axis_taps(
    canvas: int,
    image_size: Int32[Array, ""],
    output_size: Int32[Array, ""],
    offset: Int32[Array, ""] | None,
    flip: Bool[Array, ""] | None,
) -> tuple[
    tuple[Int32[Array, " {canvas}"], Int32[Array, " {canvas}"], Float32[Array, " {canvas}"]],
    Bool[Array, " {canvas}"],
]:
    """For each canvas pixel along an axis: two source pixels, the weight of the second, and whether it is covered."""
    position = jnp.arange(canvas, dtype=jnp.int32)
    if offset is not None:
        position = position + offset
    inside = (position >= 0) & (position < output_size)
    if flip is not None:
        position = jnp.where(flip, output_size - 1 - position, position)
    scale = image_size.astype(jnp.float32) / output_size.astype(jnp.float32)
    source = jnp.maximum((position.astype(jnp.float32) + 0.5) * scale - 0.5, 0.0)  # pixel centres at half integers
    last = image_size - 1
    low = jnp.minimum(source.astype(jnp.int32), last)
    return (low, jnp.minimum(low + 1, last), source - low.astype(jnp.float32)), inside
