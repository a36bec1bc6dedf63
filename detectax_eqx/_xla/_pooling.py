"""The kernel of RoIAlign: weighted sums of map cells, one per bin of each box.

Maps are concatenated with channels last, so that a box can read any map by an offset and each term of a bin's sum is a
contiguous vector of channels. Differentiable in reverse mode with respect to the maps and the boxes. `Taps` specifies
which cells a bin reads, and with which weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int32

from ._plain import by_platform, is_plain
from ._undivided import undivided
from ._varying import varying_like


@runtime_checkable
class Taps(Protocol):
    """The cells that each bin of each box reads, and their weights. Static, and compared by value.

    - `bins`: number of bins of each box, `(rows, columns)`.
    - `single_step`: whether the sum of each bin takes a single step.
    """

    @property
    def bins(self) -> tuple[int, int]: ...

    @property
    def single_step(self) -> bool: ...

    def steps(self, grids: Float[Array, "n 4"], maps: Int32[Array, "n 3"]) -> tuple[Any, Any]:
        """Number of steps along rows and columns: integers, or scalar arrays if they depend on the boxes."""
        ...

    def __call__(
        self, step: tuple[Any, Any], grids: Float[Array, "n 4"], maps: Int32[Array, "n 3"]
    ) -> tuple[Int32[Array, "n p t"], Float[Array, "n p t"], Int32[Array, "n q u"], Float[Array, "n q u"]]:
        """Returns the rows, row weights, columns and column weights that `step` adds.

        The index of a cell is the sum of its row and its column.
        """
        ...


def _pool_boxes(
    taps: Taps, cells: Float[Array, "l c"], grids: Float[Array, "n 4"], maps: Int32[Array, "n 3"]
) -> Float[Array, "n {taps.bins[0]} {taps.bins[1]} c"]:
    """Computes a weighted sum of cells for each bin of each box.

    - `taps`: the cells and weights of each bin.
    - `cells`: the cells of all maps concatenated, each map in row-major order.
    - `grids`: `(y, bin height, x, bin width)` of each box, in cells of its map.
    - `maps`: `(height, width, first cell)` of the map that each box reads.

    All boxes are pooled at once, except that on CPU a sum of several steps runs box by box, so that it stays in cache.
    """
    pool_all = partial(_pool, taps)
    if is_plain("pooling"):
        return pool_all(cells, grids, maps)

    def accelerator(cells, grids, maps):
        return _channels_last(pool_all(_channels_last(cells), grids, maps))

    def cpu(cells, grids, maps):
        if taps.single_step:
            # Undivided: otherwise XLA sums in the layout of the sum's consumer, channels first, in over twice the time.
            return undivided(pool_all, cells, grids, maps)
        return lax.map(lambda box: pool_all(cells, *_single(box))[0], (grids, maps))

    return by_platform(cells, grids, maps, cpu=cpu, default=accelerator, trick="pooling")


pool = jax.custom_vjp(_pool_boxes, nondiff_argnums=(0,))


def _pool_forward(taps, cells, grids, maps):
    # The cotangent of the grids is traced only if requested, which training does not do. Residuals must be arrays, so
    # the flag is encoded in their tree structure.
    grids_perturbed = () if grids.perturbed else None
    arrays = cells.value, grids.value, maps.value
    return _pool_boxes(taps, *arrays), (*arrays, grids_perturbed)


def _pool_backward(taps, residuals, cotangent):
    """Returns the cotangents of cells and, if requested, of grids."""
    cells, grids, maps, grids_perturbed = residuals
    boxes = (grids, maps, cotangent)
    if is_plain("pooling"):
        by_grids = None if grids_perturbed is None else _grid_cotangent(taps, cells, *boxes)
        return _scatter(taps, jnp.zeros_like(cells), *boxes), by_grids, None

    def all_cells(grids, maps, cotangent):
        into = _channels_last(jnp.zeros_like(cells))
        return _scatter(taps, into, grids, maps, _channels_last(cotangent))

    def cells_one_by_one(grids, maps, cotangent):
        # A 1 that XLA cannot constant-fold. Otherwise it transposes the cotangent in two steps, with a copy in between,
        # and shares the zeros with other arrays of the same shape, which keeps them alive throughout.
        one = jnp.where(cotangent[0, 0, 0, 0] > jnp.inf, 0, 1).astype(cotangent.dtype)
        boxes = (grids, maps, cotangent * one)

        def add(i, into):
            # Sliced here: `vmap` would copy the operands of a scan, so that the examples of each box become adjacent.
            box = (lax.dynamic_slice_in_dim(x, i, 1) for x in boxes)
            return _scatter(taps, into, *box)

        return lax.fori_loop(0, len(grids), add, varying_like(jnp.full_like(cells, 1 - one), boxes))

    def all_grids(cells, grids, maps, cotangent):
        return _grid_cotangent(taps, cells, grids, maps, cotangent)

    def grids_one_by_one(cells, *boxes):
        return lax.map(lambda box: all_grids(cells, *_single(box))[0], boxes)

    by_cells = by_platform(*boxes, cpu=cells_one_by_one, default=all_cells, trick="pooling")
    by_grids = None
    if grids_perturbed is not None:
        by_grids = by_platform(cells, *boxes, cpu=grids_one_by_one, default=all_grids, trick="pooling")
    return by_cells, by_grids, None


pool.defvjp(_pool_forward, _pool_backward, symbolic_zeros=True)


def _channels_last(x):
    """Lays out `x` in memory in the order of its axes.

    XLA prefers strided access to the channels, as in a map, to a transpose. On a GPU, this takes several times as long.
    The barrier prevents XLA from transposing each term of a sum instead of the sum.
    """
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def _single(box):
    return jax.tree.map(lambda x: x[None], box)


def _pool(taps, cells, grids, maps):
    def add(step, out):
        rows, row_weights, columns, column_weights = taps(step, grids, maps)
        # A sum of gathers, one per pair of taps, compiles to a single loop that never stores the gathered cells.
        for i in range(rows.shape[2]):
            for j in range(columns.shape[2]):
                weight = row_weights[:, :, None, i] * column_weights[:, None, :, j]  # (n, p, q)
                cell = rows[:, :, None, i] + columns[:, None, :, j]  # (n, p, q)
                out = out + weight[..., None] * _gather(cells, cell)
        return out

    zeros = jnp.zeros((grids.shape[0], *taps.bins, cells.shape[1]), cells.dtype)  # (n, p, q, c)
    out = varying_like(zeros, cells, grids, maps)
    return _accumulate(add, out, taps.steps(grids, maps))


def _scatter(taps, into, grids, maps, cotangent):
    def add(step, into):
        rows, row_weights, columns, column_weights = taps(step, grids, maps)
        cell = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (n, p, q, i, j)
        weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        update = weight[..., None] * cotangent[:, :, :, None, None]  # (n, p, q, i, j, c)
        flat = update.reshape(-1, update.shape[-1])
        return into.at[cell.reshape(-1)].add(flat, mode="promise_in_bounds")

    into = varying_like(into, grids, maps, cotangent)
    return _accumulate(add, into, taps.steps(grids, maps))


def _grid_cotangent(taps, cells, grids, maps, cotangent):
    def add(step, total):
        def weights(grids):
            _, row_weights, _, column_weights = taps(step, grids, maps)
            return row_weights, column_weights

        rows, _, columns, _ = taps(step, grids, maps)
        (row_weights, column_weights), pull = jax.vjp(weights, grids)
        cell = rows[:, :, None, :, None] + columns[:, None, :, None, :]
        products = jnp.einsum("npqijc,npqc->npqij", _gather(cells, cell), cotangent, precision="highest")
        if not is_plain("pooling"):
            products = lax.optimization_barrier(products)  # otherwise both sums below recompute the products
        row_cotangent = (products * column_weights[:, None, :, None, :]).sum(axis=(2, 4))
        column_cotangent = (products * row_weights[:, :, None, :, None]).sum(axis=(1, 3))
        return total + pull((row_cotangent, column_cotangent))[0]

    zeros = varying_like(jnp.zeros_like(grids), cells, maps, cotangent)
    return _accumulate(add, zeros, taps.steps(grids, maps))


def _gather(cells, index):
    return cells.at[index].get(mode="promise_in_bounds")


def _accumulate(add: Callable[[tuple[Any, Any], Any], Any], total: Any, steps: tuple[Any, Any]) -> Any:
    """Applies `add((row step, column step), total)` for each pair of steps and returns the final `total`."""
    rows, columns = steps
    if isinstance(rows, int) and rows == columns == 1:
        return add((0, 0), total)
    return lax.fori_loop(0, rows * columns, lambda k, total: add((k // columns, k % columns), total), total)


def _lay_out(sides, maps) -> Float[Array, "l c"]:
    """Concatenates the cells of `maps`, channels last. `sides` holds `(height, width, first cell)` of each map."""
    return jnp.concatenate([x.reshape(x.shape[0], -1).T for x in maps])  # (c, h, w) -> (h w, c) of each


lay_out = jax.custom_vjp(_lay_out, nondiff_argnums=(0,))


def _lay_out_forward(sides, maps):
    return _lay_out(sides, maps), None


def _lay_out_backward(sides, residuals, cotangent):
    # Undivided: if the cotangents of several poolings are summed, XLA otherwise transposes each term of the sum.
    def split(cotangent):
        return tuple(cotangent[first : first + h * w].T.reshape(-1, h, w) for h, w, first in sides)

    return (undivided(split, cotangent),)


lay_out.defvjp(_lay_out_forward, _lay_out_backward)
