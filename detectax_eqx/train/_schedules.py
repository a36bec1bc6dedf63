"""Learning rates as functions of the number of updates."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int32


def scale_learning_rate(learning_rate: float, *, batch_size: int, reference_batch_size: int = 16) -> float:
    """Scales a learning rate for `reference_batch_size` images per step linearly to `batch_size` images per step.

    This is the linear scaling rule of arXiv:1706.02677, section 2.1.

    >>> scale_learning_rate(0.02, batch_size=4)
    0.005
    """
    if batch_size < 1 or reference_batch_size < 1:
        raise ValueError(f"batch sizes must be positive, got {batch_size} and {reference_batch_size}.")
    return learning_rate * batch_size / reference_batch_size


def warmup_multistep(
    learning_rate: float,
    *,
    milestones: Sequence[int],
    decay: float = 0.1,
    warmup_steps: int = 500,
    warmup_factor: float = 1e-3,
) -> optax.Schedule:
    """Linear warmup, then a constant rate that is multiplied by `decay` at each milestone: the "1x" schedule.

    Updates are counted from 0. The rate rises linearly from `warmup_factor * learning_rate` at update 0 to
    `learning_rate` at update `warmup_steps`, as in PyTorch's `LinearLR`. A milestone applies from update
    `t = milestone` on, as in PyTorch's `MultiStepLR`, also during the warmup.

    - `milestones`: in updates; use `epoch * steps_per_epoch` for a decay after `epoch` epochs. Empty for no decay.
    - `warmup_steps`: 0 for no warmup.

    >>> schedule = warmup_multistep(0.02, milestones=[800, 1100], warmup_steps=100)
    >>> [round(float(schedule(t)), 6) for t in (0, 50, 100, 799, 800, 1100)]
    [2e-05, 0.01001, 0.02, 0.02, 0.002, 0.0002]
    """
    _check_warmup(warmup_steps, warmup_factor)

    def schedule(count: ArrayLike) -> Float32[Array, ""]:
        count = jnp.asarray(count, jnp.int32)
        passed = jnp.sum(count >= jnp.asarray(milestones, jnp.int32)) if milestones else jnp.zeros((), jnp.int32)
        # A table rather than a power: its rates equal those of repeated multiplication to the last bit.
        rates = [learning_rate * decay**k for k in range(len(milestones) + 1)]
        return jnp.asarray(rates, jnp.float32)[passed] * _warmup(count, warmup_steps, warmup_factor)

    return schedule


def warmup_cosine(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 500,
    warmup_factor: float = 1e-3,
    final_factor: float = 0.0,
) -> optax.Schedule:
    """Linear warmup, then half a cosine (arXiv:1608.03983, equation 5) down to `final_factor * learning_rate`.

    The cosine starts at `warmup_steps` and ends at `total_steps`; after that the rate is constant.

    Raises a `ValueError` if the warmup is not shorter than `total_steps`.

    >>> schedule = warmup_cosine(1.0, total_steps=300, warmup_steps=100, warmup_factor=0.5)
    >>> [round(float(schedule(t)), 6) for t in (0, 50, 100, 200, 300)]
    [0.5, 0.75, 1.0, 0.5, 0.0]
    """
    _check_warmup(warmup_steps, warmup_factor)
    if total_steps <= warmup_steps:
        raise ValueError(f"warmup_steps must be less than total_steps, got {warmup_steps} and {total_steps}.")

    def schedule(count: ArrayLike) -> Float32[Array, ""]:
        count = jnp.asarray(count, jnp.int32)
        done = jnp.clip((count - warmup_steps).astype(jnp.float32) / (total_steps - warmup_steps), 0.0, 1.0)
        cosine = final_factor + (1 - final_factor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return learning_rate * cosine * _warmup(count, warmup_steps, warmup_factor)

    return schedule


def _warmup(count: Int32[Array, ""], steps: int, factor: float) -> Float32[Array, ""]:
    """Rises linearly from `factor` to 1 over `steps` updates."""
    if steps == 0:
        return jnp.ones((), jnp.float32)
    return jnp.minimum(factor + (1 - factor) * count.astype(jnp.float32) / steps, 1.0)


def _check_warmup(steps: int, factor: float) -> None:
    if steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {steps}.")
    if not 0 <= factor <= 1:
        raise ValueError(f"warmup_factor must be in 0..1, got {factor}.")
