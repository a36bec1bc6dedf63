"""Keypoint R-CNN (arXiv:1703.06870, section 5): Faster R-CNN with a keypoint branch."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from .._xla import map_chunks
from ..nn import Backbone
from ..ops import RoIFeatures, keypoints_from_heatmaps
from ._cascade import AnyBoxHead
from ._detector import AbstractDetector
from ._faster_rcnn import faster_rcnn
from ._keypoint_head import KeypointHead, keypoint_loss
from ._preprocessing import Preprocessing
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS, RPN
from ._two_stage import RoIPooling, TwoStageSampling, TwoStageSelection, box_losses, detect_boxes


# Boxes per chunk of the keypoint head, and the number of chunks that save their residuals for the backward pass. Most
# images have far fewer objects than the capacity.
KEYPOINT_CHUNK = 10
KEYPOINT_CHUNKS_KEPT = 3


class KeypointRCNN(AbstractDetector[TwoStageSelection]):
    """A two-stage detector of boxes and keypoints: a `FasterRCNN` with a keypoint head on the same features.

    `keypoint_rcnn` builds one with torchvision's parts.

    - `pooling`, `keypoint_offset`, `preprocessing`, `selection`, `sampling`: static options; the defaults are
      torchvision's.
    - `probabilities`: whether the score of a keypoint is a probability and not a logit, see
      `ops.keypoints_from_heatmaps`; static.
    """

    backbone: Backbone
    rpn: RPN
    box_head: AnyBoxHead
    keypoint_head: KeypointHead
    pooling: RoIPooling = eqx.field(static=True, kw_only=True, default=RoIPooling())
    probabilities: bool = eqx.field(static=True, kw_only=True, default=False)
    keypoint_offset: float = eqx.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        static=True, kw_only=True, default=0.0
    )
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing())
    selection: TwoStageSelection = eqx.field(static=True, kw_only=True, default=TwoStageSelection())
    sampling: TwoStageSampling = eqx.field(static=True, kw_only=True, default=TwoStageSampling())
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "keypoints"})

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.box_head.num_classes

    @property
    def num_keypoints(self) -> int:
        """Number of points per object."""
        return self.keypoint_head.num_keypoints

    def __call__(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        *,
        selection: TwoStageSelection | None = None,
    ) -> Detections:
        """Returns detections in canvas pixels, with the keypoints of each."""
        rois, detections = detect_boxes(self, image, canvas_size, selection or self.selection)
        return replace(detections, keypoints=self.keypoints(rois, detections.boxes, detections.valid))

    def keypoints(
        self, rois: RoIFeatures, boxes: Float[Array, "n 4"], valid: Bool[Array, " n"]
    ) -> Float[Array, "n k 3"]:
        """Returns the keypoints of each box: `(x, y, score)`, in canvas pixels (`ops.keypoints_from_heatmaps`).

        `boxes` are in canvas pixels, valid rows first. Keypoints of invalid rows are 0.
        """
        keypoints = eqx.Partial(_keypoints, self.keypoint_head, rois, self.probabilities)
        found = map_chunks(keypoints, (boxes,), valid.sum(dtype=jnp.int32), chunk_size=KEYPOINT_CHUNK)
        return jnp.where(valid[:, None, None], found, 0).astype(boxes.dtype)

    def loss(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        targets: Targets,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, WeightedSum]:
        """Returns the losses of `FasterRCNN.loss` and `loss_keypoint`.

        Raises a `ValueError` if `targets` have no keypoints, or another number of them than the model.
        """
        losses, rois, sampled = box_losses(self, image, canvas_size, targets, self.sampling, key)
        # Positives come first, so the keypoint head only needs the first `max_box_positives` rows.
        capacity = min(sampled.boxes.shape[0], self.sampling.max_box_positives)
        positives = jax.tree.map(lambda x: x[:capacity], sampled)
        logits = eqx.Partial(_heatmaps, self.keypoint_head, rois)
        count = positives.positive.sum(dtype=jnp.int32)
        logits = map_chunks(
            logits, (positives.boxes,), count, chunk_size=KEYPOINT_CHUNK, kept=KEYPOINT_CHUNKS_KEPT
        )  # (s, k, m, m)
        return losses | keypoint_loss(logits, positives, targets)


def _heatmaps(head: KeypointHead, rois: RoIFeatures, boxes: Float[Array, "n 4"]) -> Float[Array, "n k m m"]:
    return head(rois.pool(boxes, output_size=head.pool_size))


def _keypoints(
    head: KeypointHead, rois: RoIFeatures, probabilities: bool, boxes: Float[Array, "n 4"]
) -> Float[Array, "n k 3"]:
    locate = partial(keypoints_from_heatmaps, probabilities=probabilities)
    return jax.vmap(locate)(_heatmaps(head, rois, boxes), boxes)


def keypoint_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    num_keypoints: int = 17,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
    hidden_size: int = 1024,
    hidden_channels: int = 512,
    depth: int = 8,
) -> KeypointRCNN:
    """Builds a `KeypointRCNN` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `num_keypoints`: points per object, the same for all classes.
    - `hidden_channels`, `depth`: width and number of the keypoint head's convolutions. The other arguments are those
      of `faster_rcnn`.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = keypoint_rcnn(backbone, 1, key=jr.key(2), num_keypoints=5, hidden_size=32, hidden_channels=16, depth=2)
    >>> model.num_keypoints, model.needs == {"boxes", "keypoints"}
    (5, True)
    """
    box_key, keypoint_key = jr.split(key)
    boxes = faster_rcnn(
        backbone,
        num_classes,
        key=box_key,
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        hidden_size=hidden_size,
    )
    keypoint_head = KeypointHead(
        backbone.channels, num_keypoints, key=keypoint_key, hidden_channels=hidden_channels, depth=depth
    )
    return KeypointRCNN(backbone, boxes.rpn, boxes.box_head, keypoint_head)
