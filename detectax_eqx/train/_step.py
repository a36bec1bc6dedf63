"""One update of a model's parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree

from .._types import Batch
from .._xla import step_compiler_options
from ._gradient import Loss, Metrics, mean_gradient, sharded_mean_gradient
from ._state import TrainState, partition


Update = Callable[[Batch, TrainState], tuple[TrainState, Metrics]]
# What a step measures besides the terms of its loss.
METRICS = ("loss", "gradient_norm", "update_norm", "parameter_norm", "overflow", "invalid", "skipped")


class TrainStep:
    """The function `(state, batch) -> (state, metrics)` that `make_train_step` returns."""

    def __init__(self, update: Update):
        self._update = update
        options = {"compiler_options": step_compiler_options()}
        self._compiled = eqx.filter_jit(update, donate="all-except-first", **options)  # pyright: ignore[reportCallIssue]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Within another program, whose options count, it is a part of that.
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch))):
            return self._update(batch, state)
        num_classes = getattr(state.model, "num_classes", None)  # of a detector; a model may be any PyTree
        if num_classes is not None:
            batch.check_labels(num_classes)
        return self._compiled(batch, state)

    def memory(self, state: TrainState, batch: Batch) -> int | None:
        """Bytes that the program for batches of this shape takes on each device, by the compiler's own analysis.

        Counts state, batch, results and intermediates. `None` if the compiler does not say. Compiles the program, which
        calls of the step then use, and runs nothing.
        """
        compiled: Any = self._compiled  # equinox types it as the function
        analysis = compiled.lower(batch, state).compile().compiled.memory_analysis()
        if analysis is None:
            return None
        inputs = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return inputs + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    trainable: PyTree[bool],
    mesh: Mesh | None = None,
    accumulate: int = 1,
    ema_decay: float = 0.999,
) -> TrainStep:
    """A compiled function `(state, batch) -> (state, metrics)` that makes one update.

    - `loss`: `loss(model, example, *, key) -> dict[str, WeightedSum]` for one example, a `Batch` without batch axis.
      Each term is summed over the batch and divided by its summed count, once; the terms are then added. Every box thus
      weighs the same, however boxes are spread over images and images over devices. Counts are constants: no gradient
      flows through them.
    - `trainable`: as for `init_train_state`. Everything else in the model stays bit for bit what it was, whatever the
      optimiser does (weight decay included), and takes no optimiser state.
    - `mesh`: the devices of `shard_state` and `shard_batch`. Every device computes the losses of its own examples, and
      nothing of them leaves it but their sums and gradients.
    - `accumulate`: parts that each device's examples are taken in, one after the other, to save memory. The update is
      that of the whole batch (`mean_gradient` says how, and what it costs).
    - `ema_decay`: of `state.ema`, if the state has one: `ema = decay * ema + (1 - decay) * model`, where `decay` is
      `(1 + step) / (10 + step)` as long as that is less, so that the first, random weights do not dominate the average.

    The step's randomness is `fold_in(state.key, state.step)`, split over the examples. An example that is not
    `batch.images.valid` counts nothing; a batch without any has loss 0.

    An update that is not finite (its loss, gradient or result) is not made: the state stays bit for bit what it was,
    but for `step` and `skipped`, each one more.

    `metrics` are float32 scalars: the mean of each term, `loss` their sum, the norms over all trained parameters
    `gradient_norm`, `update_norm` (of their change) and `parameter_norm` (before it), `overflow` the objects that
    `batch` had no room for, `invalid` its examples that are not valid, `skipped` the updates not made so far.

    If the model says its `num_classes`, as every detector does, a label outside of them is a `ValueError` that names
    label and image (`Batch.check_labels`).

    The state is donated: its memory becomes the next state's, and it must not be used again. One program is compiled
    for each shape of batch and for each canvas; `step.memory(state, batch)` says what it takes.

    Raises a `ValueError` if an option is out of its range, and while tracing if `trainable` marks what has no gradient,
    a term has the name of a metric, or the examples cannot be divided over devices and parts.

    >>> import numpy as np
    >>> from detectax_eqx import Images, Targets, WeightedSum
    >>> def loss(model, example, *, key):
    ...     return {"height": WeightedSum((model - jnp.float32(example.images.sizes[0])) ** 2, jnp.ones(()))}
    >>> targets = Targets(np.zeros((2, 1, 4), "f"), np.zeros((2, 1), "i"), np.zeros((2, 1), bool))
    >>> sizes = np.array([[4, 4], [6, 6]], "i")
    >>> ones = np.ones(2, "i")
    >>> images = Images(np.zeros((2, 8, 8, 3), "u1"), sizes, sizes, indices=ones, valid=ones > 0, canvas=(8, 8))
    >>> batch = Batch(images, targets, overflow=ones)
    >>> from detectax_eqx.train import init_train_state
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.array(0.0), optimizer, trainable=True, key=jr.key(0))
    >>> state, metrics = make_train_step(loss, optimizer, trainable=True)(state, batch)
    >>> float(state.model), float(metrics["loss"])
    (5.0, 26.0)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in 0..1, 1 excluded, got {ema_decay}.")
    gradient_of = mean_gradient if mesh is None else partial(sharded_mean_gradient, mesh=mesh)

    def update(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        parameters, rest = partition(state.model, trainable)
        valid = batch.images.valid
        keys = jr.split(jr.fold_in(state.key, state.step), valid.shape[0])
        terms, gradient = gradient_of(loss, parameters, rest, batch, keys, accumulate=accumulate)
        if taken := sorted(set(terms) & set(METRICS)):
            raise ValueError(f"loss names a term {taken[0]!r}, which is a metric's name; give the term another.")
        state, metrics = _updated(state, optimizer, terms, gradient, parameters, rest, trainable, ema_decay)
        left_out = {
            "overflow": jnp.sum(jnp.where(valid, batch.overflow, 0)).astype(jnp.float32),
            "invalid": jnp.sum(~valid).astype(jnp.float32),
        }
        return state, metrics | left_out

    return TrainStep(update)


def _updated(state, optimizer, terms, gradient, parameters, rest, trainable, ema_decay):
    """The next state and the metrics, of the terms of the loss and the gradient of the trained parameters."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, parameters)
    metrics = terms | {
        "loss": sum(terms.values(), jnp.zeros((), jnp.float32)),
        "gradient_norm": _norm(gradient),
        "update_norm": _norm(updates),
        "parameter_norm": _norm(parameters),
    }
    # All norms, so that every use of the parameters comes before they change: else XLA keeps a copy of them.
    norms = metrics["gradient_norm"] + metrics["update_norm"] + metrics["parameter_norm"]
    finite = jnp.isfinite(metrics["loss"] + norms)
    updated = eqx.apply_updates(parameters, updates)

    def if_finite(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(partial(jnp.where, finite), new, old)

    model = eqx.combine(if_finite(updated, parameters), rest)
    ema = state.ema
    if ema is not None:
        averaged, constant = partition(ema, trainable)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        average = optax.incremental_update(updated, averaged, 1 - decay)
        ema = eqx.combine(if_finite(average, averaged), constant)
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics["skipped"] = skipped.astype(jnp.float32)
    opt_state = if_finite(opt_state, state.opt_state)
    return TrainState(state.step + 1, state.key, model, opt_state, ema, skipped), metrics


def _norm(tree: PyTree) -> Float32[Array, ""]:
    return jnp.asarray(optax.tree.norm(tree), jnp.float32)
