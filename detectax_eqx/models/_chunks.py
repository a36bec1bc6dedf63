"""Work on the first rows of arrays that are padded to a capacity."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Real

from ..ops._batching import largest_of_batch
from ..ops._substitute import replaceable


@replaceable
def map_chunks(
    function: Callable[..., Array],
    rows: Sequence[Real[Array, "n ..."] | Bool[Array, "n ..."]],
    count: Int[Array, ""],
    *,
    chunk_size: int,
) -> Real[Array, "n ..."] | Bool[Array, "n ..."]:
    """`function(*rows)`, computed `chunk_size` rows at a time and only for chunks that hold one of the first `count`.

    For work on rows of which only the first few are valid: a static program then costs what there is to do. `function`
    takes arrays whose first axis is the rows and gives one, each row on its own. Rows of a chunk that is left out are
    0. Under `vmap` a chunk is computed if any example of the batch needs it. Differentiable, in what `function` closes
    over too.

    >>> map_chunks(lambda x: x + 1, [jnp.arange(5)], jnp.array(3), chunk_size=2).tolist()
    [1, 2, 3, 4, 0]
    """
    n = rows[0].shape[0]

    def something(*rows):  # a module is a function that a condition cannot hash
        return function(*rows)

    def nothing(*rows):
        return jnp.zeros_like(jax.eval_shape(something, *rows))

    if n == 0:
        return nothing(*rows)
    steps = -(-n // chunk_size)
    limit = largest_of_batch(count)

    def chunked(x):
        return jnp.pad(x, [(0, steps * chunk_size - n)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk_size, *x.shape[1:])

    def step(start, chunk):
        return start + chunk_size, lax.cond(start < limit, something, nothing, *chunk)

    _, results = lax.scan(step, jnp.zeros((), limit.dtype), [chunked(x) for x in rows])
    return results.reshape(-1, *results.shape[2:])[:n]
