"""Everything that a training run consists of, as one PyTree."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Int32, Key, PyTree


class TrainState(eqx.Module):
    """A training run at one moment: what a step maps to the next, and what a checkpoint holds.

    - `step`: number of batches seen so far.
    - `key`: a typed key (`jax.random.key`); it stays the same, and `step` is folded into it.
    - `model`: all parameters, trained or not.
    - `opt_state`: the optimiser's state, for trained parameters only.
    - `ema`: exponential moving average of `model`, or `None`.
    - `skipped`: number of batches that made no update, since it was not finite.
    """

    step: Int32[Array, ""]
    key: Key[Array, ""]
    model: PyTree
    opt_state: PyTree
    ema: PyTree
    skipped: Int32[Array, ""]

    @property
    def inference_model(self) -> PyTree:
        """The model to evaluate and to export: the average if there is one."""
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

    The arrays are copied, so that `model` stays usable although a step consumes the state it is given.

    - `trainable`: a tree like `model` (or a prefix of it), true at the parameters to train.
    - `ema`: keep an average of the model; it starts as a copy.

    Raises a `ValueError` that names the leaf if `trainable` marks anything but an array of floats.

    >>> import equinox as eqx
    >>> model = eqx.nn.Linear(3, 2, key=jr.key(0))
    >>> state = init_train_state(model, optax.sgd(0.1), trainable=True, key=jr.key(1))
    >>> int(state.step), state.model.weight.shape
    (0, (2, 3))
    """
    return _start(model, model if ema else None, key, trainable, optimizer.init)


@eqx.filter_jit
def _start(model, average, key, trainable, init_optimizer):
    """All in one program: those of every shape on its own would take 100 MB."""
    model, key, average = jax.tree.map(lambda leaf: _copy(leaf) if eqx.is_array(leaf) else leaf, (model, key, average))
    parameters, _ = partition(model, trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, key, model, init_optimizer(parameters), average, jnp.zeros_like(zero))


def partition(model: PyTree, trainable: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """The parameters that are trained, and the rest of the model; each has `None` where the other has a leaf.

    Raises a `ValueError` that names the leaf if `trainable` marks anything but an array of floats.
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
    """A copy of a dtype that is settled: a weak one would change with the first update, and trace the step again."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jr.clone(leaf)
    return jnp.array(leaf, dtype=leaf.dtype)
