"""The kernel of RoIAlign: weighted sums of map cells, one for each bin of each box.

Maps are laid channels last and end to end, so that a box can read any of them by an offset and a bin's sum is over
whole rows of channels. Differentiable in the maps and in the boxes, in reverse mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int32

from ._batching import largest_of_batch
from ._sampling import pixel_range, pixel_weights, sample_taps
from ._undivided import undivided


# Pixels of a bin and axis that one step of the adaptive loop adds up. Most boxes on the level that suits them need one.
PIXELS_A_STEP = 4


def _pool_boxes(
    bins: tuple[int, int],
    sampling_ratio: int,
    cells: Float[Array, "l c"],
    grids: Float[Array, "n 4"],
    maps: Int32[Array, "n 3"],
) -> Float[Array, "n {bins[0]} {bins[1]} c"]:
    """Means of bilinear samples, for each of `bins` = `(rows, columns)` bins of each box.

    - `cells`: the cells of all maps, row by row, map after map.
    - `grids`: `(y, bin height, x, bin width)` of each box, in cells of its map, see `box_axis`.
    - `maps`: `(height, width, first cell)` of the map that each box reads.

    All at once, but on a CPU box by box where the sum takes several steps: that keeps it in the cache.
    """
    at_once = partial(_pool, bins, sampling_ratio)

    def accelerator(cells, grids, maps):
        return _channels_last(at_once(_channels_last(cells), grids, maps))

    def cpu(cells, grids, maps):
        if sampling_ratio == _samples_a_step(sampling_ratio):
            # Undivided: XLA would else sum in the order of what becomes of it, channels first, in over twice the time.
            return undivided(at_once, cells, grids, maps)
        return lax.map(lambda box: at_once(cells, *_single(box))[0], (grids, maps))

    return lax.platform_dependent(cells, grids, maps, cpu=cpu, default=accelerator)


pool = jax.custom_vjp(_pool_boxes, nondiff_argnums=(0, 1))


def _pool_forward(bins, sampling_ratio, cells, grids, maps):
    # Training takes its boxes as they are, and what nothing asks for is not even traced. Residuals are arrays, so that
    # it is their structure that tells.
    grids_wanted = () if grids.perturbed else None
    arrays = cells.value, grids.value, maps.value
    return _pool_boxes(bins, sampling_ratio, *arrays), (*arrays, grids_wanted)


def _pool_backward(bins, sampling_ratio, residuals, cotangent):
    """Cotangents of cells and, where wanted, of grids."""
    cells, grids, maps, grids_wanted = residuals

    def all_cells(grids, maps, cotangent):
        into = _channels_last(jnp.zeros_like(cells))
        return _scatter(bins, sampling_ratio, into, grids, maps, _channels_last(cotangent))

    def cells_one_by_one(grids, maps, cotangent):
        # A 1 that XLA does not know. Otherwise it would bring the cotangent into order in two steps, with a copy of it
        # between, and take the zeros for others of that shape, which it would then keep.
        one = jnp.where(cotangent[0, 0, 0, 0] > jnp.inf, 0, 1).astype(cotangent.dtype)
        boxes = (grids, maps, cotangent * one)

        def add(i, into):
            # Sliced where they are: what a scan goes over, `vmap` would first copy, a box of all examples side by side.
            box = (lax.dynamic_slice_in_dim(x, i, 1) for x in boxes)
            return _scatter(bins, sampling_ratio, into, *box)

        return lax.fori_loop(0, len(grids), add, jnp.full_like(cells, 1 - one))

    def all_grids(cells, grids, maps, cotangent):
        return _grid_cotangent(bins, sampling_ratio, cells, grids, maps, cotangent)

    def grids_one_by_one(cells, *boxes):
        return lax.map(lambda box: all_grids(cells, *_single(box))[0], boxes)

    boxes = (grids, maps, cotangent)
    by_cells = lax.platform_dependent(*boxes, cpu=cells_one_by_one, default=all_cells)
    by_grids = None
    if grids_wanted is not None:
        by_grids = lax.platform_dependent(cells, *boxes, cpu=grids_one_by_one, default=all_grids)
    return by_cells, by_grids, None


pool.defvjp(_pool_forward, _pool_backward, symbolic_zeros=True)


def _channels_last(x):
    """`x`, laid out in memory as its axes are.

    A compiler would rather read and write channels that lie apart, as in a map, than transpose: a GPU then takes
    several times as long. The barrier keeps it from transposing each term of a sum instead of the sum.
    """
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def _single(box):
    return jax.tree.map(lambda x: x[None], box)


def _pool(bins, sampling_ratio, cells, grids, maps):
    def add(step, out):
        rows, row_weights, columns, column_weights = _taps(bins, sampling_ratio, step, grids, maps)
        # A sum of gathers, one for each pair of taps, compiles to a single loop that never holds what it gathers.
        for i in range(rows.shape[2]):
            for j in range(columns.shape[2]):
                weight = row_weights[:, :, None, i] * column_weights[:, None, :, j]
                cell = rows[:, :, None, i] + columns[:, None, :, j]
                out = out + weight[..., None] * _gather(cells, cell)
        return out

    out = jnp.zeros((grids.shape[0], *bins, cells.shape[1]), cells.dtype)
    return _accumulate(add, out, _steps(bins, sampling_ratio, grids, maps))


def _scatter(bins, sampling_ratio, into, grids, maps, cotangent):
    def add(step, into):
        rows, row_weights, columns, column_weights = _taps(bins, sampling_ratio, step, grids, maps)
        cell = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (n, p, q, i, j)
        weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        update = weight[..., None] * cotangent[:, :, :, None, None]
        flat = update.reshape(-1, update.shape[-1])
        return into.at[cell.reshape(-1)].add(flat, mode="promise_in_bounds")

    return _accumulate(add, into, _steps(bins, sampling_ratio, grids, maps))


def _grid_cotangent(bins, sampling_ratio, cells, grids, maps, cotangent):
    def add(step, total):
        def weights(grids):
            _, row_weights, _, column_weights = _taps(bins, sampling_ratio, step, grids, maps)
            return row_weights, column_weights

        rows, _, columns, _ = _taps(bins, sampling_ratio, step, grids, maps)
        (row_weights, column_weights), pull = jax.vjp(weights, grids)
        cell = rows[:, :, None, :, None] + columns[:, None, :, None, :]
        products = jnp.einsum("npqijc,npqc->npqij", _gather(cells, cell), cotangent, precision="highest")
        products = lax.optimization_barrier(products)  # or both sums below would compute them anew
        row_cotangent = (products * column_weights[:, None, :, None, :]).sum(axis=(2, 4))
        column_cotangent = (products * row_weights[:, :, None, :, None]).sum(axis=(1, 3))
        return total + pull((row_cotangent, column_cotangent))[0]

    return _accumulate(add, jnp.zeros_like(grids), _steps(bins, sampling_ratio, grids, maps))


def _gather(cells, index):
    return cells.at[index].get(mode="promise_in_bounds")


def _taps(bins, sampling_ratio, step, grids, maps):
    """Cells and weights that a step of the sum adds, rows `(n, p, t)` and columns `(n, q, t)`.

    The cell of a row and a column is the sum of both. A fixed number of samples is taken as they are, two taps each; an
    adaptive one pixel by pixel, since its samples are many and share pixels.
    """
    axes = []
    for axis in range(2):
        start, length, size = grids[:, 2 * axis], grids[:, 2 * axis + 1], maps[:, axis]
        if sampling_ratio:
            count = _samples_a_step(sampling_ratio)
            samples = (jnp.arange(count, dtype=jnp.int32) + step[axis] * count).astype(start.dtype)
            index, weight = sample_taps(start, length, size, samples, bins=bins[axis], sampling_ratio=sampling_ratio)
        else:
            first, _ = pixel_range(start, length, size, bins=bins[axis])
            index = first + jnp.arange(PIXELS_A_STEP, dtype=jnp.int32)[None, None, :] + step[axis] * PIXELS_A_STEP
            weight = pixel_weights(start, length, size, index, bins=bins[axis])
            index = jnp.minimum(index, size[:, None, None] - 1)
        axes.append((index, weight))
    (rows, row_weights), (columns, column_weights) = axes
    return maps[:, 2, None, None] + rows * maps[:, 1, None, None], row_weights, columns, column_weights


def _samples_a_step(sampling_ratio):
    return 2 if sampling_ratio % 2 == 0 else 1


def _steps(bins, sampling_ratio, grids, maps):
    """How many steps the sum takes along rows and columns."""
    if sampling_ratio:
        return (sampling_ratio // _samples_a_step(sampling_ratio),) * 2
    counts = []
    for axis in range(2):
        first, last = pixel_range(grids[:, 2 * axis], grids[:, 2 * axis + 1], maps[:, axis], bins=bins[axis])
        counts.append(largest_of_batch((last - first).max() // PIXELS_A_STEP + 1))
    return tuple(counts)


def _accumulate(add: Callable[[tuple[Any, Any], Any], Any], total: Any, steps: tuple[Any, Any]) -> Any:
    """`total` after `add((row step, column step), total)` for every pair of steps."""
    rows, columns = steps
    if isinstance(rows, int) and rows == columns == 1:
        return add((0, 0), total)
    return lax.fori_loop(0, rows * columns, lambda k, total: add((k // columns, k % columns), total), total)
