"""Gradient checkpointing saves the memory that it is for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from detectax_eqx import models, nn

from .tiny_detector import make_batch


def memory_of(build, loss):
    """Bytes of scratch memory that the gradient of a loss takes, by the compiled program's own account."""
    shapes, static = eqx.partition(eqx.filter_eval_shape(build), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    gradient = jax.grad(lambda arrays: loss(eqx.combine(arrays, static)))
    return jax.jit(gradient).lower(shapes).compile().memory_analysis().temp_size_in_bytes


def test_checkpointing_saves_memory():
    def make(checkpoint):
        return lambda: nn.resnet18(key=jr.key(0), width=8, checkpoint=checkpoint)

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
