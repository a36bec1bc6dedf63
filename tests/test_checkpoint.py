"""Checkpoints: restored bit for bit, written atomically, and rejected if anything is wrong with them."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.train import (
    _checkpoint,
    init_train_state,
    latest_checkpoint,
    load_checkpoint,
    make_train_step,
    save_checkpoint,
    sgd,
    warmup_multistep,
)

from .test_train_step import BOX_VALID, BOXES, TRAINABLE, make_batch, noise, squares, toy


def tree():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, (5, 7), dtype=np.uint32)  # NaNs with payloads, denormals, infinities
    return {
        "float32": jnp.asarray(bits).view(jnp.float32),
        "bfloat16": jnp.asarray(bits.astype(np.uint16)).view(jnp.bfloat16),
        "float16": jnp.asarray([-0.0, 6e-8, 65504], jnp.float16),
        "zeros": -jnp.zeros((3, 2)),
        "ints": [jnp.arange(-3, 3, dtype=jnp.int8), jnp.asarray(2**31 - 1, jnp.int32), jnp.arange(3, dtype=jnp.uint8)],
        "bool": jnp.array([True, False, True]),
        "empty": jnp.zeros((0, 4)),
        "key": jr.key(42),
        "keys": jr.split(jr.key(1, impl="rbg"), 3),
        "numpy": np.array([np.pi, -1.0]),
        "function": jax.nn.relu,
        "number": 3,
        "none": None,
    }


def bits(x):
    return np.asarray(jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def _latest(folder):
    path = latest_checkpoint(folder)
    assert path is not None
    return path


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if eqx.is_array(x):
            assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)
        else:
            assert x is y


def blank(leaf):
    """Another array of the same shape and dtype."""
    if isinstance(leaf, np.ndarray):
        return np.ones_like(leaf)
    if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.ones_like(jr.key_data(leaf)), impl=jr.key_impl(leaf))
    return jnp.ones_like(leaf) if eqx.is_array(leaf) else leaf


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    metadata = {"categories": [{"id": 3, "name": "Schlüssel"}], "lr": 0.1, "none": None}
    path = save_checkpoint(tmp_path / "run", tree(), step=12, metadata=metadata)
    assert path == tmp_path / "run" / "00000012" == latest_checkpoint(tmp_path / "run")
    loaded, loaded_metadata = load_checkpoint(path, jax.tree.map(blank, tree()))
    assert_identical(tree(), loaded)
    assert loaded_metadata == metadata
    assert loaded["float32"].devices() == {jax.devices()[0]}


def test_shapes_suffice_to_load_into(tmp_path):
    saved = {key: value for key, value in tree().items() if key not in ("numpy", "function", "number")}
    path = save_checkpoint(tmp_path, saved, step=0, metadata={})
    loaded, _ = load_checkpoint(path, eqx.filter_eval_shape(lambda: saved))
    assert_identical(saved, loaded)
    path = save_checkpoint(tmp_path, jnp.arange(3), step=1, metadata={})  # a tree that is one leaf
    assert load_checkpoint(path, jnp.zeros(3, jnp.int32))[0].tolist() == [0, 1, 2]


def test_names_with_odd_characters(tmp_path):
    folder = tmp_path / "a b%20c?#ü"
    saved = {"layer/1 ü%?#": jnp.arange(3.0), "": jnp.arange(2.0)}
    path = save_checkpoint(folder, saved, step=1, metadata={})
    assert_identical(load_checkpoint(path, saved)[0], saved)


def run(state, step, start, stop):
    for k in range(start, stop):
        state, _ = step(state, make_batch(BOXES + 0.1 * k, BOX_VALID))
    return state


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    optimizer = sgd(warmup_multistep(0.1, milestones=[4], warmup_steps=3))

    def loss(model, example, *, key):
        return squares(model, example, key=key) | noise(model, example, key=key)

    def start(key):
        return init_train_state(toy(key), optimizer, trainable=TRAINABLE, key=key)

    uninterrupted = run(start(jr.key(7)), make_train_step(loss, optimizer, trainable=TRAINABLE), 0, 6)
    state = run(start(jr.key(7)), make_train_step(loss, optimizer, trainable=TRAINABLE), 0, 3)
    save_checkpoint(tmp_path, state, step=int(state.step), metadata={})
    resumed, _ = load_checkpoint(_latest(tmp_path), start(jr.key(99)))
    traced_once = eqx.debug.assert_max_traces(max_traces=1)(loss)
    resumed = run(resumed, make_train_step(traced_once, optimizer, trainable=TRAINABLE), 3, 6)
    assert_identical(uninterrupted, resumed)
    assert int(resumed.step) == 6


def test_leaves_are_found_under_other_names(tmp_path):
    path = save_checkpoint(tmp_path, {"head": {"w": jnp.ones(3)}, "old": jnp.zeros(2)}, step=1, metadata={})
    renamed = {"head/w": "neck/weight"}
    like = {"neck": {"weight": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    restored, _ = load_checkpoint(path, like, partial=True, rename=lambda name: renamed.get(name, name))
    assert restored["neck"]["weight"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"rename must give each leaf of checkpoint .* a path of its own"):
        load_checkpoint(path, like, partial=True, rename=lambda _: "neck/weight")


def test_the_newest_are_kept(tmp_path):
    for step in (1, 5, 3, 10):
        save_checkpoint(tmp_path, {"w": jnp.full(2, step)}, step=step, metadata={}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000005", "00000010"]
    save_checkpoint(tmp_path, {"w": jnp.full(2, 4)}, step=4, metadata={}, keep=1)  # a restart from an earlier step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000004", "00000005", "00000010"]
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "00000099").mkdir()  # no index: not a checkpoint
    assert _latest(tmp_path).name == "00000010"


def test_the_same_step_again_replaces(tmp_path):
    like = {"w": jnp.zeros(2)}
    for value in (1.0, 2.0):
        path = save_checkpoint(tmp_path, {"w": jnp.full(2, value)}, step=3, metadata={"value": value}, keep=1)
    loaded, metadata = load_checkpoint(path, like)
    assert loaded["w"].tolist() == [2.0, 2.0] and metadata == {"value": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]
    path.rename(tmp_path / "00000003.replaced")  # killed between the two renames
    assert load_checkpoint(_latest(tmp_path), like)[1] == {"value": 2.0}
    save_checkpoint(tmp_path, like, step=3, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["00000003"]


@pytest.mark.parametrize("where", ["write_arrays", "_sync"])
def test_interrupted_in_the_middle_of_a_save(tmp_path, monkeypatch, where):
    like = {"w": jnp.zeros(2)}
    save_checkpoint(tmp_path, {"w": jnp.ones(2)}, step=1, metadata={})
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(_checkpoint, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {"w": jnp.full(2, 2.0)}, step=2, metadata={}, keep=1)
    assert _latest(tmp_path).name == "00000001"
    assert load_checkpoint(_latest(tmp_path), like)[0]["w"].tolist() == [1.0, 1.0]
    save_checkpoint(tmp_path, {"w": jnp.full(2, 2.0)}, step=2, metadata={}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]


def test_killed_in_the_middle_of_a_save(tmp_path):
    """SIGKILL while the arrays are being written, in a subprocess because it ends the whole process."""
    script = """
        import os, sys, threading, time
        import numpy as np
        from detectax_eqx.train import save_checkpoint
        small, big = {"w": np.ones(2, "f")}, {"w": np.ones(50_000_000, "f")}
        save_checkpoint(sys.argv[1], small, step=1, metadata={})
        def kill():
            while not os.path.exists(os.path.join(sys.argv[1], "00000002.tmp")):
                time.sleep(0.001)
            time.sleep(0.02)
            os.kill(os.getpid(), 9)
        threading.Thread(target=kill, daemon=True).start()
        save_checkpoint(sys.argv[1], big, step=2, metadata={}, keep=1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert _latest(tmp_path).name == "00000001"
    assert load_checkpoint(_latest(tmp_path), {"w": np.zeros(2, "f")})[0]["w"].tolist() == [1.0, 1.0]


LIKE = {"head": {"weight": jnp.arange(300.0), "bias": jnp.arange(64, dtype=jnp.int32)}, "zero": jnp.zeros(50)}


def test_every_flipped_bit_is_seen(tmp_path):
    """Any bit flip in any file of a checkpoint is either rejected or has no effect on the loaded values."""
    path = save_checkpoint(tmp_path, LIKE, step=1, metadata={"name": "toy"})
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) >= 3
    random = np.random.default_rng(0)
    refused = 0
    for file in files:
        original = file.read_bytes()
        for position in random.choice(len(original), min(40, len(original)), replace=False):
            damaged = bytearray(original)
            damaged[position] ^= 1 << int(random.integers(8))
            file.write_bytes(damaged)
            try:
                loaded, metadata = load_checkpoint(path, LIKE)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert_identical(loaded, LIKE)
                assert metadata == {"name": "toy"}
        file.write_bytes(original)
    assert refused > 40
    assert_identical(load_checkpoint(path, LIKE)[0], LIKE)


