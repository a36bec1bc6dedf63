"""Attention that holds the logits of few heads at a time."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._by_example import MAX_VALUES, by_example, one_by_one


# Above this number of logits, heads are computed one after another also where memory is fast.
MAX_LOGITS = 2**25


def attend(
    attention: Callable[..., Array],
    q: Float[Array, "g a n d"],
    k: Float[Array, "g a m d"],
    v: Float[Array, "g a m d"],
    biases: Sequence[Float[Array, "_ _ _ _ _"]],
) -> Float[Array, "g a n d"]:
    """Computes `attention(q, k, v, biases)`, which must be `softmax(q kᵀ + sum of biases) v`.

    - `biases`: arrays that broadcast to the logits as `(g, a, n, h, w)`, where `h w = m`.
    """
    default = _by_heads_if_large(attention)
    return by_example(q, k, v, *biases, cpu=_quotients, default=default, values=_num_logits(q, k))


def _num_logits(q, k):
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]  # g a n m


def _quotients(*arrays):
    """Attention in few values: one head after another if there are many logits."""
    if _num_logits(*arrays[:2]) <= MAX_VALUES:
        return _quotient(arrays)
    return one_by_one(jax.checkpoint(_quotient), arrays, axis=1)


def _quotient(arrays):
    """Attention as a quotient of two sums over the keys: the gradient of the logits then needs none."""
    q, k, v, *biases = arrays
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("gand,gamd->ganm", q, k).astype(dtype)
    if biases:
        height, width = (max(bias.shape[axis] for bias in biases) for axis in (3, 4))
        separate = logits.reshape(*logits.shape[:3], height, width)
        logits = sum((bias.astype(dtype) for bias in biases), separate).reshape(logits.shape)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = jnp.einsum("ganm,gamd->gand", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (total / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


@cache
def _by_heads_if_large(attention):
    """The attention itself, or one head after another if there are very many logits."""

    def run(arrays):
        q, k, v, *biases = arrays
        return attention(q, k, v, tuple(biases))

    def default(*arrays):
        large = _num_logits(*arrays[:2]) > MAX_LOGITS
        return one_by_one(jax.checkpoint(run), arrays, axis=1) if large else run(arrays)

    return default
