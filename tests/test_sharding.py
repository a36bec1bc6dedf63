"""One step on eight devices, parameters copied or cut: what one device gives, and nothing sent but what must be."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import data, models, train, weights

from .tiny_detector import build, loss, make_batch
from .work_together import detections


STEPS = 5


@cache
def trained(model_devices, accumulate=1):
    """State and metrics of every step on eight devices, or on one (0), and the compiled program's text."""
    mesh = train.make_mesh(jax.devices()[:8], model=model_devices) if model_devices else None
    model = build()
    trainable, optimizer = models.trainable(model), train.sgd(0.02)
    step = train.make_train_step(loss, optimizer, trainable=trainable, mesh=mesh, accumulate=accumulate)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1), ema=True)
    batches = [make_batch(k) for k in range(STEPS)]
    if mesh is not None:
        state, batches = train.shard_state(state, mesh), [train.shard_batch(batch, mesh) for batch in batches]
    program = eqx.filter_jit(lambda batch, state: step(state, batch), donate="all-except-first")
    program = program.lower(batches[0], state).compile()
    layout, history = [leaf.sharding for leaf in arrays(state)], []
    for batch in batches:
        state, metrics = program(batch, state)
        history.append({name: float(value) for name, value in metrics.items()})
    assert [leaf.sharding for leaf in arrays(state)] == layout
    return state, history, program.compiled.as_text()


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


@pytest.mark.parametrize("model_devices", [1, 8, pytest.param(2, marks=pytest.mark.long)])
def test_eight_devices_give_what_one_gives(model_devices):
    one, eight = trained(0), trained(model_devices)
    for a, b in zip(one[1], eight[1], strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, rtol=1e-5, err_msg=name)
    states = [
        jax.tree_util.tree_leaves_with_path(train.to_host((s.model, s.opt_state, s.ema))) for s in (one[0], eight[0])
    ]
    for (path, a), (_, b) in zip(*states, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def sent(text):
    """What a compiled program sends between devices: the kind and shape of every array, sorted."""
    found = []
    for computation in text.split("\n\n"):
        lines = re.findall(
            r"= (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+|send|recv)(?:-start)?\(",
            computation,
        )
        # In a loop, a message would be sent in every round.
        assert not lines or computation.strip().startswith("ENTRY")
        for shapes, kind in lines:
            for dimensions in re.findall(r"\w+\[([\d,]*)\]", shapes):
                found.append((kind, tuple(map(int, filter(None, dimensions.split(","))))))
    return sorted(shape for shape in found if shape[1]), {kind for kind, shape in found if not shape}


def test_copies_send_gradients_and_sums():
    state, _, text = trained(1)
    trained_arrays, _ = train._state.partition(state.model, models.trainable(state.model))
    expected = sorted(("all-reduce", leaf.shape) for leaf in arrays(trained_arrays))
    assert sent(text) == (expected, {"all-reduce"})


def test_pieces_send_parameters_and_gradients():
    """Every parameter once, every gradient once, and sums. No image, feature map or box."""
    state, _, text = trained(8)
    expected = []
    for leaf in arrays(state.model):
        cut = max((n for n in leaf.shape if n % 8 == 0), default=None)
        if cut is None:
            assert leaf.sharding.is_fully_replicated
            expected.append(("all-reduce", leaf.shape))
        else:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
            expected += [("all-gather", leaf.shape), ("reduce-scatter", leaf.addressable_shards[0].data.shape)]
    assert sent(text) == (sorted(expected), {"all-reduce"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_what_one_gives(tmp_path):
    """Each of four devices, with its part of batch and parameters; they also share the images of an evaluation."""
    annotations, images = data.write_shapes_dataset(tmp_path / "shapes", num_images=7, seed=0, image_size=(64, 64))
    script, coordinator = Path(__file__).with_name("work_together.py"), f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), coordinator, str(i), str(annotations), str(images), str(tmp_path / "two")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        )
        for i in range(2)
    ]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output

    state = train.to_host(trained(8)[0])
    weights.save_safetensors((state.model, state.opt_state, state.ema), tmp_path / "one.safetensors")
    one, two = (weights.read_safetensors(tmp_path / f"{run}.safetensors")[0] for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], atol=1e-5, err_msg=name)

    one, two = detections(state.ema, annotations, images), json.loads((tmp_path / "two.json").read_text())
    assert len(one) == len(two)
    assert {result["image_id"] for result in two} == set(range(1, 8))
    one, two = (sorted(run, key=lambda result: (result["image_id"], -result["score"])) for run in (one, two))
    for name in ("image_id", "score", "bbox"):
        np.testing.assert_allclose([a[name] for a in one], [b[name] for b in two], atol=1e-3)
