"""torchvision's detectors by this project's names, with random weights that yield confident detections."""
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    RetinaNet,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, RPNHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


NUM_OUTPUTS = 91


def new_detector(name: str, num_outputs: int = NUM_OUTPUTS, **options: Any) -> nn.Module:
    """Builds torchvision's detector for a name of `zoo.names()`, with frozen batch norms.

    - `num_outputs`: number of classes as torchvision counts them, including the background.
    """
    make, body = next((make, name.removeprefix(kind + "_")) for kind, make in _KINDS.items() if name.startswith(kind))
    return make(body.removesuffix("_v2").removesuffix("_fpn"), num_outputs, second=body.endswith("_v2"), **options)


def _two_stage(kind: Callable[..., nn.Module], body: str, num_outputs: int, *, second: bool, **options) -> nn.Module:
    if body.startswith("mobilenet"):
        return _mobilenet(kind, body, num_outputs, **options)
    if not second:
        return kind(_backbone(body), num_outputs, **options)
    norm = {"norm_layer": FrozenBatchNorm2d}
    heads: dict[str, nn.Module] = {
        "rpn_head": RPNHead(256, 3, conv_depth=2),
        "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], **norm),
    }
    if kind is MaskRCNN:
        heads["mask_head"] = MaskRCNNHeads(256, [256] * 4, 1, **norm)
    backbone = _resnet_fpn_extractor(getattr(resnet, body)(**norm), 5, **norm)
    return kind(backbone, num_outputs, **heads, **options)


def _mobilenet(kind: Callable[..., nn.Module], body: str, num_outputs: int, **options) -> nn.Module:
    low_resolution = {"min_size": 320, "max_size": 640, "rpn_score_thresh": 0.05}
    low_resolution |= {"rpn_pre_nms_top_n_test": 150, "rpn_post_nms_top_n_test": 150}
    if body.endswith("_320"):
        options = low_resolution | options
    backbone = mobilenet_backbone(
        backbone_name=body.removesuffix("_320"),
        weights=None,
        fpn=True,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=6,
    )
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return kind(backbone, num_outputs, rpn_anchor_generator=anchors, **options)


def _retinanet(body: str, num_outputs: int, *, second: bool, **options) -> nn.Module:
    width = {"resnet18": 512, "resnet34": 512}.get(body, 2048)
    backbone = _backbone(body, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(width if second else 256, 256))
    if not second:
        return RetinaNet(backbone, num_outputs, **options)
    head = RetinaNetHead(256, 9, num_outputs, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return RetinaNet(backbone, num_outputs, head=head, **options)


def _fcos(body: str, num_outputs: int, *, second: bool, **options) -> nn.Module:
    backbone = _backbone(body, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return FCOS(backbone, num_outputs, **options)


def _ssd(body: str, num_outputs: int, *, second: bool, **options) -> nn.Module:
    del body, second
    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_outputs, **options)


def _ssdlite(body: str, num_outputs: int, *, second: bool, **options) -> nn.Module:
    del body, second
    norm = partial(FrozenBatchNorm2d, eps=1e-3)
    parts = {"weights": None, "weights_backbone": None, "norm_layer": norm}
    model = ssdlite320_mobilenet_v3_large(num_classes=num_outputs, **parts, **options)
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):  # torchvision draws weights so small that features vanish
            nn.init.kaiming_normal_(module.weight)
            module.weight.data.div_(module.groups**0.5)  # `random_detector` multiplies by it
    return model


def _backbone(body: str, **options) -> nn.Module:
    return resnet_fpn_backbone(
        backbone_name=body, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5, **options
    )


_KINDS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": partial(_two_stage, FasterRCNN),
    "mask_rcnn": partial(_two_stage, MaskRCNN),
    "keypoint_rcnn": partial(_two_stage, KeypointRCNN),
    "retinanet": _retinanet,
    "fcos": _fcos,
    "ssdlite320": _ssdlite,
    "ssd300": _ssd,
}