def test_damage_names_checkpoint_and_leaf(tmp_path):
    path = save_checkpoint(tmp_path, LIKE, step=1, metadata={})
    needle = np.arange(100, 110, dtype=np.float32).tobytes()
    (file,) = [f for f in path.rglob("*") if f.is_file() and needle in f.read_bytes()]
    data = file.read_bytes()
    position = data.index(needle)
    file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    with pytest.raises(ValueError, match=r"00000001 is damaged: leaf 'head/weight' cannot be read"):
        load_checkpoint(path, LIKE)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="00000001 is damaged: leaf '"):
        load_checkpoint(path, LIKE)
    file.unlink()
    with pytest.raises(ValueError, match="00000001 is damaged: leaf '"):
        load_checkpoint(path, LIKE)
    (path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"00000001 is damaged: index.json"):
        load_checkpoint(path, LIKE)
    (path / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path, LIKE)


@pytest.mark.parametrize("missing", ["manifest", "data"])
def test_a_missing_file_is_seen(tmp_path, missing):
    """Missing data is never read as zeros."""
    path = save_checkpoint(tmp_path, LIKE, step=1, metadata={})
    for file in [file for file in path.rglob("*") if file.is_file() and file.name != "index.json"]:
        if file.name.startswith("manifest") == (missing == "manifest"):
            file.unlink()
    with pytest.raises(ValueError, match="00000001 is damaged: leaf 'head/"):
        load_checkpoint(path, LIKE)


