"""The mean losses of a batch and their gradient, on one device or many, at once or in parts."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Key, PyTree

from .._types import Batch, WeightedSum
from ._sharding import AXES, gather_pieces, state_spec, sum_to_pieces


Loss = Callable[..., dict[str, WeightedSum]]
Metrics = dict[str, Float32[Array, ""]]


def mean_gradient(
    loss: Loss,
    parameters: PyTree,
    rest: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    *,
    accumulate: int,
    add_up: Callable[[Metrics], Metrics] = lambda sums: sums,
) -> tuple[Metrics, PyTree]:
    """Every loss term's sum over the batch, divided once by its count, and the gradient of their sum.

    - `accumulate`: parts to take the batch in. A term's count over the whole batch is what every part's gradient must
      be divided by, and it depends on all parts' proposals. So all parts are counted first, in a forward pass that has
      what the counts need and no more (for a two-stage detector, all up to the sampled proposals, the heads not). Each
      part's gradient is then exact, and one sum of gradients is all there is to keep.
    - `add_up`: adds counts over devices. Sums and gradient returned are those of this device's examples.
    """
    examples = _stand_in(batch), keys, batch.images.valid

    def sums(parameters: PyTree, part: tuple) -> tuple[Metrics, Metrics]:
        """Totals and counts, which have no gradient."""
        example, keys, valid = part
        model = eqx.combine(parameters, rest)
        terms = jax.vmap(lambda example, key: loss(model, example, key=key))(example, keys)
        totals = {name: jnp.sum(jnp.where(valid, term.total, 0.0)) for name, term in terms.items()}
        counts = {name: jnp.sum(jnp.where(valid, term.count, 0.0)) for name, term in terms.items()}
        return totals, lax.stop_gradient(counts)

    def gradient(part: tuple, counts: Metrics | None = None) -> tuple[Metrics, PyTree]:
        def objective(parameters: PyTree) -> tuple[Float32[Array, ""], Metrics]:
            totals, own = sums(parameters, part)
            whole = add_up(own) if counts is None else counts
            terms = {name: WeightedSum(total, whole[name]).mean() for name, total in totals.items()}
            return sum(terms.values(), jnp.zeros((), jnp.float32)), terms

        (_, terms), gradient = jax.value_and_grad(objective, has_aux=True)(parameters)
        some = jnp.any(part[2])
        return terms, jax.tree.map(lambda x: jnp.where(some, x, jnp.zeros_like(x)), gradient)

    if accumulate == 1:
        return gradient(examples)
    count = batch.images.valid.shape[0]
    if count % accumulate:
        raise ValueError(f"accumulate must divide the {count} examples of each device, got {accumulate}.")
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), examples)
    counts = lax.map(lambda part: sums(parameters, part)[1], parts)
    counts = add_up(jax.tree.map(partial(jnp.sum, axis=0), counts))

    def add(total: tuple[Metrics, PyTree], part: tuple) -> tuple[tuple[Metrics, PyTree], None]:
        return jax.tree.map(jnp.add, total, gradient(part, counts)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, (counts, parameters)), parts)[0]


def sharded_mean_gradient(
    loss: Loss,
    parameters: PyTree,
    rest: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    *,
    accumulate: int,
    mesh: Mesh,
) -> tuple[Metrics, PyTree]:
    """`mean_gradient` of a batch and of parameters that are spread over a mesh; the gradient is spread as those are.

    Each device runs a program of its own: all communication between them is written here. Left to the compiler, a sort
    or a loop under `vmap` may gather the batch, and loops end together at the price of one message per round.
    """
    count = batch.images.valid.shape[0]
    if count % mesh.size:
        raise ValueError(f"a batch of {count} examples cannot be divided over {mesh.size} devices.")
    constants, static = eqx.partition(rest, eqx.is_array)
    specs = jax.tree.map(lambda leaf: state_spec(leaf.shape, mesh), (parameters, constants))
    examples = PartitionSpec(AXES)

    def local(arrays: tuple[PyTree, PyTree], batch: Batch, keys: Key[Array, " b"]) -> tuple[Metrics, PyTree]:
        parameters, constants = gather_pieces(arrays, specs)
        add_up = partial(lax.psum, axis_name=AXES)
        terms, gradient = mean_gradient(
            loss, parameters, eqx.combine(constants, static), batch, keys, accumulate=accumulate, add_up=add_up
        )
        return add_up(terms), sum_to_pieces(gradient, specs[0])

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, examples, examples), out_specs=(PartitionSpec(), specs[0]), check_vma=False
    )
    return run((parameters, constants), batch, keys)


def _stand_in(batch: Batch) -> Batch:
    """The batch with its first valid example in the place of those that are not.

    A filler may hold anything, such as what has an infinite derivative: zero times that is not zero.
    """
    first = jnp.argmax(batch.images.valid)

    def fill(x: Array) -> Array:
        return jnp.where(batch.images.valid.reshape(-1, *[1] * (x.ndim - 1)), x, x[first][None])

    return jax.tree.map(fill, batch)