def random_detector(name: str, *, num_outputs: int = NUM_OUTPUTS, seed: int = 0, **options: Any) -> nn.Module:
    """Builds a detector with confident scores: random frozen statistics and scaled predictors."""
    torch.manual_seed(seed)
    model = new_detector(name, num_outputs, **options)
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.weight.copy_(uniform(module.weight, 0.6, 1.0))
                module.bias.copy_(uniform(module.bias, -0.1, 0.1))
                module.running_mean.copy_(uniform(module.running_mean, -0.1, 0.1))
                module.running_var.copy_(uniform(module.running_var, 0.8, 1.2))
            elif isinstance(module, nn.GroupNorm):
                module.weight.copy_(uniform(module.weight, 0.6, 1.0))
                module.bias.copy_(uniform(module.bias, -0.1, 0.1))
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                # torchvision draws weights by the fan-out of all groups, with which features vanish.
                module.weight.mul_(module.groups**0.5)
        # Features grow with every residual block. In stages of more than six blocks, the residuals are scaled down so
        # that they add the variance of six. ResNet-50 has at most six.
        body = getattr(model.backbone, "body", None)
        for stage in (getattr(body, f"layer{i}", ()) for i in range(1, 5)):
            for block in stage if len(stage) > 6 else ():
                block.bn3.weight.mul_((6 / len(stage)) ** 0.5)
    image = torch.rand(3, 320, 480, generator=generator)
    model.eval()
    if hasattr(model, "roi_heads"):
        _sharpen_two_stage(model, image)
    elif name.startswith("ssd"):
        _sharpen_ssd(model, image, num_outputs)
    else:
        _sharpen_dense(model, image)
    return model


@torch.no_grad()
def _sharpen_two_stage(model: nn.Module, image: torch.Tensor) -> None:
    """Scales the predictors and centres the class logits, so that proposals have different and confident classes."""
    model.rpn.head.cls_logits.weight.mul_(20)
    model.rpn.head.bbox_pred.weight.mul_(10)
    predictor = model.roi_heads.box_predictor
    predictor.cls_score.weight.mul_(20)
    predictor.bbox_pred.weight.mul_(10)
    if model.roi_heads.has_mask():
        model.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(5)
    (logits, _), *_ = _outputs(predictor, model, image)
    scale = 2.5 / logits.std(dim=0).mean()
    predictor.cls_score.weight.mul_(scale)
    predictor.cls_score.bias.sub_(logits.mean(dim=0)).mul_(scale)
    if model.roi_heads.has_keypoint():
        layer = model.roi_heads.keypoint_predictor.kps_score_lowres
        heatmaps = torch.cat([x.flatten() for x in _outputs(layer, model, image)])
        layer.weight.mul_(2.0 / heatmaps.std())


@torch.no_grad()
def _sharpen_dense(model: nn.Module, image: torch.Tensor) -> None:
    """Scales the predictors, so that on the order of a hundred anchors are confident, and boxes differ in size."""
    classes, boxes = model.head.classification_head, model.head.regression_head
    logits = torch.cat([x.flatten(2) for x in _outputs(classes.cls_logits, model, image)], dim=2)  # (1, a k, cells)
    scale = 2.0 / logits.std(dim=2).mean()
    classes.cls_logits.weight.mul_(scale)
    classes.cls_logits.bias.sub_(logits.mean(dim=(0, 2))).mul_(scale).sub_(7.0)
    deltas = torch.cat([x.flatten(2) for x in _outputs(boxes.bbox_reg, model, image)], dim=2)
    boxes.bbox_reg.weight.mul_(0.3 / deltas.std())
    if hasattr(boxes, "bbox_ctrness"):
        boxes.bbox_reg.bias.fill_(1.0)  # distances; a ReLU sets negative ones to 0
        centerness = torch.cat([x.flatten() for x in _outputs(boxes.bbox_ctrness, model, image)])
        boxes.bbox_ctrness.weight.mul_(1.0 / centerness.std())
        boxes.bbox_ctrness.bias.fill_(2.0)


@torch.no_grad()
def _sharpen_ssd(model: nn.Module, image: torch.Tensor, num_outputs: int) -> None:
    """Scales and centres the predictors of each level, so that some boxes are confident and they differ in size."""
    for head, columns, spread in (
        (model.head.classification_head, num_outputs, 2.0),
        (model.head.regression_head, 4, 1.5),
    ):
        for block in head.module_list:
            (y,) = _outputs(block, model, image)  # (1, b columns, h, w)
            conv = block[-1] if isinstance(block, nn.Sequential) else block
            y = y.flatten(1) if y.shape[2] * y.shape[3] < 9 else y.flatten(2)[0]  # too few cells: over all channels
            scale = spread / y.std(dim=1).mean()
            conv.weight.mul_(scale)
            conv.bias.sub_(y.mean(dim=1)).mul_(scale)
            if columns == num_outputs:
                conv.bias.view(-1, columns)[:, 0].add_(4.0)  # background


def _outputs(layer: nn.Module, model: nn.Module, image: torch.Tensor) -> list[Any]:
    """The outputs of a layer during a forward pass of the model on an image."""
    outputs: list[Any] = []
    hook = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    model([image])
    hook.remove()
    return outputs


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Converts the state dict to NumPy arrays."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
