"""The train step: one update of a model's parameters."""

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
# The metrics of a step other than the terms of its loss.
METRICS = ("loss", "gradient_norm", "update_norm", "parameter_norm", "overflow", "invalid", "skipped")


class TrainStep:
    """The function `(state, batch) -> (state, metrics)` that `make_train_step` returns."""

    def __init__(self, update: Update):
        self._update = update
        options = {"compiler_options": step_compiler_options()}
        self._compiled = eqx.filter_jit(update, donate="all-except-first", **options)  # pyright: ignore[reportCallIssue]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Within an outer `jax.jit`, call the function itself: the options of the outer program apply.
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch))):
            return self._update(batch, state)
        num_classes = getattr(state.model, "num_classes", None)  # a model may be any PyTree
        if num_classes is not None:
            batch.check_labels(num_classes)
        return self._compiled(batch, state)

    def memory(self, state: TrainState, batch: Batch) -> int | None:
        """The bytes per device that the program for batches of this shape needs, as reported by the compiler.

        The figure includes the state, the batch, the results and the intermediates. It is `None` if the compiler
        reports none. The program is compiled but not run, and later calls of the step reuse it.
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
    """Makes a compiled function `(state, batch) -> (state, metrics)` that performs one update.

    - `loss`: `loss(model, example, *, key) -> dict[str, WeightedSum]` for one example, a `Batch` without a batch axis.
      Each term is summed over the batch and divided once by its summed count; the loss is the sum of these means. Every
      box therefore has the same weight, however boxes are distributed over images and images over devices. Counts are
      constants: no gradient flows through them.
    - `trainable`: as for `init_train_state`. All other leaves of the model stay bit for bit the same, whatever the
      optimiser does (including weight decay), and have no optimiser state.
    - `mesh`: the mesh of `shard_state` and `shard_batch`. Each device computes the losses of its own examples, and only
      their sums and gradients are communicated.
    - `accumulate`: the number of parts into which each device's examples are split and processed in sequence, to save
      memory. The update is that of the whole batch. `mean_gradient` documents the method and its cost.
    - `ema_decay`: the decay of `state.ema`, if the state has one: `ema = decay * ema + (1 - decay) * model`, where
      `decay` is the smaller of `ema_decay` and `(1 + step) / (10 + step)`, so that the first, random weights do not
      dominate the average.

    The random key of a step is `fold_in(state.key, state.step)`, split over the examples. Examples with
    `batch.images.valid` false do not contribute; a batch without valid examples has loss 0.

    An update is skipped if its loss, gradient or result is not finite. The state then stays bit for bit the same,
    except that `step` and `skipped` each increase by 1.

    `metrics` are float32 scalars:

    - the mean of each term; `loss`, their sum; `skipped`, the number of updates skipped so far;
    - `gradient_norm`, `update_norm` and `parameter_norm` (before the update), over all trained parameters;
    - `overflow`, the number of objects beyond the capacity of `batch`, and `invalid`, that of its invalid examples.

    If the model has `num_classes`, as every detector does, a label out of its range raises a `ValueError` that names
    label and image (`Batch.check_labels`).

    The state is donated: its memory is reused for the next state, and it must not be used again. One program is
    compiled per batch shape and canvas; `step.memory(state, batch)` returns the memory that it needs.

    Raises a `ValueError` if an option is out of its range. During tracing, raises a `ValueError` if `trainable` is true
    at a leaf without a gradient, if a term has the name of a metric, or if the examples cannot be divided over the
    devices and parts.

    >>> import numpy as np
    >>> from detectax_eqx import Images, Targets, WeightedSum
    >>> def loss(model, example, *, key):
    ...     return {"height": WeightedSum((model - jnp.float32(example.images.sizes[0])) ** 2, jnp.ones(()))}
    >>> targets = Targets(np.zeros((2, 1, 4), "f"), np.zeros((2, 1), "i"), np.zeros((2, 1), bool))
    >>> sizes, ones = np.array([[4, 4], [6, 6]], "i"), np.ones(2, "i")
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
            raise ValueError(f"loss has a term {taken[0]!r}, which is the name of a metric; rename the term.")
        state, metrics = _updated(state, optimizer, terms, gradient, parameters, rest, trainable, ema_decay)
        overflow, invalid = jnp.where(valid, batch.overflow, 0).sum(), (~valid).sum()
        return state, metrics | {"overflow": overflow.astype(jnp.float32), "invalid": invalid.astype(jnp.float32)}

    return TrainStep(update)


def _updated(state, optimizer, terms, gradient, parameters, rest, trainable, ema_decay):
    """The next state and the metrics, given the loss terms and the gradient of the trained parameters."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, parameters)
    metrics = terms | {
        "loss": sum(terms.values(), jnp.zeros((), jnp.float32)),
        "gradient_norm": _norm(gradient),
        "update_norm": _norm(updates),
        "parameter_norm": _norm(parameters),
    }
    # `finite` depends on all norms, so that the parameters are last read before they are updated in place. Otherwise
    # a copy of them would be kept.
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
