"""Models to safetensors files and back."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file

from detectax_eqx.weights import (
    WeightsError,
    load_safetensors,
    named_leaves,
    read_safetensors,
    save_safetensors,
)


DTYPES = ["float32", "float16", "bfloat16", "int32", "int8", "uint8", "uint16", "uint32", "bool", "complex64"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_round_trip_of_a_model(path, getkey):
    model, other = (eqx.nn.MLP(2, 3, 4, 1, key=getkey()) for _ in range(2))
    save_safetensors(model, path, metadata={"categories": "[1, 3]"})
    loaded = load_safetensors(other, path)
    assert eqx.tree_equal(loaded, model) and not eqx.tree_equal(loaded, other)
    shapes = eqx.filter_eval_shape(lambda: other)
    assert eqx.tree_equal(load_safetensors(shapes, path), model)
    with pytest.raises(ValueError, match=r"layers\.0\.weight is a shape without values"):
        save_safetensors(shapes, path)
    arrays, metadata = read_safetensors(path)
    assert metadata == {"categories": "[1, 3]"} and set(arrays) == set(named_leaves(model))
    assert os.listdir(path.parent) == [path.name]
    # Other programs can read it as well.
    np.testing.assert_array_equal(load_file(path)["layers.0.weight"], model.layers[0].weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, path):
    tree = {"a": jnp.array([0, 1, 3], dtype), "scalar": jnp.array(1, dtype), "empty": jnp.zeros((0, 2), dtype)}
    save_safetensors(tree, path)
    loaded = load_safetensors(jax.tree.map(jnp.zeros_like, tree), path)
    assert eqx.tree_equal(loaded, tree)
    assert read_safetensors(path)[0]["scalar"].shape == ()


def test_a_dictionary_keeps_its_names_and_strides_do_not_matter(path):
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"layer1.0.weight": base.T, "layer1.0.bias": base[:, 1], "big": base.astype(">f4")}
    save_safetensors(arrays, path)
    read = read_safetensors(path)[0]
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_leftovers_are_listed(path):
    save_safetensors({"a": jnp.zeros(2), "b": jnp.zeros(3), "d": jnp.zeros(1, jnp.bfloat16)}, path)
    with pytest.raises(WeightsError) as raised:
        load_safetensors({"b": jnp.zeros((3, 1)), "c": jnp.zeros(1), "d": jnp.zeros(1)}, path)
    error = raised.value
    assert (error.missing, error.unused, len(error.mismatched)) == (("c",), ("a",), 2)
    assert str(path) in str(error) and "bfloat16 (1,)" in str(error) and "float32 (3, 1)" in str(error)


def test_keys_of_random_numbers_are_refused(path):
    with pytest.raises(ValueError, match=r"state\.key is a PRNG key"):
        save_safetensors({"state": {"key": jr.key(0)}}, path)
    assert not path.exists()


def test_a_failed_write_leaves_the_earlier_file(path, monkeypatch):
    save_safetensors({"a": jnp.ones(2)}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors({"a": jnp.zeros(2)}, path)
    monkeypatch.undo()
    assert load_safetensors({"a": jnp.zeros(2)}, path)["a"].tolist() == [1, 1]
    assert os.listdir(path.parent) == [path.name]


def test_damaged_files_name_themselves(path):
    save_safetensors({"a": jnp.ones(20)}, path)
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[:20], content[:-1], b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"Cannot read .*model\.safetensors"):
            read_safetensors(path)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_safetensors({"a": jnp.ones(20)}, path.with_name("none.safetensors"))
