"""The keypoint branch of Mask R-CNN (arXiv:1703.06870, section 5): a heatmap of each point in the frame of a box."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import Targets, WeightedSum
from ..nn import Conv2d, Upsample4x4, relu
from ..ops import keypoint_targets, upcast
from ._box_head import SampledProposals


class KeypointHead(eqx.Module):
    """3×3 convolutions on a box's features, a transposed convolution to one map per point, and bilinear upsampling.

    Each of the last two doubles the sides: 14×14 features become 56×56 heatmaps.
    """

    convs: tuple[Conv2d, ...]
    heatmaps: Upsample4x4
    pool_size: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_keypoints: int = 17,
        *,
        key: PRNGKeyArray,
        pool_size: int = 14,
        hidden_channels: int = 512,
        depth: int = 8,
    ):
        """Initialises the head.

        - `num_keypoints`: points per object; 17 is COCO's number for persons.
        - `pool_size`: side of the pooled features, in bins; heatmaps are four times as large.
        - `hidden_channels`, `depth`: width and number of the 3×3 convolutions.
        """
        if num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {num_keypoints}.")
        keys = jr.split(key, depth + 1)
        widths = (channels,) + (hidden_channels,) * depth
        self.convs = tuple(Conv2d(i, o, 3, key=k) for i, o, k in zip(widths[:-1], widths[1:], keys[1:], strict=True))
        self.heatmaps = Upsample4x4(widths[-1], num_keypoints, key=keys[0])
        self.pool_size = pool_size

    @property
    def num_keypoints(self) -> int:
        """Number of points per object."""
        return self.heatmaps.bias.shape[0]

    def __call__(self, features: Float[Array, "n c s s"]) -> Float[Array, "n k 4*s 4*s"]:
        """Returns the heatmap logits of each box, in float32 or higher."""
        x = features
        for conv in self.convs:
            x = relu(jax.vmap(conv)(x))
        logits = jax.vmap(self.heatmaps)(x)  # (n, k, 2 s, 2 s)
        return _double(upcast(logits))  # (n, k, 4 s, 4 s)


def _double(x: Float[Array, "n k h w"]) -> Float[Array, "n k 2*h 2*w"]:
    """Doubles the sides by bilinear interpolation, as torch does with `align_corners=False`.

    The new pixels lie a quarter of a pixel to either side of the old centres. The border is repeated.
    """
    x = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")  # (n, k, h + 2, w + 2)
    x = jnp.stack([0.25 * x[:, :, :-2] + 0.75 * x[:, :, 1:-1], 0.75 * x[:, :, 1:-1] + 0.25 * x[:, :, 2:]])
    x = jnp.stack([0.25 * x[..., :-2] + 0.75 * x[..., 1:-1], 0.75 * x[..., 1:-1] + 0.25 * x[..., 2:]])
    return rearrange(x, "b a n k h w -> n k (h a) (w b)")  # (2, 2, n, k, h, w)


def keypoint_loss(
    logits: Float[Array, "s k m m"], sampled: SampledProposals, targets: Targets
) -> dict[str, WeightedSum]:
    """Computes the cross entropy between each positive's heatmaps and its object's points: `loss_keypoint`.

    Each map is one softmax over its `m²` bins, and the class is the bin that holds the point (`ops.keypoint_targets`).
    Points that are not labelled or lie outside the proposal do not count. Normalised by the number of points that do.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0]])
    >>> sampled = SampledProposals(boxes, jnp.array([True]), jnp.array([True]), jnp.array([0]))
    >>> points = jnp.array([[[2.0, 3.0, 2.0], [9.0, 3.0, 2.0]]])
    >>> targets = Targets(boxes, jnp.array([0]), jnp.array([True]), keypoints=points)
    >>> loss = keypoint_loss(jnp.zeros((1, 2, 4, 4)), sampled, targets)["loss_keypoint"]
    >>> round(float(loss.mean()), 3), float(loss.count)  # log 16, and the point outside is ignored
    (2.773, 1.0)
    """
    if targets.keypoints is None:
        raise ValueError(
            "targets have no keypoints: this loss needs annotations with keypoints. Add them, or use a box detector."
        )
    if targets.keypoints.shape[1] != logits.shape[1]:
        raise ValueError(
            f"targets have {targets.keypoints.shape[1]} keypoints per object, but the model has {logits.shape[1]}. "
            "Build it with that number of keypoints."
        )
    bins, counted = keypoint_targets(targets.keypoints[sampled.matched], sampled.boxes, size=logits.shape[2])  # (s, k)
    counted = counted & sampled.positive[:, None]
    log_probabilities = jax.nn.log_softmax(rearrange(logits, "s k h w -> s k (h w)"))
    losses = -jnp.take_along_axis(log_probabilities, bins[..., None], axis=2)[..., 0]  # -log p of each bin, (s, k)
    count = counted.sum().astype(jnp.float32)
    return {"loss_keypoint": WeightedSum(jnp.where(counted, losses, 0.0).sum().astype(jnp.float32), count)}
