"""Learning rates against closed forms, and optimisers against float64 loops that follow torch's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx.train import adamw, scale_learning_rate, sgd, warmup_cosine, warmup_multistep


def test_multistep_follows_torchvisions_recipe():
    schedule = jax.jit(warmup_multistep(0.02, milestones=[40, 55], warmup_steps=10, warmup_factor=1e-3))
    for t in range(70):
        warmup = min(1.0, 1e-3 + (1 - 1e-3) * t / 10)
        expected = 0.02 * warmup * 0.1 ** ((t >= 40) + (t >= 55))
        np.testing.assert_allclose(schedule(jnp.asarray(t)), expected, rtol=1e-6)


def test_cosine():
    schedule = jax.jit(warmup_cosine(0.5, total_steps=50, warmup_steps=10, warmup_factor=0.1, final_factor=0.2))
    for t in range(60):
        warmup = min(1.0, 0.1 + 0.9 * t / 10)
        done = np.clip((t - 10) / 40, 0, 1)
        expected = 0.5 * warmup * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * done)))
        np.testing.assert_allclose(schedule(jnp.asarray(t)), expected, rtol=1e-5)


def test_without_warmup_or_milestones():
    assert float(np.asarray(warmup_multistep(0.5, milestones=[], warmup_steps=0)(0))) == 0.5
    assert float(np.asarray(warmup_cosine(0.5, total_steps=4, warmup_steps=0)(0))) == 0.5
    assert float(np.asarray(warmup_multistep(0.5, milestones=[2], warmup_steps=0, decay=0.5)(2))) == 0.25


def test_learning_rate_scales_with_the_batch():
    assert scale_learning_rate(0.02, batch_size=16) == 0.02
    assert scale_learning_rate(0.02, batch_size=64) == 0.08


def test_refusals():
    with pytest.raises(ValueError, match="less than total_steps, got 10 and 10"):
        warmup_cosine(0.1, total_steps=10, warmup_steps=10)
    with pytest.raises(ValueError, match=r"warmup_factor must be in 0..1, got 2"):
        warmup_multistep(0.1, milestones=[], warmup_factor=2.0)
    with pytest.raises(ValueError, match="warmup_steps must not be negative, got -1"):
        warmup_multistep(0.1, milestones=[], warmup_steps=-1)
    with pytest.raises(ValueError, match="batch sizes must be positive, got 0"):
        scale_learning_rate(0.1, batch_size=0)


SCHEDULE = warmup_multistep(0.1, milestones=[6], warmup_steps=4)


def _optimized(optimizer, gradients):
    parameter = jnp.arange(1.0, 4.0)
    state = optimizer.init(parameter)
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, parameter)
        parameter = parameter + update
    return parameter


def test_sgd_is_torchs():
    """Weight decay is added to the gradient before momentum; the learning rate multiplies the result."""
    gradients = np.random.default_rng(0).normal(size=(10, 3))
    p, v = np.arange(1.0, 4.0), np.zeros(3)
    for t, gradient in enumerate(gradients):
        v = 0.9 * v + gradient + 0.05 * p
        p = p - float(np.asarray(SCHEDULE(t))) * v
    np.testing.assert_allclose(_optimized(sgd(SCHEDULE, weight_decay=0.05), gradients), p, rtol=1e-5)


def test_adamw_is_torchs():
    gradients = np.random.default_rng(1).normal(size=(10, 3))
    p, m, v = np.arange(1.0, 4.0), np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(gradients):
        rate = float(np.asarray(SCHEDULE(t)))
        p = p * (1 - rate * 0.05)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        p = p - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    np.testing.assert_allclose(_optimized(adamw(SCHEDULE, weight_decay=0.05), gradients), p, rtol=1e-5)
