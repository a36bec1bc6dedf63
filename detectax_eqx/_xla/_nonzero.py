"""Positions of the true elements of a mask."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from ._plain import is_plain


def first_true(mask: Bool[Array, " n"], size: int) -> tuple[Int32[Array, " {size}"], Int32[Array, ""]]:
    """Returns the positions of the first `size` true elements, and their number; positions beyond it are undefined.

    Replaces `jnp.nonzero`, whose scatter takes five times as long on CPU. The mask is packed into 32-bit words. A
    cumulative count of bits selects the word of each output, and five halvings of the word locate its bit.
    """
    if is_plain("nonzero"):
        positions = jnp.nonzero(mask, size=size, fill_value=0)[0].astype(jnp.int32)
        return positions, jnp.minimum(mask.sum(dtype=jnp.int32), size)
    bits = jnp.pad(mask, (0, -mask.size % 32)).reshape(-1, 32).astype(jnp.uint32)
    words = (bits << jnp.arange(32, dtype=jnp.uint32)[None]).sum(axis=1, dtype=jnp.uint32)
    ends = jnp.cumsum(_count_bits(words))
    outputs = jnp.arange(size, dtype=jnp.int32)
    index = jnp.searchsorted(ends, outputs, side="right", method="scan_unrolled").astype(jnp.int32)
    index = jnp.minimum(index, words.size - 1)
    word, position = words[index], index * 32
    rank = outputs - (ends[index] - _count_bits(word))  # of the output among the word's bits
    for half in (16, 8, 4, 2, 1):
        low = word & ((1 << half) - 1)
        upper = rank >= _count_bits(low)
        position = jnp.where(upper, position + half, position)
        rank = jnp.where(upper, rank - _count_bits(low), rank)
        word = jnp.where(upper, word >> half, low)
    return jnp.minimum(position, mask.size - 1), jnp.minimum(ends[-1], size)


def _count_bits(words):
    return lax.population_count(words).astype(jnp.int32)
