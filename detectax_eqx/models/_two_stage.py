"""Shared parts of two-stage detectors: options, feature extraction, box detection and box losses."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone
from ..ops import RoIFeatures
from ._box_head import SampledProposals, box_detections, sample_proposals
from ._cascade import AnyBoxHead, run_stages, stage_losses
from ._preprocessing import Preprocessing
from ._rpn import RPN, RPNOutput, propose, rpn_loss, sample_anchors


Features = tuple[Float[Array, "f _ _"], ...]


@dataclass(frozen=True)
class TwoStageSelection:
    """Which proposals and detections a two-stage detector keeps; the defaults are torchvision's.

    - `score_threshold`: score in 0..1 above which detections are kept.
    - `nms_threshold`: IoU above which the lower-scoring of two detections of a class is dropped.
    - `max_detections`: maximum number of detections per image.
    - `pre_nms_top_n`, `post_nms_top_n`: number of proposals per level before suppression, and of all levels after it.
    - `rpn_nms_threshold`: IoU above which the lower-scoring of two proposals of a level is dropped.
    - `rpn_score_threshold`: score in 0..1 below which proposals are dropped.
    - `rpn_min_size`, `box_min_size`: minimum side in pixels of a proposal and of a detection.
    - `rpn_rank_by_logits`: whether proposals are ranked by their logits rather than their scores.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    pre_nms_top_n: int = 1000
    post_nms_top_n: int = 1000
    rpn_nms_threshold: float = 0.7
    rpn_score_threshold: float = 0.0
    rpn_min_size: float = 1e-3
    box_min_size: float = 1e-2
    rpn_rank_by_logits: bool = False


@dataclass(frozen=True)
class TwoStageSampling:
    """Which anchors and proposals a two-stage loss samples; the defaults are torchvision's.

    - `pre_nms_top_n`, `post_nms_top_n`: number of proposals per level before suppression, and of all levels after it.
    - `rpn_nms_threshold`, `rpn_score_threshold`, `rpn_min_size`, `rpn_rank_by_logits`: as in `TwoStageSelection`.
    - `rpn_samples`, `rpn_positive_fraction`: number of sampled anchors per image, and maximum fraction of positives.
    - `rpn_positive_iou`, `rpn_negative_iou`: IoU from which an anchor is positive, and below which it is negative.
    - `rpn_normalizer`: the number per image by which the losses of the RPN are divided; default, the number of sampled
      anchors.
    - `box_samples`, `box_positive_fraction`: the same for proposals.
    - `box_positive_iou`: IoU from which a proposal is positive; below it, the proposal is negative.
    """

    pre_nms_top_n: int = 2000
    post_nms_top_n: int = 2000
    rpn_nms_threshold: float = 0.7
    rpn_score_threshold: float = 0.0
    rpn_min_size: float = 1e-3
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    box_samples: int = 512
    box_positive_fraction: float = 0.25
    box_positive_iou: float = 0.5
    rpn_rank_by_logits: bool = False
    rpn_normalizer: float | None = None

    @property
    def max_box_positives(self) -> int:
        """Maximum number of positives among the sampled proposals of an image."""
        return int(self.box_samples * self.box_positive_fraction)


@dataclass(frozen=True)
class RoIPooling:
    """How features are pooled in a box, see `ops.multilevel_roi_align`.

    The defaults are torchvision's. Detectron2 has `aligned=True, sampling_ratio=0, level_epsilon=0, size_epsilon=1e-8`.
    """

    aligned: bool = False
    sampling_ratio: int = 2
    level_epsilon: float = 1e-6
    size_epsilon: float = 0.0


@runtime_checkable
class TwoStage(Protocol):
    """The fields of a detector that the functions below use."""

    backbone: Backbone
    rpn: RPN
    box_head: AnyBoxHead
    pooling: RoIPooling
    preprocessing: Preprocessing

    @property
    def num_classes(self) -> int: ...


