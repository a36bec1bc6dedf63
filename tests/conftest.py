"""Tests run with strict promotion, on two host devices, warnings being errors (pyproject.toml)."""

import os


os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import jax
import jax.random as jr
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that gives a fresh key at each call, the same ones in every run of a test."""
    state = {"key": jr.key(0)}

    def fresh():
        state["key"], key = jr.split(state["key"])
        return key

    return fresh
