"""A step on eight devices, in two processes, in parts or in bfloat16 agrees with that of one device on the whole batch.

Devices send each other only what they must.
"""

import json
import re
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import data, models, nn, train
from detectax_eqx.weights import load_rf_detr

from . import rf_detr_tiny, tiny_train
from .tiny_detector import build, loss, make_batch


STEPS = 5


def rf_detr():
    return load_rf_detr(rf_detr_tiny.build("boxes"), rf_detr_tiny.random_arrays("boxes"))


def trained(model_devices, accumulate=1, dtype="float32", detector=build):
    """Final state, metrics of every step and the compiled program's text, on eight devices or on one (0)."""
    return train_once(model_devices, accumulate, dtype, detector)


@cache
def train_once(model_devices, accumulate, dtype, detector):
    mesh = train.make_mesh(jax.devices()[:8], model=model_devices) if model_devices else None
    model = detector()
    trainable, optimizer = models.trainable(model), train.sgd(0.02)

    def cast_loss(model, example, *, key):
        terms = loss(nn.cast(model, dtype), example, key=key)
        assert all(term.total.dtype == jnp.float32 for term in terms.values())
        return terms

    step = train.make_train_step(cast_loss, optimizer, trainable=trainable, mesh=mesh, accumulate=accumulate)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1), ema=True)
    batches = [make_batch(k) for k in range(STEPS)]
    if mesh is not None:
        state, batches = train.shard_state(state, mesh), [train.shard_batch(batch, mesh) for batch in batches]
    program = eqx.filter_jit(lambda batch, state: step(state, batch), donate="all-except-first")
    program = program.lower(batches[0], state).compile()  # pyright: ignore[reportFunctionMemberAccess]
    layout, history = [leaf.sharding for leaf in arrays(state)], []
    for batch in batches:
        state, metrics = program(batch, state)
        history.append({name: float(value) for name, value in metrics.items()})
    assert [leaf.sharding for leaf in arrays(state)] == layout
    return state, history, program.compiled.as_text()


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


CASES = [
    pytest.param(1, 1, marks=pytest.mark.slow),
    (8, 1),
    pytest.param(2, 1, marks=pytest.mark.long),
    pytest.param(8, 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize("model_devices, accumulate", [*CASES, pytest.param(0, 4, marks=pytest.mark.long)])
def test_the_same_as_one_device_at_once(model_devices, accumulate):
    require_the_same(trained(0), trained(model_devices, accumulate))


@pytest.mark.slow
def test_rf_detr_on_eight_devices():
    """The matching of each device's images, and queries that no image shares."""
    require_the_same(trained(0, detector=rf_detr), trained(8, detector=rf_detr))


def require_the_same(one, other):
    """Fails unless metrics and states of two runs, as `trained` returns them, agree to 1e-5."""
    for a, b in zip(one[1], other[1], strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, rtol=1e-5, err_msg=name)
    states = [
        jax.tree_util.tree_leaves_with_path(train.to_host((s.model, s.opt_state, s.ema))) for s in (one[0], other[0])
    ]
    for (path, a), (_, b) in zip(*states, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_losses_in_bfloat16_follow_those_in_float32():
    full, half = trained(0), trained(0, dtype="bfloat16")
    losses = np.array([[metrics["loss"] for metrics in history] for _, history, _ in (full, half)])
    assert (losses[0] != losses[1]).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    floats = [leaf for leaf in arrays((half[0].model, half[0].opt_state)) if eqx.is_inexact_array(leaf)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def sent(text):
    """What a compiled program sends between devices: sorted kinds and shapes of arrays, and the kinds for scalars."""
    messages = []
    kinds = re.compile(r" (all-[a-z-]+|reduce-scatter|collective-[a-z]+|send|recv)(?:-start)?\(")
    for computation in text.split("\n\n"):
        for line in computation.splitlines():
            if message := kinds.search(line):
                # In a loop, a message would be sent in every iteration.
                assert computation.strip().startswith("ENTRY")
                for dimensions in re.findall(r"\w+\[([\d,]*)\]", line[: message.start()]):
                    messages.append((message[1], tuple(map(int, filter(None, dimensions.split(","))))))
    return sorted(shape for shape in messages if shape[1]), {kind for kind, shape in messages if not shape}


@pytest.mark.slow
def test_copies_send_gradients_and_sums():
    state, _, text = trained(1)
    trained_arrays, _ = train._state.partition(state.model, models.trainable(state.model))
    expected = sorted(("all-reduce", leaf.shape) for leaf in arrays(trained_arrays))
    assert sent(text) == (expected, {"all-reduce"})


def test_pieces_send_parameters_and_gradients():
    """Every parameter once, every gradient once, and sums; no image, feature map or box."""
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes_give_what_one_gives(tmp_path):
    """train.py, where each process holds a piece of the parameters and its rows of each batch; evaluation is shared."""
    for name, count in (("train", 8), ("val", 7)):
        data.write_shapes_dataset(tmp_path / name, num_images=count, seed=count, image_size=(64, 64))
    options = ["--model", "faster_rcnn_resnet18_fpn", "--steps", "4", "--warmup-steps", "2", "--log-every", "1"]
    options += ["--parameter-shards", "2", "--ema", "0.9"]
    force = "--xla_force_host_platform_device_count="
    outputs, statuses = tiny_train.finish(
        tiny_train.start(tmp_path, tmp_path / "one", *options, XLA_FLAGS=f"{force}2"),
        *(
            tiny_train.start(tmp_path, tmp_path / "two", *options, *member, XLA_FLAGS=f"{force}1")
            for member in tiny_train.members()
        ),
    )
    assert statuses == [0, 0, 0], outputs
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    for name, array in one["arrays"].items():
        np.testing.assert_allclose(two["arrays"][name], array, atol=1e-5, err_msg=name)
    for expected, line in zip(one["metrics"], two["metrics"], strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(line[name], value, atol=1e-4, rtol=1e-5, err_msg=name)
    assert {result["image_id"] for result in one["found"]} == set(range(1, 8))
    for name in ("image_id", "score"):
        of_one, of_two = (sorted(result[name] for result in run["found"]) for run in (one, two))
        np.testing.assert_allclose(of_one, of_two, atol=1e-4)


def contents(output):
    """Arrays of the last checkpoint by name, lines of the metrics, and the detections of the evaluation."""
    return {
        "arrays": tiny_train.saved_arrays(output),
        "metrics": [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()],
        "found": json.loads((output / "evaluation/detections.json").read_text()),
    }
