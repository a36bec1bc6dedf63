"""Resizing of 8-bit images by Pillow's rule, with static shapes: bilinear, antialiased when shrinking."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt8

from .._xla import unvmap_max, varying_like
from ._sampling import output_bins


# Pillow's coefficients are integers in units of 2⁻²²: 32 bits, less 8 for a pixel and 2 for overshoot (`Resample.c`).
PRECISION_BITS = 22
# The digits of a coefficient are computed in steps of this many bits, one bit more than its precision to round it.
DIVISION_STEPS = (8, 8, 7)


class _Taps(NamedTuple):
    """The source pixels that each canvas pixel along an axis is a weighted mean of.

    A canvas pixel reads at most `num_taps` pixels from `first` on. With `n` source pixels and `m` pixels after the
    resize, the canvas pixel `i` of the resized image lies at `(i + ½) n / m` in the source. In units of `1 / 2m`, its
    position is `center` = `(2 i + 1) n`, and that of source pixel `x` is `(2 x + 1) m`. The triangle has the
    half-width `reach` = `2 max(n, m)`: one source pixel when enlarging, one resized pixel when shrinking.
    """

    size: Int32[Array, ""]
    resized_size: Int32[Array, ""]
    reach: Int32[Array, ""]
    center: Int32[Array, " c"]
    first: Int32[Array, " c"]
    inside: Bool[Array, " c"]
    num_taps: Int32[Array, ""]

    def weights(self, tap: Int32[Array, ""]) -> Int32[Array, " c"]:
        """The unnormalised weight of the pixel `first + tap`: the height of the triangle at its centre."""
        pixel = self.first + tap
        height = self.reach - jnp.abs((2 * pixel + 1) * self.resized_size - self.center)
        return jnp.where((height > 0) & (pixel < self.size), height, 0)


def resize_image_pillow(
    image: UInt8[Array, "h w c"],
    *,
    image_size: Int32[Array, " 2"],
    output_size: Int32[Array, " 2"],
    canvas: tuple[int, int],
    offset: Int32[Array, " 2"] | None = None,
    flip: Bool[Array, ""] | None = None,
) -> UInt8[Array, "{canvas[0]} {canvas[1]} c"]:
    """Resizes the top-left `image_size` part of `image` to `output_size` by the rule of Pillow's `Image.resize`.

    Interpolation is bilinear, `Image.BILINEAR`: a triangle filter that spans one source pixel to either side when
    enlarging, and one pixel of the result when shrinking, so that the result is antialiased. Columns are resized first,
    then rows, and each result is rounded to 8 bits. This is the resize of Detectron2. (From version 13 on, Pillow
    resizes rows first if that removes over twice as many rows as columns. Some pixels then differ by one.)

    Arguments are those of `resize_image`, but the image and the result are 8-bit. Both sizes may be traced.

    The filter's coefficients are the exact ratios, rounded to Pillow's 22 bits. Pillow computes them in double
    precision, which may round another way if a ratio lies almost exactly between two integers. Exact for sides whose
    product along an axis is below 2³⁰, unless an axis shrinks to fewer than `image side**2 / 2**23` pixels.

    Raises a `ValueError` for a canvas without pixels.

    >>> image = jnp.array([0, 40, 80, 120], jnp.uint8).reshape(1, 4, 1)
    >>> size, half, double = jnp.array([1, 4]), jnp.array([1, 2]), jnp.array([1, 8])
    >>> resize_image_pillow(image, image_size=size, output_size=half, canvas=(1, 2)).ravel().tolist()
    [29, 91]
    >>> resize_image_pillow(image, image_size=size, output_size=double, canvas=(1, 8)).ravel().tolist()
    [0, 10, 30, 50, 70, 90, 110, 120]
    """
    output_bins(canvas, "canvas")
    columns = _taps(canvas[1], image_size[1], output_size[1], None if offset is None else offset[1], flip)
    rows = _taps(canvas[0], image_size[0], output_size[0], None if offset is None else offset[0], None)
    image = _resample(image, columns, axis=1)  # (h, w, c) -> (h, W, c)
    image = _resample(image, rows, axis=0)  # (h, W, c) -> (H, W, c)
    inside = rows.inside[:, None, None] & columns.inside[None, :, None]
    return jnp.where(inside, image, jnp.zeros((), jnp.uint8))


def _taps(
    canvas: int,
    size: Int32[Array, ""],
    resized_size: Int32[Array, ""],
    offset: Int32[Array, ""] | None,
    flip: Bool[Array, ""] | None,
) -> _Taps:
    size, resized_size = jnp.maximum(size, 1), jnp.maximum(resized_size, 1)
    position = jnp.arange(canvas, dtype=jnp.int32)
    if offset is not None:
        position = position + offset
    inside = (position >= 0) & (position < resized_size)
    if flip is not None:
        position = jnp.where(flip, resized_size - 1 - position, position)
    reach = 2 * jnp.maximum(size, resized_size)
    center = (2 * jnp.clip(position, 0, resized_size - 1) + 1) * size
    # The first pixel with a weight: (2 x + 1) m > center - reach.
    first = jnp.maximum((center - reach - resized_size) // (2 * resized_size) + 1, 0)
    count = -(-reach // resized_size)  # the open interval of length 2 reach / 2m holds at most this many pixels
    return _Taps(size, resized_size, reach, center, first, inside, count)


def _resample(image: UInt8[Array, "h w c"], taps: _Taps, *, axis: int) -> UInt8[Array, "h2 w2 c"]:
    """Replaces an axis by the weighted means of its pixels, rounded to 8 bits."""
    count, start = unvmap_max(taps.num_taps), jnp.zeros((), jnp.int32)
    shape = [len(taps.first) if i == axis else side for i, side in enumerate(image.shape)]
    half = jnp.full(shape, 1 << (PRECISION_BITS - 1), jnp.int32)  # to round to nearest
    zeros, half = varying_like((jnp.zeros_like(taps.first), half), image, taps)

    def weights(tap: Int[Array, ""]) -> Int32[Array, " c"]:
        return taps.weights(jnp.asarray(tap, jnp.int32))  # without jit but with x64, loops count in int64

    total = lax.fori_loop(start, count, lambda tap, total: total + weights(tap), zeros)

    def add(tap: Int[Array, ""], sums: Int32[Array, "h2 w2 c"]) -> Int32[Array, "h2 w2 c"]:
        coefficients = _coefficients(weights(tap), total)
        index = jnp.minimum(taps.first + tap, image.shape[axis] - 1)  # beyond the last pixel, coefficients are 0
        pixels = jnp.take(image, index, axis=axis, mode="clip")
        return sums + pixels.astype(jnp.int32) * jnp.expand_dims(coefficients, (2, 1 - axis))

    sums = lax.fori_loop(start, count, add, half)
    return jnp.clip(sums >> PRECISION_BITS, 0, 255).astype(jnp.uint8)


def _coefficients(weights: Int32[Array, " c"], total: Int32[Array, " c"]) -> Int32[Array, " c"]:
    """`weights / total` in units of 2⁻²², rounded half up, by long division in 32 bits."""
    remainder, divisor = weights.astype(jnp.uint32), jnp.maximum(total, 1).astype(jnp.uint32)
    quotient = jnp.zeros_like(remainder)
    for bits in DIVISION_STEPS:
        shifted = remainder << bits
        quotient = (quotient << bits) + shifted // divisor
        remainder = shifted % divisor
    return ((quotient + 1) >> 1).astype(jnp.int32)
