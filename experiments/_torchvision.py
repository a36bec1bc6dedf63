"""torchvision's detectors at random weights under which they find something."""
# pyright: reportMissingImports=false

import numpy as np
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d


def random_detector(kind: type[FasterRCNN] | type[MaskRCNN], *, body="resnet50", num_classes=91, seed=0, **options):
    """A detector whose scores are decisive: random frozen statistics, and predictors scaled up."""
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(backbone_name=body, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    model = kind(backbone, num_classes, **options)
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
        model.rpn.head.cls_logits.weight.mul_(20)
        model.rpn.head.bbox_pred.weight.mul_(10)
        predictor = model.roi_heads.box_predictor
        predictor.cls_score.weight.mul_(20)
        predictor.bbox_pred.weight.mul_(10)
        if isinstance(model, MaskRCNN):
            model.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(5)
    model.eval()
    _spread_classes(model, torch.rand(3, 320, 480, generator=generator))
    return model


def _spread_classes(model, image):
    """Centres and scales the class logits, so that proposals differ in class and are sure of it."""
    logits = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    with torch.no_grad():
        model([image])
        hook.remove()
        layer, scale = model.roi_heads.box_predictor.cls_score, 2.5 / logits[0].std(dim=0).mean()
        layer.weight.mul_(scale)
        layer.bias.sub_(logits[0].mean(dim=0)).mul_(scale)


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as arrays."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