def extract(
    model: TwoStage, image: Real[Array, "h w c"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
) -> tuple[RoIFeatures, Features, RPNOutput]:
    """Returns the features that the heads pool from, the feature pyramid, and the output of the RPN.

    `key`: for the backbone; `None` for inference.
    """
    features = model.backbone(model.preprocessing.normalize(image, canvas_size), key=key)
    output = model.rpn(features, (image.shape[0], image.shape[1]))
    return roi_features(model, features[:-1]), features, output


def roi_features(model: TwoStage, maps: Features) -> RoIFeatures:
    """Wraps `maps` as the features that the heads pool from.

    These exclude the pyramid's coarsest map, which is used for anchors only. Of several maps with the same stride, the
    first is pooled, as in torchvision.
    """
    strides = model.backbone.strides[:-1]
    pooled = [i for i, stride in enumerate(strides) if stride not in strides[:i]]
    return RoIFeatures(
        tuple(maps[i] for i in pooled),
        strides=tuple(strides[i] for i in pooled),
        sampling_ratio=model.pooling.sampling_ratio,
        aligned=model.pooling.aligned,
        level_epsilon=model.pooling.level_epsilon,
        size_epsilon=model.pooling.size_epsilon,
    )


def detect_boxes(
    model: TwoStage, image: Real[Array, "h w c"], canvas_size: Int32[Array, " 2"], selection: TwoStageSelection
) -> tuple[RoIFeatures, Detections]:
    """Returns detections in canvas pixels without masks, and the features for further heads."""
    rois, _, output = extract(model, image, canvas_size)
    size = canvas_size.astype(jnp.float32)
    proposals = propose(
        output,
        size,
        pre_nms_top_n=selection.pre_nms_top_n,
        post_nms_top_n=selection.post_nms_top_n,
        nms_threshold=selection.rpn_nms_threshold,
        score_threshold=selection.rpn_score_threshold,
        min_size=selection.rpn_min_size,
        rank_by_logits=selection.rpn_rank_by_logits,
        weights=model.rpn.weights,
    )
    logits, deltas, proposals = run_stages(model.box_head, rois, proposals, size)  # (p, k + 1), (p, k + 1, 4), …
    detections = box_detections(
        logits,
        deltas,
        proposals,
        size,
        score_threshold=selection.score_threshold,
        nms_threshold=selection.nms_threshold,
        max_detections=selection.max_detections,
        min_size=selection.box_min_size,
        weights=model.box_head.stages[-1].weights,
    )
    return rois, detections


def box_losses(
    model: TwoStage,
    image: Real[Array, "h w c"],
    canvas_size: Int32[Array, " 2"],
    targets: Targets,
    sampling: TwoStageSampling,
    key: PRNGKeyArray,
) -> tuple[dict[str, WeightedSum], RoIFeatures, SampledProposals]:
    """Returns the losses of Faster R-CNN, and the features and sampled proposals for further heads."""
    targets.check_labels(model.num_classes)
    rpn_key, box_key, backbone_key = jr.split(key, 3)
    size = canvas_size.astype(jnp.float32)
    rois, features, output = extract(model, image, canvas_size, key=backbone_key)
    anchors = sample_anchors(
        output.anchors,
        targets,
        key=rpn_key,
        num_samples=sampling.rpn_samples,
        positive_fraction=sampling.rpn_positive_fraction,
        positive_iou=sampling.rpn_positive_iou,
        negative_iou=sampling.rpn_negative_iou,
    )
    # The proposals made from `output` have no gradient. The loss recomputes the head at the sampled anchors.
    logits, deltas = model.rpn.at_anchors(features, anchors.indices)  # (s,), (s, 4)
    losses = rpn_loss(
        logits,
        deltas,
        anchors,
        targets,
        weights=model.rpn.weights,
        beta=model.rpn.smooth_l1_beta,
        normalizer=sampling.rpn_normalizer,
    )
    proposals = propose(
        output,
        size,
        pre_nms_top_n=sampling.pre_nms_top_n,
        post_nms_top_n=sampling.post_nms_top_n,
        nms_threshold=sampling.rpn_nms_threshold,
        score_threshold=sampling.rpn_score_threshold,
        min_size=sampling.rpn_min_size,
        rank_by_logits=sampling.rpn_rank_by_logits,
        weights=model.rpn.weights,
    )
    sampled = sample_proposals(
        proposals,
        targets,
        key=box_key,
        num_samples=sampling.box_samples,
        positive_fraction=sampling.box_positive_fraction,
        positive_iou=sampling.box_positive_iou,
    )
    losses |= stage_losses(model.box_head, rois, sampled, targets, size)
    return losses, rois, sampled
