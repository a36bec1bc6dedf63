"""The training step: hand-computed gradients, frozen leaves, weighting, randomness, devices."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from detectax_eqx import Batch, Images, Targets, WeightedSum, train


class Toy(eqx.Module):
    """Predicts one number per box: `boxes @ weight + bias`, times a frozen `scale`."""

    weight: jax.Array
    bias: jax.Array
    scale: jax.Array
    name: str = eqx.field(static=True)
    activation: object = jax.nn.relu

    def __call__(self, boxes):
        return (boxes @ self.weight + self.bias) * self.scale


def toy(key):
    return Toy(jr.normal(key, (4,)), jnp.array([0.3]), jnp.array([1.5]), "toy")


# Flags in place of arrays.
TRAINABLE = Toy(True, True, False, "toy", False)  # pyright: ignore[reportArgumentType]
ALL = Toy(True, True, True, "toy", False)  # pyright: ignore[reportArgumentType]


def make_batch(boxes, box_valid, *, valid=None, overflow=None):
    """A batch of `boxes` (b, n, 4) on arbitrary images, in NumPy as from a loader."""
    boxes, box_valid = np.asarray(boxes, np.float32), np.asarray(box_valid, bool)
    b, n = box_valid.shape
    sizes = np.full((b, 2), 8, np.int32)
    return Batch(
        Images(
            np.arange(b * 8 * 8 * 3, dtype=np.uint8).reshape(b, 8, 8, 3),
            sizes,
            sizes,
            indices=np.arange(b, dtype=np.int32),
            valid=np.ones(b, bool) if valid is None else np.asarray(valid, bool),
            canvas=(8, 8),
        ),
        Targets(boxes, np.zeros((b, n), np.int32), box_valid),
        overflow=np.zeros(b, np.int32) if overflow is None else np.asarray(overflow, np.int32),
    )


def squares(model, example, *, key):
    """Half the squared prediction over valid boxes, and a term of 2 * bias per image."""
    valid = example.targets.valid
    total = jnp.sum(jnp.where(valid, 0.5 * model(example.targets.boxes) ** 2, 0.0))
    return {
        "box": WeightedSum(total, jnp.sum(valid).astype(jnp.float32)),
        "image": WeightedSum(2 * model.bias[0], jnp.ones(())),
    }


def noise(model, example, *, key):
    """A loss that is a random number times the bias."""
    return {"noise": WeightedSum(jr.normal(key) * model.bias[0], jnp.ones(()))}


BOXES = np.random.default_rng(0).normal(size=(4, 3, 4))
BOX_VALID = [[True, True, True], [True, False, False], [False, False, False], [True, True, False]]


def test_gradient_and_metrics_are_those_computed_by_hand(getkey):
    model = toy(getkey())
    w, b, s = (np.asarray(x, np.float64) for x in (model.weight, model.bias, model.scale))
    optimizer = optax.sgd(0.1)
    state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=getkey())
    step = train.make_train_step(squares, optimizer, trainable=TRAINABLE)
    state, metrics = step(state, make_batch(BOXES, BOX_VALID, overflow=[0, 3, 0, 2]))
    chosen = BOXES[np.asarray(BOX_VALID)]  # 6 boxes in the whole batch, each with a weight of 1/6
    prediction = (chosen @ w + b) * s
    grad_w, grad_b = (prediction * s) @ chosen / 6, np.sum(prediction * s) / 6 + 2
    np.testing.assert_allclose(state.model.weight, w - 0.1 * grad_w, atol=1e-5)
    np.testing.assert_allclose(state.model.bias, b - 0.1 * grad_b, atol=1e-5)
    box, image = 0.5 * np.mean(prediction**2), 2 * b[0]
    expected = {"box": box, "image": image, "loss": box + image, "overflow": 5.0}
    expected["gradient_norm"] = np.sqrt(np.sum(grad_w**2) + grad_b**2)
    expected |= {"update_norm": 0.1 * expected["gradient_norm"], "parameter_norm": np.sqrt(np.sum(w**2) + b[0] ** 2)}
    expected |= {"skipped": 0.0, "invalid": 0.0}
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    assert int(state.step) == 1


def test_no_copy_of_the_parameters_is_kept(getkey):
    """A step reads the norms before it updates the parameters in place, so that one copy of them is enough."""
    side = 700

    def loss(model, example, *, key):
        return {"loss_a": WeightedSum(jnp.sum(jnp.sin(model @ model)), jnp.ones(()))}

    optimizer = train.sgd(0.1)
    state = train.init_train_state(jr.normal(getkey(), (side, side)), optimizer, trainable=True, key=getkey())
    step = train.make_train_step(loss, optimizer, trainable=True)
    program = jax.jit(step, donate_argnums=0).lower(state, make_batch(BOXES, BOX_VALID)).compile()
    text = program.as_text()
    assert text is not None and f"f32[{side},{side}]" in text
    assert not re.search(rf"f32\[{side},{side}\]\S* copy\(", text)


def test_frozen_leaves_stay_bit_for_bit_under_weight_decay(getkey):
    model = toy(getkey())
    before = np.asarray(model.scale).tobytes(), np.asarray(model.weight).tobytes()
    optimizer = train.sgd(0.1, weight_decay=0.5)
    state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=getkey())
    state_shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state))
    assert state_shapes == [(1,), (4,)]  # momentum of weight and bias only
    step = train.make_train_step(squares, optimizer, trainable=TRAINABLE)
    for _ in range(3):
        state, _ = step(state, make_batch(BOXES, BOX_VALID))
    assert np.asarray(state.model.scale).tobytes() == before[0]
    assert np.asarray(state.model.weight).tobytes() != before[1]
    assert np.asarray(model.weight).tobytes() == before[1]  # the model given at the start is not donated
    assert state.model.name == "toy" and state.model.activation is jax.nn.relu


def test_one_trace_and_the_state_is_donated(getkey):
    optimizer = train.adamw(train.warmup_cosine(0.1, total_steps=10, warmup_steps=2))
    weak = eqx.tree_at(lambda m: m.scale, toy(getkey()), jnp.broadcast_to(jnp.asarray(1.5), (1,)))
    assert weak.scale.weak_type
    state = train.init_train_state(weak, optimizer, trainable=ALL, key=getkey())
    loss = eqx.debug.assert_max_traces(max_traces=1)(squares)
    step = train.make_train_step(loss, optimizer, trainable=ALL)
    first, metrics = state, {}
    for _ in range(3):
        state, metrics = step(state, make_batch(BOXES, BOX_VALID))
    assert first.model.weight.is_deleted()
    assert np.isfinite(metrics["loss"])


def test_a_step_within_another_program(getkey):
    """There, the step's own compiler options would be rejected."""
    optimizer = train.sgd(0.1)
    state = train.init_train_state(toy(getkey()), optimizer, trainable=ALL, key=getkey())
    step = train.make_train_step(squares, optimizer, trainable=ALL)
    batch = jax.tree.map(jnp.asarray, make_batch(BOXES, BOX_VALID))
    nested, _ = eqx.filter_jit(step)(state, batch)
    alone, _ = step(state, batch)
    for a, b in zip(*(jax.tree.leaves(eqx.filter(s.model, eqx.is_array)) for s in (nested, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_invalid_examples_count_nothing(getkey):
    """Even if they hold values without a finite derivative."""
    model, key, optimizer = toy(getkey()), getkey(), train.sgd(0.1)

    def roots(model, example, *, key):
        return {"root": WeightedSum(jnp.sqrt(jnp.sum(model(example.targets.boxes) ** 2)), jnp.ones(()))}

    def updated(batch):
        step = train.make_train_step(roots, optimizer, trainable=TRAINABLE)
        state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
        state, metrics = step(state, batch)
        assert metrics.pop("invalid") == float(np.sum(~batch.images.valid))
        return jax.tree.leaves(eqx.filter((state.model, metrics), eqx.is_array))

    alone = updated(make_batch(BOXES[:2], np.ones((2, 3)), overflow=[1, 0]))
    boxes = np.concatenate([np.full((1, 3, 4), np.nan), BOXES[:2], np.full((1, 3, 4), np.inf)])
    filled = updated(make_batch(boxes, np.ones((4, 3)), valid=[0, 1, 1, 0], overflow=[9, 1, 0, 9]))
    for a, b in zip(alone, filled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_batch_without_a_valid_example_has_loss_zero(getkey):
    optimizer = train.sgd(0.1, weight_decay=0.0)
    model = toy(getkey())
    state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=getkey())
    step = train.make_train_step(squares, optimizer, trainable=TRAINABLE)
    state, metrics = step(state, make_batch(BOXES, BOX_VALID, valid=[0, 0, 0, 0]))
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0
    np.testing.assert_array_equal(state.model.weight, model.weight)


def test_randomness_differs_by_step_and_example_and_repeats(getkey):
    key, optimizer = getkey(), optax.sgd(0.0)
    step = train.make_train_step(noise, optimizer, trainable=TRAINABLE)

    def losses(batch, steps):
        state = train.init_train_state(toy(jr.key(0)), optimizer, trainable=TRAINABLE, key=key)
        values = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            values.append(float(metrics["noise"]))
        assert (jr.key_data(state.key) == jr.key_data(key)).all()
        return values

    one = losses(make_batch(BOXES[:1], np.ones((1, 3))), 3)
    assert len(set(one)) == 3
    assert one == losses(make_batch(BOXES[:1], np.ones((1, 3))), 3)
    keys = jr.split(jr.fold_in(key, 0), 4)
    expected = 0.3 * np.mean([jr.normal(k) for k in keys])
    np.testing.assert_allclose(losses(make_batch(BOXES, BOX_VALID), 1)[0], expected, rtol=1e-5)


def test_two_devices_give_what_one_gives(getkey):
    model, key, optimizer = toy(getkey()), getkey(), train.sgd(0.1)
    one = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
    mesh = train.make_mesh(jax.devices()[:2])
    two = train.shard_state(one, mesh)
    one = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
    # The second device has only padding examples, which may hold anything.
    boxes = np.concatenate([BOXES[:2], np.full((2, 3, 4), np.nan)])
    batch = make_batch(boxes, BOX_VALID, valid=[1, 1, 0, 0])
    sharded = train.shard_batch(batch, mesh)
    assert sharded.images.pixels.addressable_shards[0].data.shape[0] == 2
    steps = [train.make_train_step(squares, optimizer, trainable=TRAINABLE, mesh=m) for m in (None, mesh)]
    for _ in range(3):
        one, metrics_one = steps[0](one, batch)
        two, metrics_two = steps[1](two, sharded)
        for name, value in metrics_one.items():
            np.testing.assert_allclose(metrics_two[name], value, atol=1e-5)
    assert two.model.weight.sharding.is_fully_replicated
    assert_same(one.model, two.model, atol=1e-5)


def assert_same(one, two, *, atol=0.0):
    """Checks that the arrays of two trees are equal, to the last bit if `atol` is 0."""
    leaves = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (one, two))
    for a, b in zip(*leaves, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jr.key_data(a), jr.key_data(b)
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_parts_give_the_whole_batchs_update(getkey, accumulate, devices):
    """Parts have different counts, one has no valid example, and the loss uses random numbers."""

    def noisy(model, example, *, key):
        return squares(model, example, key=key) | noise(model, example, key=key)

    model, key, optimizer = toy(getkey()), getkey(), train.adamw(0.1)
    mesh = None if devices == 1 else train.make_mesh(jax.devices()[:2])
    boxes = np.random.default_rng(1).normal(size=(8, 3, 4))
    batch = make_batch(boxes, [[True] * 3, [False] * 3] * 2 + BOX_VALID, valid=[1, 1, 0, 0, 1, 1, 1, 0])

    def updated(mesh, accumulate):
        step = train.make_train_step(noisy, optimizer, trainable=TRAINABLE, mesh=mesh, accumulate=accumulate)
        state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
        if mesh is not None:
            return step(train.shard_state(state, mesh), train.shard_batch(batch, mesh))
        return step(state, batch)

    whole, parts = updated(None, 1), updated(mesh, accumulate)
    assert_same(whole, parts, atol=1e-6)


def test_a_count_without_its_total_takes_no_gradient(getkey):
    """`count` is a constant, whatever it is computed from, both at once and in parts."""
    model, key, optimizer = toy(getkey()), getkey(), optax.sgd(0.1)

    def weighted(model, example, *, key):
        return {"x": WeightedSum(model.weight.sum(), 5.0 + model.bias[0])}

    for accumulate in (1, 2):
        step = train.make_train_step(weighted, optimizer, trainable=TRAINABLE, accumulate=accumulate)
        state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
        state, _ = step(state, make_batch(BOXES, BOX_VALID))
        np.testing.assert_array_equal(state.model.bias, model.bias)
        np.testing.assert_allclose(state.model.weight, model.weight - 0.1 / 5.3, rtol=1e-5)


def test_the_average_follows_the_model(getkey):
    optimizer = train.sgd(0.1)
    state = train.init_train_state(toy(getkey()), optimizer, trainable=TRAINABLE, key=getkey(), ema=True)
    step = train.make_train_step(squares, optimizer, trainable=TRAINABLE, ema_decay=0.25)
    average, scale = np.asarray(state.model.weight, np.float64), np.asarray(state.model.scale)
    for k in range(5):
        state, _ = step(state, make_batch(BOXES, BOX_VALID))
        decay = min(0.25, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * np.asarray(state.model.weight, np.float64)
        np.testing.assert_allclose(state.ema.weight, average, rtol=1e-5)
    assert state.inference_model is state.ema
    np.testing.assert_array_equal(state.ema.scale, scale)
    assert state.ema.name == "toy"


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_an_update_that_is_not_finite_is_not_made(getkey, poison):
    """Bit for bit: a run with a bad batch continues like one that never saw it, except for the step count."""
    model, key = toy(getkey()), getkey()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), train.adamw(0.1, weight_decay=0.1))
    step = train.make_train_step(squares, optimizer, trainable=TRAINABLE)
    state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key, ema=True)
    metrics = {}
    for _ in range(2):
        state, metrics = step(state, make_batch(BOXES, BOX_VALID))
    before = jax.tree.map(
        lambda leaf: np.array(leaf), eqx.filter((state.model, state.opt_state, state.ema), eqx.is_array)
    )
    assert metrics["skipped"] == 0
    boxes = BOXES.copy()
    boxes[1, 0, 2] = poison
    state, metrics = step(state, make_batch(boxes, BOX_VALID))
    assert not np.isfinite(metrics["loss"] + metrics["gradient_norm"])
    assert_same((state.model, state.opt_state, state.ema), before)
    assert metrics["skipped"] == int(state.skipped) == 1
    assert int(state.step) == 3
    state, metrics = step(state, make_batch(BOXES, BOX_VALID))
    assert metrics["skipped"] == 1
    assert not np.array_equal(state.model.weight, before[0].weight)


def test_clipping_bounds_the_update_and_not_the_metric(getkey):
    model, key = toy(getkey()), getkey()

    def metrics_of(optimizer):
        state = train.init_train_state(model, optimizer, trainable=TRAINABLE, key=key)
        return train.make_train_step(squares, optimizer, trainable=TRAINABLE)(state, make_batch(BOXES, BOX_VALID))[1]

    free = metrics_of(optax.sgd(1.0))
    clipped = metrics_of(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0)))
    assert free["gradient_norm"] > 1
    np.testing.assert_allclose(clipped["gradient_norm"], free["gradient_norm"], rtol=1e-6)
    np.testing.assert_allclose(clipped["update_norm"], 0.5, rtol=1e-5)


