"""Sampling at points, and deformable attention, against a plain loop over points and numerical gradients."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from detectax_eqx import ops


def sampled(x, point):
    """The value of a map `(c, h, w)` at a point in 0..1, by the definition."""
    c, height, width = x.shape
    column, row = point[0] * width - 0.5, point[1] * height - 0.5
    total = np.zeros(c)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * x[:, i, j]
    return total


# Corners and edges of the map, centres of pixels at its border, just outside and far outside.
SPECIAL = [(0, 0), (1, 1), (0, 0.5), (0.5, 1), (0.1, 0.125), (0.9, 0.875), (-0.05, 0.3), (1.08, 0.6), (-3, 0.5), (7, 9)]


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (2, 1, 6)])
def test_points_of_a_map(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    points = np.concatenate([SPECIAL, rng.uniform(-0.2, 1.2, (40, 2))]).astype(np.float32)
    expected = np.stack([sampled(x, point) for point in points])
    np.testing.assert_allclose(ops.point_sample(jnp.asarray(x), jnp.asarray(points)), expected, atol=1e-5)
    found = ops.grid_sample(jnp.asarray(x), jnp.asarray(2 * points - 1).reshape(5, 10, 2))
    np.testing.assert_allclose(found, expected.reshape(5, 10, -1), atol=1e-5)


def attention_inputs(rng, queries=7, heads=2, channels=3, points=4, sizes=((4, 5), (2, 3), (1, 1))):
    value = [jnp.asarray(rng.normal(size=(heads, channels, *size)), jnp.float32) for size in sizes]
    locations = rng.uniform(-0.3, 1.3, (queries, heads, len(sizes), points, 2))
    locations[0, 0, 0, :4], locations[1, 1, :, 0] = SPECIAL[:4], 1.0
    weights = rng.uniform(size=locations.shape[:-1])
    return (
        value,
        jnp.asarray(locations, jnp.float32),
        jnp.asarray(weights / weights.sum((2, 3), keepdims=True), jnp.float32),
    )


def test_deformable_attention():
    value, locations, weights = attention_inputs(np.random.default_rng(0))
    expected = np.zeros((7, 2, 3))
    for query, head, level, point in np.ndindex(weights.shape):
        at = np.asarray(locations)[query, head, level, point]
        expected[query, head] += weights[query, head, level, point] * sampled(np.asarray(value[level])[head], at)
    np.testing.assert_allclose(ops.deformable_attention(value, locations, weights), expected, atol=1e-5)


def on_arrays(function):
    """The function for NumPy arrays, which `check_grads` passes."""
    return lambda *inputs: function(*jax.tree.map(jnp.asarray, inputs))


def test_gradients():
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: x.astype(jnp.float64), attention_inputs(np.random.default_rng(1), queries=3))
        value, locations, weights = inputs
        inputs = value, locations + 0.0123, weights  # away from the centres of pixels, where the derivative jumps
        check_grads(on_arrays(ops.deformable_attention), inputs, order=1, modes=["fwd", "rev"], eps=1e-6)
        x, points = inputs[0][0][0], inputs[1][:, 0, 0, 0]
        check_grads(on_arrays(ops.point_sample), (x, points), order=1, modes=["fwd", "rev"], eps=1e-6)


def test_one_query_in_bfloat16_keeps_its_points():
    """Coordinates are computed in float32: in bfloat16 a point would be several pixels off."""
    x = jnp.arange(512, dtype=jnp.float32)[None, None]
    point = jnp.array([[300.5 / 512, 0.5]])
    assert ops.point_sample(x.astype(jnp.bfloat16), point).item() == 300


def test_there_must_be_a_map_for_each_level(getkey):
    value, locations, weights = attention_inputs(np.random.default_rng(0))
    with pytest.raises(ValueError, match="a map for each of the 3 levels of locations, got 2"):
        ops.deformable_attention(value[:2], locations, weights)


def test_under_vmap(getkey):
    x, points = jr.normal(getkey(), (2, 3, 4, 5)), jr.uniform(getkey(), (2, 6, 2))
    together = jax.vmap(ops.point_sample)(x, points)
    np.testing.assert_allclose(together, [ops.point_sample(*pair) for pair in zip(x, points, strict=True)], atol=1e-6)
