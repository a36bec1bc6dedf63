"""Computing in bfloat16 trains as float32 does; gradient checkpointing saves the memory that it is for."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, train

from .tiny_detector import build, loss, make_batch


STEPS = 12


@cache
def history(dtype):
    """The metrics of each step of a run whose convolutions and products are computed in `dtype`."""

    def cast_loss(model, example, *, key):
        terms = loss(nn.cast(model, dtype), example, key=key)
        assert all(term.total.dtype == jnp.float32 for term in terms.values())
        return terms

    model, optimizer = build(), train.sgd(0.002)
    trainable = models.trainable(model)
    step = train.make_train_step(cast_loss, optimizer, trainable=trainable)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1))
    found = []
    for k in range(STEPS):
        state, metrics = step(state, make_batch(k % 4))
        found.append({name: float(value) for name, value in metrics.items()})
    floats = [leaf for leaf in jax.tree.leaves((state.model, state.opt_state)) if eqx.is_inexact_array(leaf)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    return found


def test_losses_in_bfloat16_follow_those_in_float32():
    full, half = history("float32"), history("bfloat16")
    losses = np.array([[run[k]["loss"] for k in range(STEPS)] for run in (full, half)])
    assert losses[0, -4:].mean() < 0.8 * losses[0, :4].mean()  # it learns
    assert (losses[0] != losses[1]).all()  # and computes in another dtype
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert all(run[-1]["skipped"] == 0 for run in (full, half))


def memory_of(build, loss):
    """Bytes of scratch memory that the gradient of a loss takes, by the compiled program's own account."""
    shapes, static = eqx.partition(eqx.filter_eval_shape(build), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    gradient = jax.grad(lambda arrays: loss(eqx.combine(arrays, static)))
    return jax.jit(gradient).lower(shapes).compile().memory_analysis().temp_size_in_bytes


def test_checkpointing_saves_memory():
    def make(checkpoint):
        return lambda: nn.resnet50(key=jr.key(0), width=8, norm=nn.GroupNorm, checkpoint=checkpoint)

    def energy(model):
        return sum(jnp.sum(x**2) for x in model(jnp.ones((3, 256, 256))))

    assert memory_of(make(True), energy) < 0.7 * memory_of(make(False), energy)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_checkpointing_saves_memory_at_full_size():
    """The losses of Mask R-CNN R50-FPN on one image of 800×1344, every layer trained."""

    def make(checkpoint):
        return lambda: models.mask_rcnn_resnet50_fpn(80, key=jr.key(0), checkpoint=checkpoint)

    def total(model):
        example = jax.tree.map(lambda x: jnp.asarray(x[0]), make_batch(0))
        size = jnp.array([800, 1344], jnp.int32)
        image = jnp.zeros((800, 1344, 3))
        terms = models.mask_rcnn_loss(model, image, size, example.targets, key=jr.key(0))
        return sum(term.mean() for term in terms.values())

    without, with_it = (memory_of(make(checkpoint), total) for checkpoint in (False, True))
    print(f"gradient checkpointing: {without / 2**20:.0f} MiB without, {with_it / 2**20:.0f} MiB with")
    assert with_it < 0.7 * without
