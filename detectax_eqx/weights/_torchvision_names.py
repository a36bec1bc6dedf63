"""A table of torchvision's parameter names for the fields of each module class."""

from typing import Any

from .. import models, nn
from ._rename import Names, foreign_names


TORCHVISION: Names = {
    models.FasterRCNN: {"rpn": "rpn.head", "box_head": "roi_heads"},
    models.MaskRCNN: {"rpn": "rpn.head", "box_head": "roi_heads", "mask_head": "roi_heads"},
    models.KeypointRCNN: {"rpn": "rpn.head", "box_head": "roi_heads", "keypoint_head": "roi_heads"},
    models.RPN: {"convs": "conv.{i}.0", "objectness": "cls_logits", "deltas": "bbox_pred"},
    models.BoxHead: {
        "fc6": "box_head.fc6",
        "fc7": "box_head.fc7",
        "class_logits": "box_predictor.cls_score",
        "box_deltas": "box_predictor.bbox_pred",
    },
    models.MaskHead: {
        "convs": "mask_head.{i}.0",
        "upsample": "mask_predictor.conv5_mask",
        "mask_logits": "mask_predictor.mask_fcn_logits",
    },
    # In torchvision's keypoint head, convolutions and ReLUs form one list.
    models.KeypointHead: {
        "convs": lambda i: f"keypoint_head.{2 * i}",
        "heatmaps": "keypoint_predictor.kps_score_lowres",
    },
    models.RetinaNet: {
        "class_tower": {"convs": "head.classification_head.conv.{i}.0", "norms": "head.classification_head.conv.{i}.1"},
        "class_logits": "head.classification_head.cls_logits",
        "box_tower": {"convs": "head.regression_head.conv.{i}.0", "norms": "head.regression_head.conv.{i}.1"},
        "deltas": "head.regression_head.bbox_reg",
    },
    # In torchvision's FCOS, convolutions, norms and ReLUs form one list.
    models.FCOS: {
        "class_tower": {
            "convs": lambda i: f"head.classification_head.conv.{3 * i}",
            "norms": lambda i: f"head.classification_head.conv.{3 * i + 1}",
        },
        "class_logits": "head.classification_head.cls_logits",
        "box_tower": {
            "convs": lambda i: f"head.regression_head.conv.{3 * i}",
            "norms": lambda i: f"head.regression_head.conv.{3 * i + 1}",
        },
        "distances": "head.regression_head.bbox_reg",
        "centerness": "head.regression_head.bbox_ctrness",
    },
    nn.FPN: {"lateral": "inner_blocks.{i}.0", "output": "layer_blocks.{i}.0", "top": "extra_blocks"},
    nn.ResNet: {"norm1": "bn1", "layers": lambda i: f"layer{i + 1}"},
    nn.BasicBlock: {"norm1": "bn1", "norm2": "bn2"},
    nn.Bottleneck: {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3"},
    nn.Downsample: {"conv": "0", "norm": "1"},
}


def torchvision_names(model: Any) -> dict[str, str]:
    """Maps the names of `named_leaves(model)` to torchvision's names."""
    return foreign_names(model, TORCHVISION)
