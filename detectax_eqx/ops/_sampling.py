"""Where RoIAlign samples an axis, and how much each pixel weighs in the mean of a bin's samples.

Bilinear sampling is separable: the value of a bin is a sum over rows and columns of `row weight × column weight ×
pixel`. So everything here is about one axis. A position is an index: the value of pixel `i` sits at position `i`, and
between two pixels values are interpolated. Positions between -1 and 0 read pixel 0, those between `size - 1` and
`size` the last pixel, and what lies further out reads 0. The order of the arithmetic is torchvision's, so that the
same samples fall on either side of those limits.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from .._xla import rounded_product, rounded_quotient


# Positions further out than this are far outside any map, and their products would overflow float32.
FARTHEST = 2.0**40


def output_bins(output_size: int | tuple[int, int], name: str = "output_size") -> tuple[int, int]:
    """`(height, width)` of an output given as a number or a pair."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if min(height, width) < 1:
        raise ValueError(f"{name} must be at least 1, got {output_size}.")
    return height, width


def check_sampling_ratio(sampling_ratio: int) -> None:
    """Refuses a negative number of samples. torchvision's -1 is 0 here."""
    if sampling_ratio < 0:
        raise ValueError(
            f"sampling_ratio must be positive, or 0 for ceil(box side / output) samples a bin, got {sampling_ratio}."
        )


