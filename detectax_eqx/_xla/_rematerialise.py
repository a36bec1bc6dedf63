"""Gradient checkpointing (arXiv:1604.06174) that XLA does not undo."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ._plain import by_platform, is_plain
from ._undivided import undivided


def rematerialise(block: Callable[..., Any], x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
    """`block(x)`, whose backward pass recomputes the intermediate values that it needs.

    `jax.checkpoint` alone is undone by XLA's CPU compiler: common-subexpression elimination merges both computations
    and keeps the results of the first. So the recomputation runs as one scheduling unit. The inner checkpoint delays
    it until its results are needed; the outer one keeps the operands of the unit's condition from being copied and
    saved.
    """
    arrays, static = eqx.partition(block, eqx.is_array)

    def run(arrays: PyTree, x: Array) -> Array:
        return eqx.combine(arrays, static)(x)

    if is_plain("rematerialisation"):
        return jax.checkpoint(run)(arrays, x)
    return jax.checkpoint(partial(undivided, jax.checkpoint(run)))(arrays, x)


def rematerialise_stem(stem: Callable[..., Any], x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
    """`rematerialise` of a network's first block, on CPU alone: on TPU the program takes more memory with it."""
    recomputed = partial(rematerialise, stem)
    return by_platform(x, cpu=recomputed, default=lambda x: stem(x), trick="rematerialisation")