def test_what_does_not_fit_is_named(tmp_path):
    path = save_checkpoint(tmp_path, LIKE, step=1, metadata={})
    with pytest.raises(ValueError, match="it lacks 'head/scale';"):
        load_checkpoint(path, {**LIKE, "head": {**LIKE["head"], "scale": jnp.ones(1)}})
    with pytest.raises(ValueError, match="the model lacks 'zero';"):
        load_checkpoint(path, {"head": LIKE["head"]})
    with pytest.raises(ValueError, match=r"00000001.*leaf 'zero' is float32\[50\] there, but float32\[51\] here"):
        load_checkpoint(path, {**LIKE, "zero": jnp.zeros(51)})
    with pytest.raises(ValueError, match=r"leaf 'zero' is float32\[50\] there, but bfloat16\[50\] here"):
        load_checkpoint(path, {**LIKE, "zero": jnp.zeros(50, jnp.bfloat16)})


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(tmp_path, LIKE, step=1, metadata={}, keep=0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        save_checkpoint(tmp_path, LIKE, step=-1, metadata={})
    with pytest.raises(ValueError, match="Two leaves of the tree have the path 'a/b'"):
        save_checkpoint(tmp_path, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, step=1, metadata={})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, LIKE, step=1, metadata={"array": jnp.ones(1)})
    assert list(tmp_path.iterdir()) == []
    assert json.loads((save_checkpoint(tmp_path, LIKE, step=1, metadata={}) / "index.json").read_text())
