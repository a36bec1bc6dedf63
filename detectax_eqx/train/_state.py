"""The state of a training run, as one PyTree."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Int32, Key, PyTree


class TrainState(eqx.Module):
    """The state of a training run, which a train step updates and a checkpoint stores.

    - `step`: number of batches seen so far.
    - `key`: a typed key (`jax.random.key`). It does not change; each step folds `step` into it.
    - `model`: the model with all its parameters, trained or not.
    - `opt_state`: the optimiser's state, for the trained parameters only.
    - `ema`: exponential moving average of `model`, or `None`.
    - `skipped`: number of batches whose update was skipped because it was not finite.
    """

    step: Int32[Array, ""]
    key: Key[Array, ""]
    model: PyTree
    opt_state: PyTree
    ema: PyTree
    skipped: Int32[Array, ""]

    @property
    def inference_model(self) -> PyTree:
        """The model to evaluate and to export: `ema`, or `model` if there is no average."""
        return self.model if self.ema is None else self.ema


def init_train_state(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    trainable: PyTree[bool],
    key: Key[Array, ""],
    ema: bool = False,
) -> TrainState:
    """The state before the first step.

    The arrays are copied, so that `model` remains usable although the train step donates its state.

    - `trainable`: a tree with the structure of `model` or a prefix of it, true at the parameters to train.
    - `ema`: whether to keep an exponential moving average of the model, which starts as a copy of it.

    Raises a `ValueError` that names the leaf if `trainable` is true at a leaf that is not an array of floats.

    >>> import equinox as eqx
    >>> model = eqx.nn.Linear(3, 2, key=jr.key(0))
    >>> state = init_train_state(model, optax.sgd(0.1), trainable=True, key=jr.key(1))
    >>> int(state.step), state.model.weight.shape
    (0, (2, 3))
    """
    return _start(model, model if ema else None, key, trainable, optimizer.init)


@eqx.filter_jit
def _start(model, average, key, trainable, init_optimizer):
    """Compiled as a whole: separate programs for each shape would take 100 MB."""
    model, key, average = jax.tree.map(lambda leaf: _copy(leaf) if eqx.is_array(leaf) else leaf, (model, key, average))
    parameters, _ = partition(model, trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, key, model, init_optimizer(parameters), average, jnp.zeros_like(zero))


def partition(model: PyTree, trainable: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """Splits a model into the trained parameters and the rest. Each has `None` where the other has a leaf.

    Raises a `ValueError` that names the leaf if `trainable` is true at a leaf that is not an array of floats.
    """
    parameters, rest = eqx.partition(model, trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if not eqx.is_inexact_array(leaf):
            what = f"an array of {leaf.dtype}" if eqx.is_array(leaf) else f"of type {type(leaf).__name__}"
            raise ValueError(
                f"trainable marks model{jax.tree_util.keystr(path)}, which is {what}; only arrays of floats have a "
                f"gradient. Make it false there."
            )
    return parameters, rest


def _copy(leaf: Array) -> Array:
    """Copies an array without a weak type, which the first update would change, so that the step would be retraced."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jr.clone(leaf)
    return jnp.array(leaf, dtype=leaf.dtype)
