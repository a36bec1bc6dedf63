"""Detectors of two stages, dense ones and detection transformers, and detection in any image."""

from ._box_head import (
    BoxHead as BoxHead,
    ConvBoxHead as ConvBoxHead,
    SampledProposals as SampledProposals,
    box_detections as box_detections,
    box_loss as box_loss,
    sample_proposals as sample_proposals,
)
from ._cascade import CascadeHead as CascadeHead
from ._decoder import (
    Decoder as Decoder,
    DecoderLayer as DecoderLayer,
    EncoderLayer as EncoderLayer,
    refine_boxes as refine_boxes,
)
from ._deformable_detr import DeformableDETR as DeformableDETR, deformable_detr as deformable_detr
from ._deformable_queries import CellQueries as CellQueries, LearnedQueries as LearnedQueries
from ._dense import DenseSelection as DenseSelection, dense_detections as dense_detections
from ._detect import (
    detect as detect,
    detect_batch as detect_batch,
    selected as selected,
    smallest_canvas as smallest_canvas,
)
from ._detector import AbstractDetector as AbstractDetector, Paste as Paste, Selection as Selection
from ._detectron2 import (
    DETECTRON2_PREPROCESSING as DETECTRON2_PREPROCESSING,
    VITDET_PREPROCESSING as VITDET_PREPROCESSING,
    faster_rcnn_detectron2 as faster_rcnn_detectron2,
    keypoint_rcnn_detectron2 as keypoint_rcnn_detectron2,
    mask_rcnn_detectron2 as mask_rcnn_detectron2,
    retinanet_detectron2 as retinanet_detectron2,
)
from ._detr import DETR as DETR, DETR_PREPROCESSING as DETR_PREPROCESSING, detr as detr
from ._faster_rcnn import FasterRCNN as FasterRCNN, faster_rcnn as faster_rcnn
from ._fcos import FCOS as FCOS, FCOSMatching as FCOSMatching, fcos as fcos
from ._keypoint_head import KeypointHead as KeypointHead, keypoint_loss as keypoint_loss
from ._keypoint_rcnn import KeypointRCNN as KeypointRCNN, keypoint_rcnn as keypoint_rcnn
from ._mask_head import MaskHead as MaskHead, mask_loss as mask_loss
from ._mask_rcnn import MaskRCNN as MaskRCNN, mask_rcnn as mask_rcnn
from ._parameters import (
    decayed as decayed,
    in_backbone as in_backbone,
    layer_rates as layer_rates,
    num_parameters as num_parameters,
    trainable as trainable,
)
from ._preprocessing import Preprocessing as Preprocessing, ShortestEdge as ShortestEdge, Square as Square
from ._queries import (
    Queries as Queries,
    QueryHead as QueryHead,
    QuerySelection as QuerySelection,
    QueryTable as QueryTable,
)
from ._retinanet import (
    RetinaNet as RetinaNet,
    RetinaNetMatching as RetinaNetMatching,
    giou_of_boxes as giou_of_boxes,
    l1_of_deltas as l1_of_deltas,
    retinanet as retinanet,
)
from ._rf_detr import RFDETR as RFDETR, rf_detr as rf_detr
from ._rf_detr_seg import (
    PixelBlock as PixelBlock,
    QueryBlock as QueryBlock,
    QueryMaskHead as QueryMaskHead,
    RFDETRSeg as RFDETRSeg,
    rf_detr_seg as rf_detr_seg,
)
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
from ._set_loss import SetWeights as SetWeights
from ._ssd import (
    SSD as SSD,
    DefaultBoxes as DefaultBoxes,
    SSDMatching as SSDMatching,
    SSDSelection as SSDSelection,
    ssd as ssd,
    ssdlite as ssdlite,
)
from ._two_stage import (
    RoIPooling as RoIPooling,
    TwoStage as TwoStage,
    TwoStageSampling as TwoStageSampling,
    TwoStageSelection as TwoStageSelection,
    extract as extract,
    roi_features as roi_features,
)
