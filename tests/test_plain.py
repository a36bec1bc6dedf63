"""The tricks in `_xla` give the results of plain operations, all of them together and each on its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import _xla, nn, train
from detectax_eqx._xla import _plain, _undivided

from . import plain_results


pytestmark = pytest.mark.timeout(900)  # the first test waits for another process


def assert_same(results, expected):
    assert set(results) == set(expected)
    for name, b in expected.items():
        a = results[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if np.issubdtype(b.dtype, np.floating):
            scale = np.abs(b).max(initial=0)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The results of a process with every trick turned off."""
    file = tmp_path_factory.mktemp("plain") / "results.npz"
    command = [sys.executable, "-m", "tests.plain_results", str(file)]
    environment = os.environ | {"DETECTAX_PLAIN": "1"}
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
    return dict(np.load(file))


@pytest.mark.parametrize("case", plain_results.OPERATORS + plain_results.DETECTORS, ids=lambda case: case.__name__)
def test_plain_operations_give_the_same(plain, case):
    expected = {name: array for name, array in plain.items() if name.startswith(f"{case.__name__}_")}
    results = plain_results.results(case)
    assert len(results) >= 2
    assert_same(results, expected)
    # More than half of the results are not all zero, so that the comparison means something.
    assert sum(array.any() for array in results.values()) > len(results) / 2


def chunks():
    x, weight = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((11, 3), (3, 2)))

    def run(x, weight):
        def apply(x, weight):
            return _xla.map_chunks(lambda x: jnp.tanh(x @ weight), [x], jnp.array(5), chunk_size=3)

        return plain_results.with_gradients(apply)(x, weight)

    return run, x, weight


OF_TRICK = {
    "by_example": plain_results.attending,
    "chunks": chunks,
    "convolution": plain_results.convolutions,
    "depthwise": plain_results.depthwise,
    "max_pool": plain_results.max_pooling,
    "platforms": plain_results.suppression,
    "pooling": plain_results.pooling,
    "rematerialisation": plain_results.checkpointed,
    "stripes": plain_results.pasting,
    "undivided": plain_results.convolutions,
    "unvmap": plain_results.suppression,
    "winograd": plain_results.convolutions,
}


@pytest.mark.parametrize("trick", OF_TRICK)
def test_each_trick_on_its_own(trick):
    def program_and_results():
        run, *args = OF_TRICK[trick]()
        return jax.jit(run).lower(*args).as_text(), plain_results.results(OF_TRICK[trick])

    program, expected = program_and_results()
    with _xla.plain_operations([trick]):
        other, results = program_and_results()
    assert program != other, "the switch changes nothing"
    assert_same(results, expected)


@pytest.mark.parametrize("batched", [False, True])
def test_a_unit_takes_any_first_array(batched):
    def select(mask, x):
        return _undivided.undivided(lambda mask, x: jnp.where(mask, x, -x), mask, x)

    mask, x = jnp.array([[True, False], [False, False]]), jnp.array([[1.0, 2.0], [jnp.nan, 4.0]])
    result = jax.vmap(select)(mask, x) if batched else select(mask, x)
    np.testing.assert_array_equal(result, [[1, -2], [jnp.nan, -4]])


def test_compiler_options(monkeypatch):
    assert train.step_compiler_options()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_matmul_precision("highest"):
        assert nn.convolution_options()
        with _xla.plain_operations(["options"]):
            assert nn.convolution_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with _xla.plain_operations(["options"]):
        assert train.step_compiler_options() == {}


def test_every_trick_has_a_switch_and_a_test():
    assert {*OF_TRICK, "options"} == set(get_args(_plain.Trick))


def test_values_of_the_variable():
    tricks = set(get_args(_plain.Trick))
    assert _plain.parse("1") == tricks
    assert _plain.parse("") == _plain.parse("0") == frozenset()
    assert _plain.parse("winograd,pooling") == {"winograd", "pooling"}
    with pytest.raises(ValueError, match=r"DETECTAX_PLAIN names 'winograds'; it takes 1, or any of by_example, "):
        _plain.parse("pooling,winograds")


def test_plain_programs_hold_no_trick():
    """One convolution per kernel and direction, and no conditionals or loops around it."""
    x, weight = jr.normal(jr.key(0), (2, 256, 9, 8)), jnp.ones((256, 256, 3, 3))

    def total(x, weight):
        return jax.vmap(lambda x: nn.conv2d(x, weight, padding=1))(x).sum()

    with _xla.plain_operations():
        text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, weight).as_text()
    assert text.count("stablehlo.convolution") == 2
    assert not any(f"stablehlo.{name}" in text for name in ("while", "case", "if"))
