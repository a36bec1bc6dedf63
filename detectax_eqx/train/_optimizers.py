"""Optimisers that update as torch's do, as optax transformations."""

import optax

from ._schedules import Schedule


def sgd(
    learning_rate: float | Schedule, *, momentum: float = 0.9, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """Stochastic gradient descent as `torch.optim.SGD` defines it.

    `g = gradient + weight_decay * p; v = momentum * v + g; p = p - learning_rate * v`: decay goes through the momentum,
    and the learning rate does not, so that a change of rate acts at once.

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
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: float | Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2) as `torch.optim.AdamW` defines it.

    Both moments are corrected for their bias, `epsilon` is added outside the root, and the parameter shrinks by
    `learning_rate * weight_decay` of itself.

    >>> import jax.numpy as jnp
    >>> optimizer, p = adamw(0.1, weight_decay=0.0), jnp.array(1.0)
    >>> update, _ = optimizer.update(jnp.array(7.0), optimizer.init(p), p)
    >>> round(float(update), 6)  # the first step is the learning rate, whatever the gradient
    -0.1
    """
    return optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)
