"""Naming the arrays of a PyTree, and replacing all of them or none."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.weights import WeightsError, named_leaves, replace_leaves


class Block(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None
    stride: int = eqx.field(static=True)


class Model(eqx.Module):
    body: dict[str, tuple[Block, ...]]
    head: eqx.nn.Linear
    scale: float
    table: np.ndarray


def make_model(key):
    keys = jr.split(key, 3)
    blocks = tuple(Block(jr.normal(k, (2, 3)), None if i else jnp.zeros(2), stride=2) for i, k in enumerate(keys[:2]))
    return Model({"layer1": blocks}, eqx.nn.Linear(3, 2, key=keys[2]), 0.5, np.arange(3))


NAMES = ["body.layer1.0.weight", "body.layer1.0.bias", "body.layer1.1.weight", "head.weight", "head.bias", "table"]


def test_names_follow_the_path(getkey):
    model = make_model(getkey())
    leaves = named_leaves(model)
    assert list(leaves) == NAMES
    assert leaves["body.layer1.1.weight"] is model.body["layer1"][1].weight


def test_names_that_coincide_are_an_error():
    with pytest.raises(ValueError, match=r"called 'a\.b'"):
        named_leaves({"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


def test_replaces_every_array_and_nothing_else(getkey):
    model = make_model(getkey())
    arrays = {name: np.array(leaf) + 1 for name, leaf in named_leaves(model).items()}
    new = replace_leaves(model, arrays)
    for name, leaf in named_leaves(new).items():
        np.testing.assert_array_equal(leaf, arrays[name])
        assert type(leaf) is type(named_leaves(model)[name])
    assert jax.tree.structure(new) == jax.tree.structure(model) and new.scale == 0.5
    arrays["table"][:] = arrays["head.bias"][:] = 7  # the tree has its own copies
    assert new.table.tolist() == [1, 2, 3] and (np.asarray(new.head.bias) != 7).all()
    jax.jit(lambda tree: tree.head.bias + 1, donate_argnums=())(eqx.filter(new, eqx.is_array))


def test_shapes_alone_become_arrays(getkey):
    model = make_model(getkey())
    arrays = {name: np.array(leaf) for name, leaf in named_leaves(model).items() if name != "table"}
    shapes = eqx.filter_eval_shape(lambda: replace(model, table=None))
    assert list(named_leaves(shapes)) == list(arrays)
    new = replace_leaves(shapes, arrays)
    assert all(isinstance(leaf, jax.Array) for leaf in named_leaves(new).values())
    assert eqx.tree_equal(new, replace(model, table=None))
    with pytest.raises(WeightsError, match=r"head.bias is float32 \(3,\) in the source but"):
        replace_leaves(shapes, arrays | {"head.bias": np.zeros(3, np.float32)})


def test_one_error_lists_everything(getkey):
    model = make_model(getkey())
    arrays = {name: np.array(leaf) for name, leaf in named_leaves(model).items()}
    del arrays["head.bias"]
    arrays["extra"] = np.zeros(1)
    arrays["head.weight"] = arrays["head.weight"].T
    arrays["table"] = arrays["table"].astype(np.float32)
    with pytest.raises(WeightsError) as raised:
        replace_leaves(model, arrays, source="some.pth")
    error = raised.value
    assert error.missing == ("head.bias",) and error.unused == ("extra",)
    assert error.mismatched == (
        "head.weight is float32 (3, 2) in the source but float32 (2, 3) in the model",
        "table is float32 (3,) in the source but int64 (3,) in the model",
    )
    for part in (
        "some.pth does not fit",
        "1 missing in the source: head.bias",
        "unused in the source: extra",
        "(3, 2)",
    ):
        assert part in str(error)


def test_long_lists_are_cut_in_the_message_only():
    with pytest.raises(WeightsError, match=r"100 unused in the source: w0, .*w19, … and 80 more") as raised:
        replace_leaves({}, {f"w{i}": np.zeros(1) for i in range(100)})
    assert len(raised.value.unused) == 100 and "w20" not in str(raised.value)


def test_a_broadcast_is_a_mismatch():
    for value in (1.0, np.ones((1, 2), np.float32), np.ones(2)):
        with pytest.raises(WeightsError, match="1 mismatched"):
            replace_leaves({"a": jnp.zeros(2)}, {"a": value})
