"""Sample positions of RoIAlign along one axis, and the weight of each pixel in the mean of a bin's samples.

Bilinear sampling is separable: the value of a bin is the sum of `row weight × column weight × pixel` over rows and
columns. All functions here therefore handle a single axis. A position is an index: the value of pixel `i` is at
position `i`, and values between pixels are interpolated. Positions between -1 and 0 read pixel 0, positions between
`size - 1` and `size` read the last pixel, and positions further out read 0. The arithmetic has the same order as
torchvision's, so that rounding puts the same samples inside these limits.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from .._xla import rounded_product, rounded_quotient


# Positions beyond this are far outside any map, and their products could overflow float32.
FARTHEST = 2.0**40


def output_bins(output_size: int | tuple[int, int], name: str = "output_size") -> tuple[int, int]:
    """Returns `(height, width)` of an output size given as a number or a pair."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if min(height, width) < 1:
        raise ValueError(f"{name} must be at least 1, got {output_size}.")
    return height, width


def check_sampling_ratio(sampling_ratio: int) -> None:
    """Raises a `ValueError` if `sampling_ratio` is negative. torchvision's -1 corresponds to 0 here."""
    if sampling_ratio < 0:
        raise ValueError(
            f"sampling_ratio must be positive, or 0 for ceil(box side / output) samples per bin, got {sampling_ratio}."
        )


def box_axis(
    low: Float[Array, " n"], high: Float[Array, " n"], scale: float | Float[Array, " n"], *, bins: int, aligned: bool
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Returns the start of each box along an axis, as a position, and the length of its bins.

    `aligned` subtracts half a pixel to turn a coordinate into an index: pixel `i` covers `[i, i + 1)`, and its value is
    at the centre, coordinate `i + 0.5`. Without it, boxes lie half a pixel too far down and right and are at least one
    pixel long. This is the original RoIAlign, with which many published weights were trained. Boxes that are not finite
    or too far away for float32 are moved far outside any map.
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
    """Returns the two pixels that each sample of a bin reads, and their weights in the bin's mean; `t = 2 * s`.

    `samples` are the samples to evaluate, in `0..sampling_ratio - 1`. `frame` = `(scale, shift)` maps positions to
    `scale * position + shift` in another grid. Samples outside the map have weight 0.
    """
    first = _bin_starts(start, length, bins)  # (n, bins, 1)
    # Sample i of a bin is at first + (i + 0.5) length / sampling_ratio.
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
    """Returns the weight of each pixel in a bin's mean of `ceil(length)` evenly spaced samples.

    The cost does not depend on the number of samples. The samples within one pixel of `pixel` form two runs: before the
    pixel the bilinear weight rises, after it the weight falls. On both it is linear in the index of the sample, so that
    its sum is an arithmetic series. A bin whose length is not positive has no samples, and its weights are 0.
    """
    first = _bin_starts(start, length, bins)  # (n, p, 1)
    length, size = length[:, None, None], size[:, None, None].astype(first.dtype)
    pixel = pixels.astype(first.dtype)
    has_samples = length > 0
    length = jnp.where(has_samples, length, 1)
    count = lax.stop_gradient(jnp.ceil(length))
    step = length / count if frame is None else length / count * frame[0][:, None, None]

    def position(index):
        return _to_frame(first + (index + 0.5) * length / count, frame)

    def before(limit):
        """The number of samples before a limit. At limits inside the map, a rounding error is harmless."""
        origin, unit = lax.stop_gradient((position(0.0), jnp.maximum(step, float(jnp.finfo(step.dtype).tiny))))
        return jnp.clip(jnp.ceil((limit - origin) / unit), 0, count)

    # At the limits -1 and size of the map, the weight jumps to 0: compare the positions of the samples themselves.
    begin, end = before(-1.0), before(size)
    begin = jnp.where((begin > 0) & (position(begin - 1) >= -1), begin - 1, begin)
    begin = jnp.where((begin < count) & (position(begin) < -1), begin + 1, begin)
    end = jnp.where((end < count) & (position(end) <= size), end + 1, end)
    end = jnp.where((end > 0) & (position(end - 1) > size), end - 1, end)

    # Samples a..b-1 lie between pixel - 1 and pixel, samples b..c-1 between pixel and pixel + 1.
    a, b, c = (jnp.clip(before(pixel + offset), begin, end) for offset in (-1, 0, 1))
    up, down = b - a, c - b
    # Σ (x - (pixel - 1)) over the rising run and Σ (pixel + 1 - x) over the falling run
    rising = up * (position(a) - (pixel - 1)) + step * up * (up - 1) / 2
    falling = down * (pixel + 1 - position(b)) - step * down * (down - 1) / 2
    rising = jnp.where(pixel == 0, b - begin, rising)
    falling = jnp.where(pixel == size - 1, end - b, falling)
    return jnp.where(has_samples & (pixel < size), (rising + falling) / count, 0)


def pixel_range(
    start: Float[Array, " n"], length: Float[Array, " n"], size: Int32[Array, " n"], *, bins: int
) -> tuple[Int32[Array, "n {bins} 1"], Int32[Array, "n {bins} 1"]]:
    """Returns the first and the last pixel that the samples of each bin can read."""
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
    """The pixels on either side of a position, the weight of the second, and whether the position is in range."""
    inside = (position >= -1) & (position <= size.astype(position.dtype))
    position = jnp.where(inside, position, 0)
    last = (size - 1).astype(position.dtype)
    within = (position > 0) & (position < last)
    low = jnp.clip(position, 0, last).astype(jnp.int32)
    fraction = jnp.where(within, position - jnp.floor(position), 0)
    return low, jnp.minimum(low + 1, size - 1), fraction, inside