def test_refusals(getkey):
    with pytest.raises(ValueError, match=r"model\.activation, which is of type custom_jvp.*arrays of floats"):
        train.init_train_state(toy(getkey()), optax.sgd(0.1), trainable=True, key=getkey())
    with pytest.raises(ValueError, match=r"model\['n'\], which is an array of int32"):
        train.init_train_state({"n": jnp.arange(3)}, optax.sgd(0.1), trainable=True, key=getkey())
    with pytest.raises(ValueError, match=r"batch\.images\.pixels has shape \(3, 8, 8, 3\).*2 parts"):
        train.shard_batch(make_batch(BOXES[:3], BOX_VALID[:3]), train.make_mesh(jax.devices()[:2]))
    batch = train.shard_batch(make_batch(BOXES, BOX_VALID), train.make_mesh(jax.devices()[:2]))
    three = train.make_mesh(jax.devices()[:3])
    state = train.init_train_state(toy(getkey()), optax.sgd(0.1), trainable=TRAINABLE, key=getkey())
    with pytest.raises(ValueError, match=r"4 examples cannot be divided into 3 parts"):
        train.make_train_step(squares, optax.sgd(0.1), trainable=TRAINABLE, mesh=three)(state, batch)
    with pytest.raises(ValueError, match=r"accumulate must divide the 4 examples of each device, got 3"):
        step = train.make_train_step(squares, optax.sgd(0.1), trainable=TRAINABLE, accumulate=3)
        step(state, make_batch(BOXES, BOX_VALID))
    optimizer = optax.sgd(0.1)
    step = train.make_train_step(
        lambda model, example, *, key: {"loss": WeightedSum(model.bias[0], jnp.ones(()))},
        optimizer,
        trainable=TRAINABLE,
    )
    state = train.init_train_state(toy(getkey()), optimizer, trainable=TRAINABLE, key=getkey())
    with pytest.raises(ValueError, match="has a term 'loss'"):
        step(state, make_batch(BOXES, BOX_VALID))
