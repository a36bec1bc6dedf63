"""torchvision's detectors by this project's names, with random weights that yield confident detections."""
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
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
    assert not second
    return kind(_backbone(body), num_outputs, **options)


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
        # Features grow with every residual block. In stages of more than six blocks, the residuals are scaled down so
        # that they add the variance of six. ResNet-50 has at most six.
        for stage in (getattr(model.backbone.body, f"layer{i}") for i in range(1, 5)):
            for block in stage if len(stage) > 6 else ():
                block.bn3.weight.mul_((6 / len(stage)) ** 0.5)
    image = torch.rand(3, 320, 480, generator=generator)
    (_sharpen_two_stage if hasattr(model, "roi_heads") else _sharpen_dense)(model.eval(), image)
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
