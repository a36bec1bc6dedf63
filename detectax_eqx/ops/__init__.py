from ._anchors import anchor_grid as anchor_grid
from ._assignment import linear_assignment as linear_assignment
from ._bicubic import resize_bicubic as resize_bicubic
from ._boxes import (
    box_area as box_area,
    clip_boxes as clip_boxes,
    cxcywh_to_xyxy as cxcywh_to_xyxy,
    pairwise_ciou as pairwise_ciou,
    pairwise_diou as pairwise_diou,
    pairwise_giou as pairwise_giou,
    pairwise_ioa as pairwise_ioa,
    pairwise_iou as pairwise_iou,
    upcast as upcast,
    xywh_to_xyxy as xywh_to_xyxy,
    xyxy_to_cxcywh as xyxy_to_cxcywh,
    xyxy_to_xywh as xyxy_to_xywh,
)
from ._coders import decode_boxes as decode_boxes, encode_boxes as encode_boxes
from ._deformable import (
    deformable_attention as deformable_attention,
    grid_sample as grid_sample,
    point_sample as point_sample,
)
from ._keypoints import (
    keypoint_targets as keypoint_targets,
    keypoints_from_heatmaps as keypoints_from_heatmaps,
)
from ._losses import (
    ciou_loss as ciou_loss,
    dice_loss as dice_loss,
    diou_loss as diou_loss,
    giou_loss as giou_loss,
    sigmoid_focal_loss as sigmoid_focal_loss,
    smooth_l1_loss as smooth_l1_loss,
)
from ._masks import (
    crop_masks as crop_masks,
    paste_masks as paste_masks,
    paste_masks_at_centers as paste_masks_at_centers,
    resize_masks as resize_masks,
)
from ._matching import Matches as Matches, match_boxes as match_boxes, sample_balanced as sample_balanced
from ._nms import class_aware_nms as class_aware_nms, nms as nms, nms_indices as nms_indices
from ._pillow_resize import resize_image_pillow as resize_image_pillow
from ._resize import resize_image as resize_image, resized_size as resized_size
from ._roi_align import (
    RoIFeatures as RoIFeatures,
    multilevel_roi_align as multilevel_roi_align,
    roi_align as roi_align,
)
