"""A table of torchvision's parameter names for the fields of each module class."""

from typing import Any

from .. import models, nn
from ._rename import FieldNames, Names, foreign_names


# Positions of VGG-16's convolutions among its layers, and of the first pooling whose layers SSD has apart.
VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16_FOURTH_POOL = 23
# Position of the block of MobileNetV3-Large whose expansion is a map of SSDlite.
MOBILENET_SPLIT = 13


def _vgg_in_ssd(i: int) -> str:
    """In SSD, the layers from the fourth pooling on are numbered from 0 again."""
    position = VGG16_CONVS[i]
    after = position - VGG16_FOURTH_POOL
    return f"features.{position}" if after < 0 else f"extra.0.{after}"


def _mobilenet_in_ssd(i: int) -> str | FieldNames:
    """In SSDlite, layers form two parts: up to the expansion of one block, and from its depthwise convolution on."""
    if i != MOBILENET_SPLIT:
        return f"features.0.{i}" if i < MOBILENET_SPLIT else f"features.1.{i - MOBILENET_SPLIT}"
    return {"layers": lambda j: f"features.0.{i}" if j == 0 else f"features.1.0.{j}"}


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
    # torchvision's head has four convolutions, which a flattening follows: the fully connected layer is the sixth.
    models.ConvBoxHead: {
        "convs": "box_head.{i}.0",
        "norms": "box_head.{i}.1",
        "fc": "box_head.5",
        "class_logits": "box_predictor.cls_score",
        "box_deltas": "box_predictor.bbox_pred",
    },
    models.MaskHead: {
        "convs": "mask_head.{i}.0",
        "norms": "mask_head.{i}.1",
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
    nn.FPN: {
        "lateral": "inner_blocks.{i}.0",
        "lateral_norms": "inner_blocks.{i}.1",
        "output": "layer_blocks.{i}.0",
        "output_norms": "layer_blocks.{i}.1",
        "top": "extra_blocks",
    },
    nn.ResNet: {"norm1": "bn1", "layers": lambda i: f"layer{i + 1}"},
    nn.BasicBlock: {"norm1": "bn1", "norm2": "bn2"},
    nn.Bottleneck: {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3"},
    nn.Downsample: {"conv": "0", "norm": "1"},
    models.SSD: {
        "class_heads": "head.classification_head.module_list.{i}",
        "box_heads": "head.regression_head.module_list.{i}",
    },
    nn.SSDVGG: {
        "body": {"convs": _vgg_in_ssd},
        "scale": "scale_weight",
        "fc6": "extra.0.7.1",
        "fc7": "extra.0.7.3",
        "extras": lambda i: f"extra.{i + 1}",
    },
    nn.SSDExtra: {"reduce": "0", "conv": "2"},
    nn.SSDMobileNet: {"body": {"layers": _mobilenet_in_ssd}, "extras": "extra.{i}"},
    nn.SeparableConv2d: {"depthwise": "0", "pointwise": "1"},
    nn.VGG: {"convs": lambda i: str(VGG16_CONVS[i])},
    nn.MobileNet: {"layers": "{i}"},
    nn.ConvNorm: {"conv": "0", "norm": "1"},
    nn.LinearBottleneck: {"layers": "conv.{i}"},
    nn.InvertedResidual: {"layers": "block.{i}"},
}
# In the file of a classifier, the names of these have a prefix that detectors do not have.
CLASSIFIERS = {nn.MobileNet: "features.", nn.VGG: "features."}


def torchvision_names(model: Any) -> dict[str, str]:
    """Maps the names of `named_leaves(model)` to torchvision's names."""
    prefix = CLASSIFIERS.get(type(model), "")
    return {ours: prefix + theirs for ours, theirs in foreign_names(model, TORCHVISION).items()}
