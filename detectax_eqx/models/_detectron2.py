"""Detectors with every rule of Detectron2, for its published weights: Faster, Mask and Keypoint R-CNN, and RetinaNet.

Each difference from torchvision is an option of the parts; this file sets them. Differences of layout (BGR images, the
background as the last class, no box for it, the order of anchors) are settled when weights are loaded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..nn import Backbone, Norm
from ..ops import paste_masks_at_centers
from ._box_head import BoxHead
from ._cascade import AnyBoxHead
from ._dense import DenseSelection
from ._faster_rcnn import FasterRCNN
from ._keypoint_head import KeypointHead
from ._keypoint_rcnn import KeypointRCNN
from ._mask_head import MaskHead
from ._mask_rcnn import MaskRCNN
from ._preprocessing import Preprocessing, ShortestEdge
from ._retinanet import RetinaNet, retinanet
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS, RPN
from ._two_stage import RoIPooling, TwoStageSampling, TwoStageSelection


# The mean of ImageNet's pixels as in Caffe, RGB in 0..255. The ResNets of MSRA were trained without a scale.
CAFFE_MEAN = (123.675, 116.28, 103.53)
DETECTRON2_PREPROCESSING = Preprocessing(
    ShortestEdge(800, 1333, rounded=True), mean=CAFFE_MEAN, std=(1.0, 1.0, 1.0), pillow=True
)
# Detectron2's vision transformers were trained on the same pixels, scaled, on a square canvas.
VITDET_PREPROCESSING = Preprocessing(
    ShortestEdge(1024, 1024, rounded=True),
    mean=CAFFE_MEAN,
    std=(58.395, 57.12, 57.375),
    pillow=True,
    square_canvas=True,
)
DETECTRON2_POOLING = RoIPooling(aligned=True, sampling_ratio=0, level_epsilon=0.0, size_epsilon=1e-8)
DETECTRON2_SELECTION = TwoStageSelection(rpn_min_size=0.0, box_min_size=0.0, rpn_rank_by_logits=True)
DETECTRON2_SAMPLING = TwoStageSampling(
    post_nms_top_n=1000, rpn_min_size=0.0, rpn_rank_by_logits=True, rpn_normalizer=256.0
)
DETECTRON2_DENSE_SELECTION = DenseSelection(max_detections=100, clip_last=True)
# The threshold from which a pixel of a resampled mask is part of the target.
MASK_TARGET_THRESHOLD = 0.5
# RetinaNet's three sizes per octave, not rounded.
DETECTRON2_ANCHOR_SIZES = tuple(
    (size, size * 2.0 ** (1.0 / 3), size * 2.0 ** (2.0 / 3)) for size in (32.0, 64.0, 128.0, 256.0, 512.0)
)


def faster_rcnn_detectron2(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
    hidden_size: int = 1024,
    rpn_depth: int = 1,
    box_head: Callable[..., AnyBoxHead] = BoxHead,
    smooth_l1_beta: float = 0.0,
    post_nms_top_n: int = 1000,
    preprocessing: Preprocessing = DETECTRON2_PREPROCESSING,
) -> FasterRCNN:
    """Builds a `FasterRCNN` on `backbone` with Detectron2's parts and rules, randomly initialised.

    `weights.load_detectron2` loads Detectron2's weights. Use `dataclasses.replace` to change its options.

    - `smooth_l1_beta`: of the box head's regression loss; 0 gives the L1 loss.
    - `post_nms_top_n`: number of proposals per image in training. Detectron2's cascade has 2000.
    - `preprocessing`: Detectron2's ResNeXt and its transformers have others than its ResNets.
    - The other arguments are those of `faster_rcnn`. With `box_head=CascadeHead`, it is a Cascade R-CNN.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn_detectron2(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model.preprocessing.resize((480, 640)), model.rpn.anchor_strides
    ((800, 1067), (4, 8, 16, 32, 64))
    """
    rpn_key, head_key = jr.split(key)
    rpn = RPN(
        backbone.channels,
        key=rpn_key,
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        depth=rpn_depth,
        smooth_l1_beta=0.0,
        rounded_anchors=False,
        anchor_strides=backbone.strides,
    )
    return FasterRCNN(
        backbone,
        rpn,
        box_head(backbone.channels, num_classes, key=head_key, hidden_size=hidden_size, smooth_l1_beta=smooth_l1_beta),
        pooling=DETECTRON2_POOLING,
        preprocessing=preprocessing,
        selection=DETECTRON2_SELECTION,
        sampling=replace(DETECTRON2_SAMPLING, post_nms_top_n=post_nms_top_n),
    )


def mask_rcnn_detectron2(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    hidden_channels: int = 256,
    mask_norm: Norm | None = None,
    **parts: Any,
) -> MaskRCNN:
    """Builds a `MaskRCNN` on `backbone` with Detectron2's parts and rules, randomly initialised.

    `weights.load_detectron2` loads Detectron2's weights. Use `dataclasses.replace` to change its options.

    - `hidden_channels`: width of the mask head. `mask_norm`: its norm.
    - `parts`: arguments of `faster_rcnn_detectron2`. Detectron2's baselines with large-scale jitter and its vision
      transformers have an `rpn_depth` of 2, `ConvBoxHead`, and norms in both heads. With `box_head=CascadeHead`, it is
      a Cascade Mask R-CNN.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = mask_rcnn_detectron2(backbone, 3, key=jr.key(2), hidden_size=32, hidden_channels=16)
    >>> model.paste.__name__
    'paste_masks_at_centers'
    """
    box_key, mask_key = jr.split(key)
    boxes = faster_rcnn_detectron2(backbone, num_classes, key=box_key, **parts)
    return MaskRCNN(
        backbone,
        boxes.rpn,
        boxes.box_head,
        MaskHead(backbone.channels, num_classes, key=mask_key, hidden_channels=hidden_channels, norm=mask_norm),
        pooling=boxes.pooling,
        mask_targets=RoIPooling(aligned=True, sampling_ratio=0),
        mask_threshold=MASK_TARGET_THRESHOLD,
        paste=paste_masks_at_centers,
        preprocessing=boxes.preprocessing,
        selection=boxes.selection,
        sampling=boxes.sampling,
    )


def keypoint_rcnn_detectron2(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    num_keypoints: int = 17,
    hidden_channels: int = 512,
    depth: int = 8,
    smooth_l1_beta: float = 0.5,
    post_nms_top_n: int = 1500,
    **parts: Any,
) -> KeypointRCNN:
    """Builds a `KeypointRCNN` on `backbone` with Detectron2's parts and rules, randomly initialised.

    `weights.load_detectron2` loads Detectron2's weights. Use `dataclasses.replace` to change its options.

    - `num_keypoints`, `hidden_channels`, `depth`: as in `keypoint_rcnn`.
    - `smooth_l1_beta`, `post_nms_top_n`, `parts`: arguments of `faster_rcnn_detectron2`.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = keypoint_rcnn_detectron2(backbone, 1, key=jr.key(2), hidden_channels=16, depth=2, hidden_size=32)
    >>> model.num_keypoints, model.sampling.post_nms_top_n
    (17, 1500)
    """
    box_key, keypoint_key = jr.split(key)
    parts |= {"smooth_l1_beta": smooth_l1_beta, "post_nms_top_n": post_nms_top_n}
    boxes = faster_rcnn_detectron2(backbone, num_classes, key=box_key, **parts)
    keypoint_head = KeypointHead(
        backbone.channels, num_keypoints, key=keypoint_key, hidden_channels=hidden_channels, depth=depth
    )
    return KeypointRCNN(
        backbone,
        boxes.rpn,
        boxes.box_head,
        keypoint_head,
        pooling=boxes.pooling,
        probabilities=True,
        keypoint_offset=0.5,
        preprocessing=boxes.preprocessing,
        selection=boxes.selection,
        sampling=boxes.sampling,
    )


def retinanet_detectron2(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = DETECTRON2_ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
    depth: int = 4,
) -> RetinaNet:
    """Builds a `RetinaNet` on `backbone` with Detectron2's parts and rules, randomly initialised.

    `weights.load_detectron2` loads Detectron2's weights. Use `dataclasses.replace` to change its options.

    In Detectron2, losses are divided by a moving average of the number of positive anchors in a batch. Here, they are
    divided by the number itself, so that the loss depends on nothing but its batch.

    - `backbone`: has P6 and P7, convolved from C5.
    - The other arguments are those of `retinanet`.

    >>> from detectax_eqx.nn import ConvolvedTop, BackboneWithFPN, resnet18
    >>> keys = jr.split(jr.key(0), 4)
    >>> top = ConvolvedTop(64, 16, key=keys[0], from_features=True)
    >>> backbone = BackboneWithFPN(resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
    >>> retinanet_detectron2(backbone, 3, key=keys[3]).selection.max_detections
    100
    """
    parts = retinanet(
        backbone, num_classes, key=key, anchor_sizes=anchor_sizes, aspect_ratios=aspect_ratios, depth=depth
    )
    return replace(
        parts,
        rounded_anchors=False,
        anchor_strides=backbone.strides,
        normalize_per_image=False,
        preprocessing=DETECTRON2_PREPROCESSING,
        selection=DETECTRON2_DENSE_SELECTION,
    )
