"""Optimisers with the update rules of PyTorch, as optax transformations."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


# Maps a tree of parameters to a tree of booleans.
Mask = Callable[[PyTree], PyTree[bool]]


def sgd(
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as `torch.optim.SGD` defines it.

    `g = gradient + weight_decay * p; v = momentum * v + g; p = p - learning_rate * v`. The weight decay is part of the
    momentum. The learning rate is not, so that a change of the rate takes effect immediately.

    - `decay_mask`: which parameters decay, for example `no_vectors`. Default: all, as in PyTorch.

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

    Both moments are bias-corrected, `epsilon` is added outside the square root, and the decay subtracts
    `learning_rate * weight_decay * p` from the parameter `p`. `decay_mask` is as for `sgd`.

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
    """A mask that excludes norms and biases from weight decay: true at arrays of two or more axes.

    >>> no_vectors({"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)})
    {'bias': False, 'weight': True}
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)


def _adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction, with a bias correction that is accurate in the first steps.

    optax computes `1 - beta2**t` directly, which loses digits to cancellation for small `t`.
    """
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
