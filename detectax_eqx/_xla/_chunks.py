"""Computation on the valid first rows of arrays that are padded to a capacity."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Real

from ._plain import is_plain
from ._unvmap import unvmap_max


def map_chunks(
    function: Callable[..., Array],
    rows: Sequence[Real[Array, "n ..."] | Bool[Array, "n ..."]],
    count: Int[Array, ""],
    *,
    chunk_size: int,
    kept: int = 1,
) -> Real[Array, "n ..."] | Bool[Array, "n ..."]:
    """Computes `function(*rows)` in chunks of `chunk_size` rows, skipping chunks without one of the first `count` rows.

    For arrays of which only the first few rows are valid: the cost then depends on the number of valid rows, although
    shapes are static. `function` maps arrays with rows on their first axis to one such array, and treats each row
    independently. Rows of skipped chunks are 0. Under `vmap`, a chunk is computed if any example of the batch needs it.

    Differentiable, also with respect to arrays that `function` closes over. The first `kept` chunks save their
    residuals for the backward pass. The others recompute them, since saved residuals take memory even if a chunk is
    skipped.

    >>> map_chunks(lambda x: x + 1, [jnp.arange(5)], jnp.array(3), chunk_size=2).tolist()
    [1, 2, 3, 4, 0]
    """
    n = rows[0].shape[0]
    limit = unvmap_max(count)
    if is_plain("chunks"):
        return _all_rows(function, rows, limit, chunk_size)

    def when(needed, work, rows):
        def zeros(*rows):
            return jnp.zeros_like(jax.eval_shape(work, *rows))

        return lax.cond(needed, work, zeros, *rows) if rows[0].shape[0] else zeros(*rows)

    @jax.jit  # traced once for all chunks
    def run_chunk(*rows):
        return function(*rows)

    def run_chunks(start, wrap, *rows):
        total = rows[0].shape[0]
        steps = -(-total // chunk_size)
        starts = start + jnp.arange(steps, dtype=limit.dtype) * chunk_size

        def chunked(x):
            padded = jnp.pad(x, [(0, steps * chunk_size - total)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(-1, chunk_size, *x.shape[1:])  # (steps, chunk_size, ...)

        def step(chunk):
            start, *rows = chunk
            return when(start < limit, run_chunk, rows)

        results = lax.map(wrap(step), (starts, *map(chunked, rows)))
        return results.reshape(-1, *results.shape[2:])[:total]

    # Without a policy, JAX saves all residuals of a condition and copies its operands. This one saves all but the
    # operands.
    save_residuals = partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable)
    num_saved = min(kept * chunk_size, n)
    first = run_chunks(0, save_residuals, *(x[:num_saved] for x in rows))
    rest = jax.checkpoint(lambda *rows: when(num_saved < limit, partial(run_chunks, num_saved, jax.checkpoint), rows))
    return jnp.concatenate([first, rest(*(x[num_saved:] for x in rows))])


def _all_rows(function, rows, limit, chunk_size):
    results = function(*rows)
    computed = jnp.arange(results.shape[0], dtype=limit.dtype) < -(-limit // chunk_size) * chunk_size
    return jnp.where(computed.reshape(-1, *[1] * (results.ndim - 1)), results, jnp.zeros((), results.dtype))
