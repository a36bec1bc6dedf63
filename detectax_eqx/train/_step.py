"""One update of a model's parameters."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.core import Tracer
from jaxtyping import Array, Float32, Key, PyTree

from .._types import Batch, WeightedSum
from ._state import TrainState, partition


Loss = Callable[..., dict[str, WeightedSum]]
Metrics = dict[str, Float32[Array, ""]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# XLA's schedule for a CPU starts all that it can at once and holds the results: a fifth more memory for no less time.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
RESERVED = ("loss", "gradient_norm", "overflow")


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, *, trainable: PyTree[bool]) -> Step:
    """A compiled function `(state, batch) -> (state, metrics)` that makes one update.

    - `loss`: `loss(model, example, *, key) -> dict[str, WeightedSum]` for one example, a `Batch` without batch axis.
      Each term is summed over the batch and divided by its summed count, once; the terms are then added. Every box thus
      weighs the same, however boxes are spread over images and images over devices.
    - `trainable`: as for `init_train_state`. Everything else in the model stays bit for bit what it was, whatever the
      optimiser does (weight decay included), and takes no optimiser state.

    The step's randomness is `fold_in(state.key, state.step)`, split over the examples. An example that is not
    `batch.valid` counts nothing; a batch without any has loss 0. `metrics` are float32 scalars: the mean of each term,
    `loss` their sum, `gradient_norm` over all trained parameters, `overflow` the objects that `batch` had no room for.

    The state is donated: its memory becomes the next state's, and it must not be used again. One program is compiled
    for each shape of batch and for each canvas.

    Raises a `ValueError` while tracing if `trainable` marks what has no gradient, or a term has the name of a metric.

    >>> import numpy as np
    >>> from detectax_eqx import Targets
    >>> def loss(model, example, *, key):
    ...     error = model - example.image_sizes[0].astype(jnp.float32)
    ...     return {"height": WeightedSum(error**2, jnp.ones(()))}
    >>> targets = Targets(np.zeros((2, 1, 4), "f"), np.zeros((2, 1), "i"), np.zeros((2, 1), bool))
    >>> sizes = np.array([[4, 4], [6, 6]], "i")
    >>> batch = Batch(np.zeros((2, 8, 8, 3), "u1"), sizes, sizes, targets, np.arange(2, dtype="i"),
    ...               np.ones(2, bool), np.zeros(2, "i"), (8, 8))
    >>> from detectax_eqx.train import init_train_state
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.array(0.0), optimizer, trainable=True, key=jr.key(0))
    >>> state, metrics = make_train_step(loss, optimizer, trainable=True)(state, batch)
    >>> float(state.model), float(metrics["loss"])
    (5.0, 26.0)
    """

    def update(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        parameters, rest = partition(state.model, trainable)
        keys = jr.split(jr.fold_in(state.key, state.step), batch.valid.shape[0])

        def objective(parameters: PyTree) -> tuple[Float32[Array, ""], Metrics]:
            terms = _mean_losses(loss, eqx.combine(parameters, rest), batch, keys)
            return sum(terms.values(), jnp.zeros(())), terms

        (total, terms), gradient = jax.value_and_grad(objective, has_aux=True)(parameters)
        updates, opt_state = optimizer.update(gradient, state.opt_state, parameters)
        model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
        metrics = terms | {
            "loss": total,
            "gradient_norm": jnp.asarray(optax.tree.norm(gradient), jnp.float32),
            "overflow": jnp.sum(jnp.where(batch.valid, batch.overflow, 0)).astype(jnp.float32),
        }
        return TrainState(state.step + 1, state.key, model, opt_state), metrics

    options = {"compiler_options": step_compiler_options()}
    compiled = eqx.filter_jit(update, donate="all-except-first", **options)  # pyright: ignore[reportCallIssue]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Within another program, whose options count, it is a part of that.
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch)))
        return update(batch, state) if nested else compiled(batch, state)

    return step


def step_compiler_options() -> dict[str, str]:
    """The options of XLA that `make_train_step` compiles with, for who compiles the step within a program of their own.

    >>> isinstance(step_compiler_options(), dict)
    True
    """
    return CPU_OPTIONS if jax.default_backend() == "cpu" else {}


def _mean_losses(loss: Loss, model: PyTree, batch: Batch, keys: Key[Array, " b"]) -> Metrics:
    """Every loss term over the batch, divided once."""
    # A filler may hold anything. It stands in for the first real example rather than run on its own data, whose
    # derivative could be infinite: zero times that is not zero.
    first = jnp.argmax(batch.valid)

    def fill(x: Array) -> Array:
        return jnp.where(batch.valid.reshape(-1, *[1] * (x.ndim - 1)), x, x[first][None])

    examples = jax.tree.map(fill, batch)
    sums = jax.vmap(lambda example, key: loss(model, example, key=key))(examples, keys)
    if taken := sorted(set(sums) & set(RESERVED)):
        raise ValueError(f"loss names a term {taken[0]!r}, which is the name of a metric; give the term another name.")
    return {
        name: WeightedSum(
            jnp.sum(jnp.where(batch.valid, term.total, 0.0)), jnp.sum(jnp.where(batch.valid, term.count, 0.0))
        ).mean()
        for name, term in sums.items()
    }
