"""Work on the first rows of arrays that are padded to a capacity."""

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
    """`function(*rows)`, computed `chunk_size` rows at a time and only for chunks that hold one of the first `count`.

    For work on rows of which only the first few are valid: a static program then does as much as there is to do.
    `function` takes arrays whose first axis is the rows and returns one, each row on its own. Rows of a chunk that is
    left out are 0. Under `vmap` a chunk is computed if any example of the batch needs it. Differentiable, also in what
    `function` closes over. The first `kept` chunks save their residuals for the backward pass; the others, whose
    residuals would take memory whether they are needed or not, recompute them.

    >>> map_chunks(lambda x: x + 1, [jnp.arange(5)], jnp.array(3), chunk_size=2).tolist()
    [1, 2, 3, 4, 0]
    """
    n = rows[0].shape[0]
    limit = unvmap_max(count)
    if is_plain("chunks"):
        return _all_rows(function, rows, limit, chunk_size)

    def when(needed, work, rows):
        def nothing(*rows):
            return jnp.zeros_like(jax.eval_shape(work, *rows))

        return lax.cond(needed, work, nothing, *rows) if rows[0].shape[0] else nothing(*rows)

    @jax.jit  # traced once for all chunks
    def something(*rows):
        return function(*rows)

    def in_turn(start, wrap, *rows):
        total = rows[0].shape[0]
        steps = -(-total // chunk_size)
        starts = start + jnp.arange(steps, dtype=limit.dtype) * chunk_size

        def chunked(x):
            padded = jnp.pad(x, [(0, steps * chunk_size - total)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(-1, chunk_size, *x.shape[1:])

        def step(chunk):
            start, *rows = chunk
            return when(start < limit, something, rows)

        results = lax.map(wrap(step), (starts, *map(chunked, rows)))
        return results.reshape(-1, *results.shape[2:])[:total]

    # Without a policy, JAX saves all residuals of a condition and copies its operands.
    remembering = partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable)  # all but the operands
    start_of_rest = min(kept * chunk_size, n)
    first = in_turn(0, remembering, *(x[:start_of_rest] for x in rows))
    rest = jax.checkpoint(
        lambda *rows: when(start_of_rest < limit, partial(in_turn, start_of_rest, jax.checkpoint), rows)
    )
    return jnp.concatenate([first, rest(*(x[start_of_rest:] for x in rows))])


def _all_rows(function, rows, limit, chunk_size):
    results = function(*rows)
    computed = jnp.arange(results.shape[0], dtype=limit.dtype) < -(-limit // chunk_size) * chunk_size
    return jnp.where(computed.reshape(-1, *[1] * (results.ndim - 1)), results, jnp.zeros((), results.dtype))
