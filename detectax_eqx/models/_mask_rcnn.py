"""Mask R-CNN (arXiv:1703.06870): Faster R-CNN with a mask branch."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from .._xla import map_chunks
from ..nn import Backbone, Norm
from ..ops import RoIFeatures, paste_masks
from ._box_head import BoxHead
from ._cascade import AnyBoxHead
from ._detector import AbstractDetector, Paste
from ._faster_rcnn import faster_rcnn
from ._mask_head import MaskHead, mask_loss
from ._preprocessing import Preprocessing
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS, RPN
from ._two_stage import RoIPooling, TwoStageSampling, TwoStageSelection, box_losses, detect_boxes


# Boxes per chunk of the mask head, and the number of chunks that save their residuals for the backward pass. Most
# images have far fewer objects than the capacity.
MASK_CHUNK = 10
MASK_CHUNKS_KEPT = 3


class MaskRCNN(AbstractDetector[TwoStageSelection]):
    """A two-stage detector of boxes and masks: a `FasterRCNN` with a mask head on the same features.

    `mask_rcnn` builds one with torchvision's parts.

    - `pooling`, `mask_targets`, `mask_threshold`, `paste`, `preprocessing`, `selection`, `sampling`: static options;
      the defaults are torchvision's. `mask_targets` and `mask_threshold` set how an object's mask is resampled to the
      frame of a proposal, see `ops.crop_masks` and `mask_loss`. `paste`: how masks are pasted onto an image.
    """

    backbone: Backbone
    rpn: RPN
    box_head: AnyBoxHead
    mask_head: MaskHead
    pooling: RoIPooling = eqx.field(static=True, kw_only=True, default=RoIPooling())
    mask_targets: RoIPooling = eqx.field(static=True, kw_only=True, default=RoIPooling(sampling_ratio=0))
    mask_threshold: float | None = eqx.field(static=True, kw_only=True, default=None)
    paste: Paste = eqx.field(static=True, kw_only=True, default=paste_masks)
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing())
    selection: TwoStageSelection = eqx.field(static=True, kw_only=True, default=TwoStageSelection())
    sampling: TwoStageSampling = eqx.field(static=True, kw_only=True, default=TwoStageSampling())
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "masks"})

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.box_head.num_classes

    def __call__(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        *,
        selection: TwoStageSelection | None = None,
    ) -> Detections:
        """Returns detections in canvas pixels, with masks of 28×28 probabilities in the frame of their box."""
        rois, detections = detect_boxes(self, image, canvas_size, selection or self.selection)
        logits = self.mask_logits(rois, detections.boxes, detections.labels, detections.valid)
        return replace(detections, masks=jax.nn.sigmoid(logits))

    def mask_logits(
        self,
        rois: RoIFeatures,
        boxes: Float[Array, "n 4"],
        labels: Int32[Array, " n"],
        valid: Bool[Array, " n"],
    ) -> Float[Array, "n s s"]:
        """Returns the mask logits of each box for its class in `labels`, in the frame of the box.

        `boxes` are in canvas pixels, valid rows first. The head runs in chunks that cover the valid rows. Invalid rows
        hold zeros or the logits of their box.
        """
        logits = eqx.Partial(_mask_logits, self.mask_head, rois)
        count = valid.sum(dtype=jnp.int32)
        return map_chunks(logits, (boxes, labels), count, chunk_size=MASK_CHUNK, kept=MASK_CHUNKS_KEPT)

    def loss(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        targets: Targets,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, WeightedSum]:
        """Returns the losses of `FasterRCNN.loss` and `loss_mask`.

        Raises a `ValueError` if `targets` have no masks.
        """
        losses, rois, sampled = box_losses(self, image, canvas_size, targets, self.sampling, key)
        # Positives come first, so the mask head only needs the first `max_box_positives` rows.
        capacity = min(sampled.boxes.shape[0], self.sampling.max_box_positives)
        positives = jax.tree.map(lambda x: x[:capacity], sampled)
        logits = self.mask_logits(rois, positives.boxes, targets.labels[positives.matched], positives.positive)
        crop = {"sampling_ratio": self.mask_targets.sampling_ratio, "aligned": self.mask_targets.aligned}
        return losses | mask_loss(logits, positives, targets, threshold=self.mask_threshold, **crop)


def _mask_logits(
    head: MaskHead, rois: RoIFeatures, boxes: Float[Array, "n 4"], labels: Int32[Array, " n"]
) -> Float[Array, "n s s"]:
    return head(rois.pool(boxes, output_size=head.pool_size), labels)


def mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
    hidden_size: int = 1024,
    hidden_channels: int = 256,
    rpn_depth: int = 1,
    box_head: Callable[..., AnyBoxHead] = BoxHead,
    mask_norm: Norm | None = None,
) -> MaskRCNN:
    """Builds a `MaskRCNN` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `hidden_channels`: width of the mask head. `mask_norm`: its norm. The other arguments are those of `faster_rcnn`.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> mask_rcnn(backbone, 3, key=jr.key(2), hidden_size=32, hidden_channels=16).needs == {"boxes", "masks"}
    True
    """
    box_key, mask_key = jr.split(key)
    boxes = faster_rcnn(
        backbone,
        num_classes,
        key=box_key,
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        hidden_size=hidden_size,
        rpn_depth=rpn_depth,
        box_head=box_head,
    )
    mask_head = MaskHead(backbone.channels, num_classes, key=mask_key, hidden_channels=hidden_channels, norm=mask_norm)
    return MaskRCNN(backbone, boxes.rpn, boxes.box_head, mask_head)
