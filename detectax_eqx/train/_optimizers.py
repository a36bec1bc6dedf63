"""Optimisers that update as torch's do, as optax transformations."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


# From a tree of parameters to a tree that is true at some of them.
Mask = Callable[[PyTree], PyTree[bool]]


def sgd(
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as `torch.optim.SGD` defines it.

    `g = gradient + weight_decay * p; v = momentum * v + g; p = p - learning_rate * v`: decay goes through the momentum,
    and the learning rate does not, so that a change of rate acts at once.

    - `decay_mask`: which parameters decay, `no_vectors` for instance; default all, as in torch.

    >>> import jax.numpy as jnp
    >>> optimizer, p = sgd(0.1, momentum=0.5, weight_decay=0.0), jnp.array(1.0)
    >>> state = optimizer.init(p)
    >>> for _ in range(2):
    ...     update, state = optimizer.update(jnp.array(1.0), state, p)
    ...     p = p + update
    >>> round(float(p), 6)  # 1 - 0.1 * 1 - 0.1 * 1.5
    0.75
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-4,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2) as `torch.optim.AdamW` defines it.

    Both moments are corrected for their bias, `epsilon` is added outside the root, and the parameter shrinks by
    `learning_rate * weight_decay` of itself. `decay_mask` is that of `sgd`.

    Raises a `ValueError` if a beta is not between 0 and 1.

    >>> import jax.numpy as jnp
    >>> optimizer, p = adamw(0.1, weight_decay=0.0), jnp.array(1.0)
    >>> update, _ = optimizer.update(jnp.array(7.0), optimizer.init(p), p)
    >>> round(float(update), 6)  # the first step is the learning rate, whatever the gradient
    -0.1
    """
    return optax.chain(
        _adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def no_vectors(parameters: PyTree) -> PyTree[bool]:
    """A mask that exempts norms and biases from weight decay: true at arrays of two axes and more.

    >>> no_vectors({"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)})
    {'bias': False, 'weight': True}
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)


def _adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction. Unlike optax's, right to the last digits in the first steps: there `1 - beta2**t` cancels."""
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be between 0 and 1, got {beta1} and {beta2}.")

    def init(params: PyTree) -> PyTree:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros, nu=jax.tree.map(jnp.copy, zeros))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        count = state.count + 1
        mu = jax.tree.map(lambda g, m: beta1 * m + (1 - beta1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: beta2 * v + (1 - beta2) * g * g, updates, state.nu)
        correction1, correction2 = (-jnp.expm1(count.astype(jnp.float32) * math.log(beta)) for beta in (beta1, beta2))

        def direction(m: Float[Array, "*d"], v: Float[Array, "*d"]) -> Float[Array, "*d"]:
            return m / correction1.astype(m.dtype) / (jnp.sqrt(v / correction2.astype(v.dtype)) + epsilon)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)
