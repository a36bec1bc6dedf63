"""Runs our detectors in double precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping

from detectax_eqx.models import AbstractDetector


@contextmanager
def double_precision() -> Iterator[None]:
    """Makes what is traced inside compute in float64.

    With x64 alone, a detector converts what its heads return to float32, as its users expect. Here these conversions
    give float64, so that nothing between image and detections is rounded to single precision. Annotations still say
    float32, and are not checked.
    """
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        mock.patch.object(jnp, "float32", jnp.float64),
        mock.patch.object(jaxtyping.config, "jaxtyping_disable", True),
    ):
        yield


def in_double(model: AbstractDetector) -> AbstractDetector:
    """The model with every array in float64; call it inside `double_precision`."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: jnp.asarray(x, "float64"), arrays), static)
