"""The mask branch of Mask R-CNN (arXiv:1703.06870): a low-resolution mask of each object in the frame of its box."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from .._types import Targets, WeightedSum
from ..nn import Conv2d, Norm, Upsample2x2, relu
from ..ops import crop_masks
from ._box_head import SampledProposals
from ._rpn import binary_cross_entropy


class MaskHead(eqx.Module):
    """3×3 convolutions on a box's features, upsampling by a factor of two, and one mask per class.

    `norms` follow the convolutions, if there are any.

    `mask_logits` has `num_classes + 1` channels to match torchvision's weights. The background comes first and is never
    used.
    """

    convs: tuple[Conv2d, ...]
    upsample: Upsample2x2
    mask_logits: Conv2d
    norms: tuple[Callable, ...] | None
    pool_size: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        key: PRNGKeyArray,
        pool_size: int = 14,
        hidden_channels: int = 256,
        depth: int = 4,
        norm: Norm | None = None,
    ):
        """Initialises the head.

        - `num_classes`: foreground classes.
        - `pool_size`: side of the pooled features, in bins; masks are twice as large.
        - `hidden_channels`, `depth`: width and number of the 3×3 convolutions.
        - `norm`: the norm after each of them, which then have no bias.
        """
        keys = jr.split(key, depth + 2)
        widths = (channels,) + (hidden_channels,) * depth
        self.convs = tuple(
            Conv2d(i, o, 3, use_bias=norm is None, key=k)
            for i, o, k in zip(widths[:-1], widths[1:], keys[2:], strict=True)
        )
        self.norms = None if norm is None else tuple(norm(hidden_channels) for _ in self.convs)
        self.upsample = Upsample2x2(widths[-1], hidden_channels, key=keys[0])
        self.mask_logits = Conv2d(hidden_channels, num_classes + 1, 1, key=keys[1])
        self.pool_size = pool_size

    def __call__(self, features: Float[Array, "n c s s"], labels: Int32[Array, " n"]) -> Float[Array, "n 2*s 2*s"]:
        """Returns the mask logits of each box for its class in `labels` (foreground classes from 0), in float32."""
        x = features
        for i, conv in enumerate(self.convs):
            x = jax.vmap(conv)(x)
            x = relu(x if self.norms is None else jax.vmap(self.norms[i])(x))
        blocks = relu(jax.vmap(self.upsample.blocks)(x))  # (n, s, s, 2, 2, c)
        # The last 1×1 convolution is evaluated only for the channel of each box's class.
        weight = self.mask_logits.weight[labels + 1, :, 0, 0]  # (n, c)
        logits = jnp.einsum("nhwabo,no->nhwab", blocks, weight)
        if self.mask_logits.bias is not None:
            logits = logits + self.mask_logits.bias[labels + 1][:, None, None, None, None]
        logits = rearrange(logits, "n h w a b -> n (h a) (w b)")  # (n, s, s, 2, 2) -> (n, 2 s, 2 s)
        return logits.astype(jnp.float32)


def mask_loss(
    logits: Float[Array, "s m m"],
    sampled: SampledProposals,
    targets: Targets,
    *,
    sampling_ratio: int = 0,
    aligned: bool = False,
    threshold: float | None = None,
) -> dict[str, WeightedSum]:
    """Computes the per-pixel binary cross entropy of the positives' masks: `loss_mask`.

    The target is the object's mask resampled to the proposal by `crop_masks`, which takes `sampling_ratio` and
    `aligned`; the defaults are torchvision's. With `threshold`, target pixels are 1 from this value on and 0 below, as
    in Detectron2, which has 0.5. Normalised by the number of pixels of all positives.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0]])
    >>> sampled = SampledProposals(boxes, jnp.array([True]), jnp.array([True]), jnp.array([0]))
    >>> targets = Targets(boxes, jnp.array([2]), jnp.array([True]), jnp.ones((1, 4, 4)), boxes)
    >>> round(float(mask_loss(jnp.zeros((1, 4, 4)), sampled, targets)["loss_mask"].mean()), 3)
    0.693
    """
    if targets.masks is None or targets.mask_boxes is None:
        raise ValueError(
            "targets have no masks: this loss needs annotations with segmentations. Add them, or use a box detector."
        )
    size = logits.shape[1]
    target_masks = crop_masks(
        targets.masks[sampled.matched],
        targets.mask_boxes[sampled.matched],
        sampled.boxes,
        output_size=size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )  # (s, m, m)
    if threshold is not None:
        target_masks = (target_masks >= threshold).astype(target_masks.dtype)
    losses = binary_cross_entropy(logits, target_masks).sum(axis=(1, 2))  # (s,), over the m² pixels
    count = sampled.positive.sum().astype(jnp.float32) * float(size * size)
    return {"loss_mask": WeightedSum(jnp.where(sampled.positive, losses, 0.0).sum(), count)}
