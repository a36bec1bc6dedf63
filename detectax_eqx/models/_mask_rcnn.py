"""Mask R-CNN (arXiv:1703.06870): Faster R-CNN with a mask branch."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from .._xla import map_chunks
from ..ops._substitute import replaceable
from ._faster_rcnn import (
    TORCHVISION_SAMPLING,
    TORCHVISION_SELECTION,
    FasterRCNN,
    Pool,
    Sampling,
    Selection,
    two_stage_losses,
)
from ._mask_head import MaskHead, mask_loss


# Boxes that the mask head runs on at a time, and how many such chunks remember it for the backward pass. Most images
# have far fewer objects than there is room for.
MASK_CHUNK = 10
MASK_CHUNKS_KEPT = 3

map_chunks = replaceable(map_chunks)


class MaskRCNN(eqx.Module):
    """A two-stage detector of boxes and masks: a `FasterRCNN` and a mask head on the same features.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = MaskRCNN(FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32), key=jr.key(3), hidden_channels=16)
    >>> model.num_classes
    3
    """

    faster_rcnn: FasterRCNN
    mask_head: MaskHead

    def __init__(self, faster_rcnn: FasterRCNN, *, key: PRNGKeyArray, hidden_channels: int = 256):
        """Adds a mask head of `hidden_channels` to a box detector."""
        self.faster_rcnn = faster_rcnn
        self.mask_head = MaskHead(
            faster_rcnn.backbone.channels, faster_rcnn.num_classes, key=key, hidden_channels=hidden_channels
        )

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.faster_rcnn.num_classes

    def __call__(
        self,
        image: Real[Array, "h w 3"],
        image_size: Int32[Array, " 2"],
        *,
        selection: Selection = TORCHVISION_SELECTION,
    ) -> Detections:
        """Detections in canvas pixels, with masks of 28×28 probabilities in the frame of their box.

        Arguments are those of `FasterRCNN`.
        """
        pool, detections = self.faster_rcnn.detect_boxes(image, image_size, selection=selection)
        logits = self.mask_logits(pool, detections.boxes, detections.labels, detections.valid)
        return replace(detections, masks=jax.nn.sigmoid(logits))

    def mask_logits(
        self,
        pool: Pool,
        boxes: Float[Array, "n 4"],
        labels: Int32[Array, " n"],
        valid: Bool[Array, " n"],
    ) -> Float[Array, "n s s"]:
        """Mask logits of the class `labels` in the frame of each of `boxes`, canvas pixels, valid ones first.

        `pool` gives the features inside boxes (`FasterRCNN.pooler`). The head runs on as many boxes as are valid, a few
        at a time; the other rows are 0 or what their box gives.
        """
        logits = eqx.Partial(_mask_logits, self.mask_head, pool)
        count = valid.sum(dtype=jnp.int32)
        return map_chunks(logits, (boxes, labels), count, chunk_size=MASK_CHUNK, kept=MASK_CHUNKS_KEPT)


def _mask_logits(
    head: MaskHead, pool: Pool, boxes: Float[Array, "n 4"], labels: Int32[Array, " n"]
) -> Float[Array, "n s s"]:
    return head(pool(boxes, output_size=head.pool_size), labels)


def mask_rcnn_loss(
    model: MaskRCNN,
    image: Real[Array, "h w 3"],
    image_size: Int32[Array, " 2"],
    targets: Targets,
    *,
    key: PRNGKeyArray,
    sampling: Sampling = TORCHVISION_SAMPLING,
    mask_sampling_ratio: int = 0,
    mask_aligned: bool = False,
) -> dict[str, WeightedSum]:
    """The losses of Faster R-CNN and `loss_mask` for one image on its canvas, as sums and counts.

    - `image`, `image_size`, `targets`, `key`, `sampling`: as for `faster_rcnn_loss`; `targets` must have masks.
    - `mask_sampling_ratio`, `mask_aligned`: how mask targets are cropped, see `crop_masks`. The defaults are
      torchvision's; Detectron2 crops with `mask_aligned=True`.

    Raises a `ValueError` if `targets` have no masks.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model = MaskRCNN(model, key=jr.key(3), hidden_channels=16)
    >>> image, size, boxes = jnp.zeros((64, 64, 3)), jnp.array([64, 64]), jnp.array([[4.0, 4.0, 40.0, 40.0]])
    >>> targets = Targets(boxes, jnp.array([2]), jnp.array([True]), jnp.ones((1, 28, 28)), boxes)
    >>> losses = eqx.filter_eval_shape(mask_rcnn_loss, model, image, size, targets, key=jr.key(4))
    >>> sorted(losses)
    ['loss_box_reg', 'loss_classifier', 'loss_mask', 'loss_objectness', 'loss_rpn_box_reg']
    """
    losses, pool, sampled = two_stage_losses(model.faster_rcnn, image, image_size, targets, key=key, sampling=sampling)
    # Positives are sampled first, so that the mask head runs on as many rows as may be positive and no more.
    positives = jax.tree.map(lambda x: x[: max_positives(sampled.boxes.shape[0], sampling)], sampled)
    logits = model.mask_logits(pool, positives.boxes, targets.labels[positives.matched], positives.positive)
    return losses | mask_loss(logits, positives, targets, sampling_ratio=mask_sampling_ratio, aligned=mask_aligned)


def max_positives(num_sampled: int, sampling: Sampling) -> int:
    """How many of the sampled proposals may be positive."""
    return min(num_sampled, int(sampling.box_samples * sampling.box_positive_fraction))
