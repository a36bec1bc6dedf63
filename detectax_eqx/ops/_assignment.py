"""Optimal assignment of targets to queries, for losses over sets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from .._xla import varying_like
from ._boxes import upcast


class _Search(NamedTuple):
    """The search for a shortest augmenting path: from target `root` to a query that is free.

    - `duals`: of targets and of queries. `query_of`, `target_of`: the assignment so far; -1 for none.
    - `target`: the one that the path has reached, at the cost `reached`.
    - `cost`: of the cheapest path to each query. `before`: the target before it on that path. `closed`: whether that
      path is known to be the cheapest.
    """

    root: Int32[Array, ""]
    duals: tuple[Float[Array, " t"], Float[Array, " q"]]
    query_of: Int32[Array, " t"]
    target_of: Int32[Array, " q"]
    target: Int32[Array, ""]
    reached: Float[Array, ""]
    cost: Float[Array, " q"]
    before: Int32[Array, " q"]
    closed: Bool[Array, " q"]


def linear_assignment(cost: Float[Array, "t q"], num_valid: Int32[Array, ""]) -> Int32[Array, " t"]:
    """Assigns each of the first `num_valid` targets to a query of its own, so that the sum of costs is minimal.

    Returns the query of each target, and -1 for targets that are not valid. Costs that are not finite count as worse
    than all others. The result has no gradient.

    Shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016, doi:10.1109/TAES.2016.140952), as in
    `scipy.optimize.linear_sum_assignment`, in at most `num_valid * (num_valid + 1) / 2` steps of `q` operations each.
    Under `vmap`, all problems take their steps together: as many as the longest needs.

    Raises a `ValueError` if there are fewer queries than targets.

    >>> cost = jnp.array([[1.0, 2.0, 9.0], [1.0, 5.0, 9.0]])
    >>> linear_assignment(cost, jnp.array(2)).tolist()
    [1, 0]
    >>> linear_assignment(cost, jnp.array(1)).tolist()
    [0, -1]
    """
    targets, queries = cost.shape
    if queries < targets:
        raise ValueError(f"cost must have a query for each target, got {targets} targets and {queries} queries.")
    if not targets:
        return jnp.zeros(0, jnp.int32)
    num_valid = jnp.clip(num_valid, 0, targets)
    costs = _finite(upcast(lax.stop_gradient(cost)), num_valid)
    rows, columns = jnp.arange(targets, dtype=jnp.int32), jnp.arange(queries, dtype=jnp.int32)
    none = -jnp.ones_like(rows), -jnp.ones_like(columns)
    far = jnp.full(queries, jnp.inf, costs.dtype)

    def start(root, duals, query_of, target_of):
        closed = jnp.zeros(queries, bool)
        return _Search(root, duals, query_of, target_of, root, jnp.zeros((), costs.dtype), far, columns * 0, closed)

    def step(search: _Search) -> _Search:
        """Closes the query with the cheapest path. If it is free, assigns along the path and begins the next one."""
        of_targets, of_queries = search.duals
        through = search.reached + costs[search.target] - of_targets[search.target] - of_queries
        cheaper = ~search.closed & (through < search.cost)
        cost, before = jnp.where(cheaper, through, search.cost), jnp.where(cheaper, search.target, search.before)
        query = jnp.argmin(jnp.where(search.closed, jnp.inf, cost)).astype(jnp.int32)
        reached, closed = cost[query], search.closed | (columns == query)
        owner = search.target_of[query]
        longer = search._replace(target=owner, reached=reached, cost=cost, before=before, closed=closed)

        rest = jnp.where(closed, reached - cost, 0)  # by which each closed query is nearer than the end of the path
        of_owner = jnp.where(search.query_of >= 0, rest[search.query_of], 0)
        duals = of_targets + jnp.where(rows == search.root, reached, of_owner), of_queries - rest
        free = owner < 0
        assigned = _assign(search.query_of, search.target_of, before, query, search.root, free)
        done = start(search.root + 1, duals, *assigned)
        return jax.tree.map(lambda new, old: jnp.where(free, new, old), done, longer)

    def goes_on(search: _Search) -> Bool[Array, ""]:
        return search.root < num_valid

    zeros = jnp.zeros(targets, costs.dtype), jnp.zeros(queries, costs.dtype)
    first = varying_like(start(jnp.zeros((), jnp.int32), zeros, *none), costs, num_valid)
    return lax.while_loop(goes_on, step, first).query_of


def _assign(query_of, target_of, before, query, root, free):
    """Assigns along the path that ends at `query`, back to `root`, if the query is `free`."""
    rows, columns = jnp.arange(len(query_of), dtype=jnp.int32), jnp.arange(len(target_of), dtype=jnp.int32)

    def goes_on(state):
        return state[2] >= 0

    def step(state):
        query_of, target_of, query = state
        target = before[query]
        former = jnp.where(target == root, -1, query_of[target])
        return jnp.where(rows == target, query, query_of), jnp.where(columns == query, target, target_of), former

    state = varying_like((query_of, target_of, jnp.where(free, query, -1)), before, root)
    return lax.while_loop(goes_on, step, state)[:2]


def _finite(cost: Float[Array, "t q"], num_valid: Int32[Array, ""]) -> Float[Array, "t q"]:
    """Replaces costs that are not finite by one that no assignment takes if it can do without."""
    finite = jnp.isfinite(cost)
    counted = finite & (jnp.arange(cost.shape[0], dtype=jnp.int32) < num_valid)[:, None]
    high = jnp.max(cost, where=counted, initial=0)
    low = jnp.min(cost, where=counted, initial=0)
    return jnp.where(finite, cost, high + (cost.shape[0] + 1) * (high - low + 1))
