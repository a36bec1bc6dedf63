"""The mean losses of a batch and their gradient, on one or many devices, with optional gradient accumulation."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Key, PyTree

from .._types import Batch, WeightedSum
from ._sharding import AXES, gather_pieces, num_parts, state_specs, sum_over_parts, sum_to_pieces


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
    """The sum of every loss term over the batch divided by its count, and the gradient of the sum of all terms.

    - `accumulate`: the number of parts to split the batch into. The gradient of each part must be divided by a term's
      count over the whole batch, which depends on the proposals of all parts. So the counts of all parts are computed
      first, in a forward pass that evaluates only what the counts depend on (for a two-stage detector, everything up to
      the sampled proposals, without the heads). The gradient of each part is then exact, and only the sum of the
      gradients has to be kept.
    - `add_up`: sums counts over devices. The terms and the gradient returned are those of this device's examples.
    """
    examples = _stand_in(batch), keys, batch.images.valid

    def sums(parameters: PyTree, part: tuple) -> tuple[Metrics, Metrics]:
        """Totals and counts of one part. The counts have no gradient."""
        example, keys, valid = part
        model = eqx.combine(parameters, rest)
        terms = jax.vmap(lambda example, key: loss(model, example, key=key))(example, keys)
        totals = {name: jnp.sum(jnp.where(valid, term.total, 0.0)) for name, term in terms.items()}
        counts = {name: jnp.sum(jnp.where(valid, term.count, 0.0)) for name, term in terms.items()}
        return totals, lax.stop_gradient(counts)

    def gradient(part: tuple, counts: Metrics | None = None) -> tuple[Metrics, PyTree]:
        def objective(parameters: PyTree) -> tuple[Float32[Array, ""], Metrics]:
            totals, local_counts = sums(parameters, part)
            global_counts = add_up(local_counts) if counts is None else counts
            terms = {name: WeightedSum(total, global_counts[name]).mean() for name, total in totals.items()}
            return sum(terms.values(), jnp.zeros((), jnp.float32)), terms

        (_, terms), gradient = jax.value_and_grad(objective, has_aux=True)(parameters)
        any_valid = jnp.any(part[2])
        return terms, jax.tree.map(lambda x: jnp.where(any_valid, x, jnp.zeros_like(x)), gradient)

    if accumulate == 1:
        return gradient(examples)
    count = batch.images.valid.shape[0]
    if count % accumulate:
        raise ValueError(f"accumulate must divide the {count} examples of each device, got {accumulate}.")
    # (b, ...) -> (accumulate, b / accumulate, ...)
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
    """`mean_gradient` of a batch and parameters that are sharded over a mesh. The gradient is sharded as they are.

    The devices run under `shard_map`, with all communication written explicitly. Automatic partitioning may gather the
    batch for a sort or a loop under `vmap`, and needs a collective in every iteration of a loop to end it on all
    devices together.
    """
    count = batch.images.valid.shape[0]
    if count % num_parts(mesh):
        raise ValueError(f"a batch of {count} examples cannot be divided into {num_parts(mesh)} parts, see make_mesh.")
    constants, static = eqx.partition(rest, eqx.is_array)
    specs = state_specs((parameters, constants), mesh)
    examples = PartitionSpec(AXES)

    def local(arrays: tuple[PyTree, PyTree], batch: Batch, keys: Key[Array, " b"]) -> tuple[Metrics, PyTree]:
        parameters, constants = gather_pieces(arrays, specs)
        model = parameters, eqx.combine(constants, static)
        terms, gradient = mean_gradient(loss, *model, batch, keys, accumulate=accumulate, add_up=sum_over_parts)
        return sum_over_parts(terms), sum_to_pieces(gradient, specs[0])

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, examples, examples), out_specs=(PartitionSpec(), specs[0]), check_vma=False
    )
    return run((parameters, constants), batch, keys)


def _stand_in(batch: Batch) -> Batch:
    """Replaces the invalid examples of a batch by its first valid example.

    Padding may hold any values, also some at which a derivative is infinite. Multiplied by 0, that would be NaN.
    """
    first = jnp.argmax(batch.images.valid)

    def fill(x: Array) -> Array:
        return jnp.where(batch.images.valid.reshape(-1, *[1] * (x.ndim - 1)), x, x[first][None])

    return jax.tree.map(fill, batch)
