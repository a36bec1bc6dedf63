"""Assignments are those of least cost, with ties, padding and costs that are not finite, alone and in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from detectax_eqx import ops


def least(cost):
    return cost[linear_sum_assignment(cost)].sum()


def check(found, cost, count):
    """Fails unless each valid target has a query of its own and the sum of costs is least."""
    found, cost = np.asarray(found), np.asarray(cost, np.float64)[:count]
    assert (found[count:] == -1).all()
    assert len(set(found[:count])) == count and (found[:count] >= 0).all() and (found[:count] < cost.shape[1]).all()
    best = least(cost)
    assert cost[np.arange(count), found[:count]].sum() <= best + 1e-5 * max(1, abs(best))


def problems(rng, shape, kind):
    """Costs of 100 problems: any numbers, small integers with many ties, equal rows, or one and the same number."""
    size = (100, *shape)
    if kind == "any":
        return rng.normal(size=size) * 10
    if kind == "integers":
        return rng.integers(0, 4, size).astype(float)
    if kind == "rows":
        return np.repeat(rng.normal(size=(100, 1, shape[1])), shape[0], axis=1)
    return np.full(size, 3.0)


SHAPES = [(1, 1), (3, 3), (5, 8), (12, 12), (12, 40)]


@pytest.mark.parametrize("kind", ["any", "integers", "rows", "equal"])
@pytest.mark.parametrize("shape", [*SHAPES[:4], pytest.param(SHAPES[4], marks=pytest.mark.slow)])
def test_the_least_cost(shape, kind):
    rng = np.random.default_rng(0)
    solve = jax.jit(jax.vmap(ops.linear_assignment))
    for counts in (np.zeros(100), np.ones(100), np.full(100, shape[0]), rng.integers(0, shape[0] + 1, 100)):
        cost, counts = problems(rng, shape, kind).astype(np.float32), counts.astype(np.int32)
        for one, matrix, count in zip(solve(cost, counts), cost, counts, strict=True):
            check(one, matrix, count)


def test_a_problem_alone_as_in_a_batch():
    cost = np.random.default_rng(1).normal(size=(4, 6, 9)).astype(np.float32)
    together = jax.vmap(ops.linear_assignment, in_axes=(0, None))(jnp.asarray(cost), jnp.array(6))
    alone = [ops.linear_assignment(jnp.asarray(one), jnp.array(6)) for one in cost]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_taken_last(value):
    cost = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32) * 100
    expected = cost.copy()
    cost[0, :3], cost[1, 3], expected[0, :3], expected[1, 3] = value, value, 1e6, 1e6
    check(ops.linear_assignment(jnp.asarray(cost), jnp.array(3)), expected, 3)
    everywhere = ops.linear_assignment(jnp.full((3, 4), value, jnp.float32), jnp.array(2))
    assert sorted(everywhere[:2].tolist()) == [0, 1] and everywhere[2] == -1


def test_costs_that_are_not_finite_in_padding_change_nothing():
    cost = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    padded = cost.copy()
    padded[2:] = np.nan
    found = ops.linear_assignment(jnp.asarray(padded), jnp.array(2))
    np.testing.assert_array_equal(found, ops.linear_assignment(jnp.asarray(cost), jnp.array(2)))


def test_large_costs_keep_small_differences():
    """Costs of 1e5 whose differences are 1: float32 alone keeps them."""
    cost = 1e5 + np.random.default_rng(4).integers(0, 100, (20, 30)).astype(np.float32)
    check(ops.linear_assignment(jnp.asarray(cost), jnp.array(20)), cost, 20)


def test_there_is_no_gradient():
    cost = jnp.ones((2, 3))
    gradient = jax.grad(lambda cost: cost[jnp.arange(2), ops.linear_assignment(cost, jnp.array(2))].sum())(cost)
    assert gradient.sum() == 2 and (gradient >= 0).all()


def test_more_targets_than_queries_are_refused():
    with pytest.raises(ValueError, match="a query for each target, got 3 targets and 2 queries"):
        ops.linear_assignment(jnp.zeros((3, 2)), jnp.array(1))
    assert ops.linear_assignment(jnp.zeros((0, 2)), jnp.array(0)).shape == (0,)
