"""The cells of a feature map that each bin of RoIAlign reads, and their weights."""

from dataclasses import dataclass

import jax.numpy as jnp

from .._xla import unvmap_max
from ._sampling import pixel_range, pixel_weights, sample_taps


# Pixels per bin and axis that one step of the adaptive sum adds. Most boxes need one step on their level.
PIXELS_PER_STEP = 4


@dataclass(frozen=True)
class BilinearTaps:
    """Implements `_xla.Taps` for means of `sampling_ratio**2` bilinear samples per bin; 0 is adaptive.

    A fixed number of samples is added one or two samples per axis and step, with two taps each. An adaptive number is
    added pixel by pixel, since there are many samples and they share pixels.
    """

    bins: tuple[int, int]
    sampling_ratio: int

    @property
    def single_step(self):
        return self.sampling_ratio == self._samples_per_step

    @property
    def _samples_per_step(self):
        return 2 if self.sampling_ratio % 2 == 0 else 1

    def steps(self, grids, maps):
        if self.sampling_ratio:
            return (self.sampling_ratio // self._samples_per_step,) * 2
        counts = []
        for axis in range(2):
            first, last = pixel_range(grids[:, 2 * axis], grids[:, 2 * axis + 1], maps[:, axis], bins=self.bins[axis])
            counts.append(unvmap_max((last - first).max() // PIXELS_PER_STEP + 1))
        return tuple(counts)

    def __call__(self, step, grids, maps):
        axes = []
        for axis in range(2):
            start, length, size = grids[:, 2 * axis], grids[:, 2 * axis + 1], maps[:, axis]
            bins = self.bins[axis]
            if self.sampling_ratio:
                count = self._samples_per_step
                samples = (jnp.arange(count, dtype=jnp.int32) + step[axis] * count).astype(start.dtype)
                ratio = self.sampling_ratio
                index, weight = sample_taps(start, length, size, samples, bins=bins, sampling_ratio=ratio)
            else:
                first, _ = pixel_range(start, length, size, bins=bins)  # (n, p, 1)
                index = first + jnp.arange(PIXELS_PER_STEP, dtype=jnp.int32)[None, None, :]
                index = index + step[axis] * PIXELS_PER_STEP  # (n, p, t)
                weight = pixel_weights(start, length, size, index, bins=bins)
                index = jnp.minimum(index, size[:, None, None] - 1)  # pixels beyond the map have weight 0
            axes.append((index, weight))
        (rows, row_weights), (columns, column_weights) = axes
        # A row is given by the position of its first cell: first cell of the map + row * width of the map.
        return maps[:, 2, None, None] + rows * maps[:, 1, None, None], row_weights, columns, column_weights