def box_axis(
    low: Float[Array, " n"], high: Float[Array, " n"], scale: float | Float[Array, " n"], *, bins: int, aligned: bool
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Position at which each box starts along an axis, and the length of its bins.

    `aligned` subtracts the half pixel between a coordinate and an index: pixel `i` covers `[i, i + 1)` and its value
    sits in the middle, at coordinate `i + 0.5`. Without it, boxes lie half a pixel too far down and right, and are at
    least one pixel long: the original RoIAlign, to which many published weights were trained. Boxes that are not
    finite, or farther away than float32 serves, are moved far outside any map.
    """
    offset = 0.5 if aligned else 0.0
    start, end = rounded_product(low, scale) - offset, rounded_product(high, scale) - offset
    near = (jnp.abs(start) < FARTHEST) & (jnp.abs(end) < FARTHEST)  # false for NaN
    start, end = jnp.where(near, start, 4 * FARTHEST), jnp.where(near, end, 4 * FARTHEST)
    length = end - start
    if not aligned:
        length = jnp.where(length > 1, length, 1)
    return start, rounded_quotient(length, bins)


def sample_taps(
    start: Float[Array, " n"],
    length: Float[Array, " n"],
    size: Int32[Array, " n"],
    samples: Float[Array, " s"],
    *,
    bins: int,
    sampling_ratio: int,
    frame: tuple[Float[Array, " n"], Float[Array, " n"]] | None = None,
) -> tuple[Int32[Array, "n {bins} t"], Float[Array, "n {bins} t"]]:
    """The two pixels that each of a bin's samples reads and their weights in the mean, `t = 2 * s`.

    `samples` are those to consider out of `0..sampling_ratio - 1`. `frame` is the `(scale, shift)` that turns
    positions into those of another grid. A sample outside the map has weights of 0.
    """
    first = _bin_starts(start, length, bins)
    offset = rounded_quotient((samples[None, None, :] + 0.5) * length[:, None, None], sampling_ratio)
    position = _to_frame(first + offset, frame)  # (n, bins, s)
    low, high, fraction, inside = _bilinear(position, size[:, None, None])
    weight = jnp.where(inside, 1 / sampling_ratio, 0).astype(position.dtype)
    taps = jnp.concatenate([low, high], axis=2)  # (n, bins, 2 s)
    return taps, jnp.concatenate([weight * (1 - fraction), weight * fraction], axis=2)


def pixel_weights(
    start: Float[Array, " n"],
    length: Float[Array, " n"],
    size: Int32[Array, " n"],
    pixels: Int32[Array, "#n #p t"],
    *,
    bins: int,
    frame: tuple[Float[Array, " n"], Float[Array, " n"]] | None = None,
) -> Float[Array, "n {bins} t"]:
    """Weight of each pixel in a bin's mean of `ceil(length)` evenly spaced samples, at a cost independent of their
    number.

    The samples within one pixel of `pixel` form two runs, one on the way up to it and one on the way down. On both the
    bilinear weight is linear in the sample, so that its sum is an arithmetic series. A bin of negative length has no
    samples and weights of 0.
    """
    first = _bin_starts(start, length, bins)  # (n, p, 1)
    length, size = length[:, None, None], size[:, None, None].astype(first.dtype)
    pixel = pixels.astype(first.dtype)
    some = length > 0
    length = jnp.where(some, length, 1)
    count = lax.stop_gradient(jnp.ceil(length))
    step = length / count if frame is None else length / count * frame[0][:, None, None]

    def position(index):
        return _to_frame(first + (index + 0.5) * length / count, frame)

    def before(limit):
        """The number of samples before a limit. On the limits within the map, a rounding error costs nothing."""
        origin, unit = lax.stop_gradient((position(0.0), jnp.maximum(step, float(jnp.finfo(step.dtype).tiny))))
        return jnp.clip(jnp.ceil((limit - origin) / unit), 0, count)

    # The map's own limits decide between a value and 0: there the samples themselves are asked.
    begin, end = before(-1.0), before(size)
    begin = jnp.where((begin > 0) & (position(begin - 1) >= -1), begin - 1, begin)
    begin = jnp.where((begin < count) & (position(begin) < -1), begin + 1, begin)
    end = jnp.where((end < count) & (position(end) <= size), end + 1, end)
    end = jnp.where((end > 0) & (position(end - 1) > size), end - 1, end)

    a, b, c = (jnp.clip(before(pixel + offset), begin, end) for offset in (-1, 0, 1))
    up, down = b - a, c - b
    rising = up * (position(a) - (pixel - 1)) + step * up * (up - 1) / 2
    falling = down * (pixel + 1 - position(b)) - step * down * (down - 1) / 2
    rising = jnp.where(pixel == 0, b - begin, rising)
    falling = jnp.where(pixel == size - 1, end - b, falling)
    return jnp.where(some & (pixel < size), (rising + falling) / count, 0)


def pixel_range(
    start: Float[Array, " n"], length: Float[Array, " n"], size: Int32[Array, " n"], *, bins: int
) -> tuple[Int32[Array, "n {bins} 1"], Int32[Array, "n {bins} 1"]]:
    """The first and the last pixel that each bin's samples can read."""
    first, last = _bin_starts(start, length, bins), (size[:, None, None] - 1).astype(start.dtype)

    def pixel(position):
        return jnp.clip(position, 0, last).astype(jnp.int32)

    return pixel(first), pixel(first + length[:, None, None] + 1)


def _bin_starts(start, length, bins):
    index = jnp.arange(bins, dtype=start.dtype)[None, :, None]
    return start[:, None, None] + rounded_product(index, length[:, None, None])


def _to_frame(position, frame):
    if frame is None:
        return position
    scale, shift = frame
    return rounded_product(position, scale[:, None, None]) + shift[:, None, None]


def _bilinear(position, size) -> tuple[Array, Array, Array, Bool[Array, "..."]]:
    """The pixels on either side of a position, the weight of the second, and whether the position counts at all."""
    inside = (position >= -1) & (position <= size.astype(position.dtype))
    position = jnp.where(inside, position, 0)
    last = (size - 1).astype(position.dtype)
    within = (position > 0) & (position < last)
    low = jnp.clip(position, 0, last).astype(jnp.int32)
    fraction = jnp.where(within, position - jnp.floor(position), 0)
    return low, jnp.minimum(low + 1, size - 1), fraction, inside
