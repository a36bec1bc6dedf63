"""Costs and losses of masks at points drawn at random (PointRend, arXiv:1912.08193; Mask2Former, arXiv:2112.01527)."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import Targets
from ..ops import dice_loss, point_sample, upcast


# Points are drawn this often, and this share of those that are kept is where the masks are least certain.
OVERSAMPLING, UNCERTAIN = 3, 0.75
# One point is drawn per this number of pixels, but at least as many as there are rows.
PIXELS_PER_POINT = 16


def draw_points(key: PRNGKeyArray, count: int) -> Float[Array, "{count} 2"]:
    """Points `(x, y)` in 0..1."""
    return jr.uniform(key, (count, 2))


def sample_inside(x: Float[Array, "c h w"], points: Float[Array, "p 2"]) -> Float[Array, "p c"]:
    """As `ops.point_sample`, but the pixels at the edge extend beyond it."""
    half = 0.5 / jnp.array([[x.shape[2], x.shape[1]]], points.dtype)
    return point_sample(x, jnp.clip(points, half, 1 - half))


def targets_at(targets: Targets, points: Float[Array, "t p 2"], canvas: tuple[int, int]) -> Float[Array, "t p"]:
    """Whether each target's mask covers its points, 1 or 0: the value of the pixel of the mask at the point.

    - `points`: `(x, y)` relative to a canvas of `(height, width)`.
    """
    if targets.masks is None or targets.mask_boxes is None:
        raise ValueError(
            "targets have no masks: this loss needs annotations with segmentations. Add them, or use a box detector."
        )
    masks, frames = jnp.asarray(targets.masks), jnp.asarray(targets.mask_boxes, points.dtype)
    scale = jnp.array([[[canvas[1], canvas[0]]]], points.dtype)
    start, extent = frames[:, None, :2], frames[:, None, 2:] - frames[:, None, :2]
    inside = (points * scale - start) / jnp.where(extent > 0, extent, 1)  # in 0..1
    size = jnp.array([[[masks.shape[2], masks.shape[1]]]], points.dtype)
    pixel = jnp.floor(inside * size).astype(jnp.int32)
    covered = ((inside >= 0) & (inside < 1) & (extent > 0)).all(axis=2)
    column, row = (jnp.clip(pixel[..., i], 0, masks.shape[2 - i] - 1) for i in (0, 1))
    values = masks[jnp.arange(len(masks), dtype=jnp.int32)[:, None], row, column]
    half = 128 if masks.dtype == jnp.uint8 else 0.5
    values = values if masks.dtype == bool else values >= half
    return (values & covered).astype(points.dtype)


def mask_costs(
    logits: Float[Array, "q p"], wanted: Float[Array, "t p"]
) -> tuple[Float[Array, "t q"], Float[Array, "t q"]]:
    """The mean cross entropy and the Dice loss of each pair of target and query, at points that all share."""
    logits = upcast(logits)
    wanted = wanted.astype(logits.dtype)
    count = logits.shape[1]
    entropy = wanted @ jax.nn.softplus(-logits).T + (1 - wanted) @ jax.nn.softplus(logits).T
    p = jax.nn.sigmoid(logits)
    dice = 1 - (2 * wanted @ p.T + 1) / (wanted.sum(axis=1)[:, None] + p.sum(axis=1)[None] + 1)
    return entropy / count, dice


def uncertain_points(logits: Float[Array, "h w"], count: int, *, key: PRNGKeyArray) -> Float[Array, "{count} 2"]:
    """Draws points, most of them where a mask's logits are nearest to 0."""
    keys = jr.split(key)
    candidates = draw_points(keys[0], OVERSAMPLING * count)
    sampled = sample_inside(lax.stop_gradient(logits)[None], candidates)[:, 0]
    number = int(UNCERTAIN * count)
    _, best = lax.top_k(-jnp.abs(sampled), number)
    return jnp.concatenate([candidates[best], draw_points(keys[1], count - number)])


def point_losses(
    logits: Float[Array, "n h w"], points: Float[Array, "n p 2"], wanted: Float[Array, "n p"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The mean cross entropy and the Dice loss of each mask at its points."""
    sampled = jax.vmap(sample_inside)(upcast(logits)[:, None], points)[..., 0]  # (n, p)
    wanted = wanted.astype(sampled.dtype)
    entropy = wanted * jax.nn.softplus(-sampled) + (1 - wanted) * jax.nn.softplus(sampled)
    return entropy.mean(axis=1), dice_loss(sampled, wanted)


def num_points(size: tuple[int, int]) -> int:
    """How many points of a mask of `(h, w)` pixels count in the loss."""
    return max(size[0], size[0] * size[1] // PIXELS_PER_POINT)
