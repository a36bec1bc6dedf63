"""Gradient checkpointing (arXiv:1604.06174) that XLA does not undo."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ._plain import by_platform, is_plain
from ._undivided import undivided


def rematerialise(block: Callable[..., Any], x: Float[Array, "*i"]) -> Float[Array, "*o"]:
    """Computes `block(x)`, and recomputes its intermediate values in the backward pass.

    XLA's CPU compiler undoes `jax.checkpoint` alone: common-subexpression elimination merges both computations and
    keeps the results of the first. The recomputation therefore runs as one scheduling unit. The inner checkpoint delays
    it until its results are needed. The outer one prevents the operands of the unit's condition from being copied and
    saved.
    """
    arrays, static = eqx.partition(block, eqx.is_array)

    def run(arrays: PyTree, x: Array) -> Array:
        return eqx.combine(arrays, static)(x)

    if is_plain("rematerialisation"):
        return jax.checkpoint(run)(arrays, x)
    return jax.checkpoint(partial(undivided, jax.checkpoint(run)))(arrays, x)


def rematerialise_stem(stem: Callable[..., Any], x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
    """Applies `rematerialise` to a network's first block, on CPU only: on TPU it makes the program take more memory."""
    recomputed = partial(rematerialise, stem)
    return by_platform(x, cpu=recomputed, default=lambda x: stem(x), trick="rematerialisation")
