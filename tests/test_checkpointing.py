"""Gradient checkpointing saves memory."""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from detectax_eqx import nn, train


sys.path.append(str(Path(__file__).parents[1] / "experiments"))

from _options import grouped
from compile_for_tpu import lower_step


def scratch_of(program):
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def memory_of(build, loss):
    """Bytes of scratch memory for the gradient of a loss, as the compiled program reports them."""
    shapes, static = eqx.partition(eqx.filter_eval_shape(build), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    gradient = jax.grad(lambda arrays: loss(eqx.combine(arrays, static)))
    return scratch_of(jax.jit(gradient).lower(shapes).compile())


@pytest.mark.slow
def test_checkpointing_saves_memory():
    def make(checkpoint):
        return lambda: nn.resnet50(key=jr.key(0), width=8, checkpoint=checkpoint)

    def energy(model):
        return sum(jnp.sum(x**2) for x in model(jnp.ones((3, 256, 256))))

    assert memory_of(make(True), energy) < 0.7 * memory_of(make(False), energy)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_checkpointing_saves_memory_at_full_size():
    """The training step of train.py for Mask R-CNN R50-FPN on two images of 800×1344, with every layer trained."""
    mesh = train.make_mesh(jax.devices()[:1])

    def memory(**options):
        options = grouped(output=Path(), norm="frozen_batch", batch_size=2, trainable_layers=5, **options)
        program = lower_step(options, (800, 1344), mesh).compile(train.step_compiler_options())
        return scratch_of(program)

    without, with_it = memory(), memory(gradient_checkpointing=True)
    print(f"gradient checkpointing: {without / 2**20:.0f} MiB without, {with_it / 2**20:.0f} MiB with")
    assert with_it < 0.7 * without
