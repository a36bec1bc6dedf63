"""Detectors: Faster R-CNN and Mask R-CNN, their losses, and detection in an image of any size."""

from ._box_head import (
    BoxHead as BoxHead,
    SampledProposals as SampledProposals,
    box_detections as box_detections,
    box_loss as box_loss,
    sample_proposals as sample_proposals,
)
from ._builders import (
    faster_rcnn_resnet18_fpn as faster_rcnn_resnet18_fpn,
    faster_rcnn_resnet34_fpn as faster_rcnn_resnet34_fpn,
    faster_rcnn_resnet50_fpn as faster_rcnn_resnet50_fpn,
    faster_rcnn_resnet101_fpn as faster_rcnn_resnet101_fpn,
    mask_rcnn_resnet18_fpn as mask_rcnn_resnet18_fpn,
    mask_rcnn_resnet34_fpn as mask_rcnn_resnet34_fpn,
    mask_rcnn_resnet50_fpn as mask_rcnn_resnet50_fpn,
    mask_rcnn_resnet101_fpn as mask_rcnn_resnet101_fpn,
)
from ._detect import Detector as Detector, detect as detect, detect_batch as detect_batch
from ._faster_rcnn import (
    FasterRCNN as FasterRCNN,
    Sampling as Sampling,
    Selection as Selection,
    faster_rcnn_loss as faster_rcnn_loss,
)
from ._mask_head import MaskHead as MaskHead, mask_loss as mask_loss
from ._mask_rcnn import MaskRCNN as MaskRCNN, mask_rcnn_loss as mask_rcnn_loss
from ._parameters import in_resnet as in_resnet, num_parameters as num_parameters, trainable as trainable
from ._rpn import (
    ANCHOR_SIZES as ANCHOR_SIZES,
    ASPECT_RATIOS as ASPECT_RATIOS,
    RPN as RPN,
    Proposals as Proposals,
    RPNOutput as RPNOutput,
    SampledAnchors as SampledAnchors,
    propose as propose,
    rpn_loss as rpn_loss,
    sample_anchors as sample_anchors,
)
