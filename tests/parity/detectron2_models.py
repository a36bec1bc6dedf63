"""Detectron2's detectors by this project's names, at random weights that still detect something.

Detectron2 is not on PyPI. Its Python runs from a copy of its repository without compiling: put it on `PYTHONPATH`, link
its `configs` to `detectron2/model_zoo/configs`, and install fvcore, iopath, yacs, omegaconf, tabulate, cloudpickle,
portalocker and termcolor beside torch.
"""
# pyright: reportMissingImports=false

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.data import transforms
from detectron2.layers import FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import SwinTransformer, build_model
from detectron2.modeling.backbone.swin import WindowAttention
from detectron2.modeling.backbone.vit import Attention
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage


CONFIGS = {
    "faster_rcnn_resnet50_fpn_detectron2": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "faster_rcnn_resnet101_fpn_detectron2": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    "faster_rcnn_resnext101_32x8d_fpn_detectron2": "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "mask_rcnn_resnet50_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "mask_rcnn_resnet101_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
    "mask_rcnn_resnext101_32x8d_fpn_detectron2": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "keypoint_rcnn_resnet50_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    "keypoint_rcnn_resnet101_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x.yaml",
    "keypoint_rcnn_resnext101_32x8d_fpn_detectron2": "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x.yaml",
    "cascade_mask_rcnn_resnet50_fpn_detectron2": "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
    "retinanet_resnet50_fpn_detectron2": "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    "retinanet_resnet101_fpn_detectron2": "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
}


# More than the candidates of an image.
EVERYTHING = 1_000_000
LSJ = "mask_rcnn_resnet50_fpn_lsj_detectron2"
# Those of Detectron2's project ViTDet. Swin Transformers differ in their width, depth and heads.
VITDETS = ("mask_rcnn_vitdet_b", "cascade_mask_rcnn_vitdet_b", "mask_rcnn_swin_t_fpn", "mask_rcnn_swin_b_fpn")
SWINS = {
    "swin_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}


def config(name: str, **changes: Any) -> Any:
    """Detectron2's configuration of a detector. `changes`: entries by their path, with `__` for a dot."""
    cfg = model_zoo.get_config(CONFIGS[name])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.merge_from_list([part for key, value in changes.items() for part in (key.replace("__", "."), value)])
    return cfg


def new_detector(name: str, **changes: Any) -> torch.nn.Module:
    """Builds Detectron2's detector; see `config`."""
    return build_model(config(name, **changes)).eval()


def new_lsj_detector() -> torch.nn.Module:
    """Builds Detectron2's Mask R-CNN of the baselines with large-scale jitter, with norms of a single process."""
    model = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = model.backbone.norm = "BN"
    model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "BN"
    return instantiate(model).eval()


def vitdet_config(name: str) -> Any:
    """Detectron2's configuration of Mask R-CNN on ViT-B or a Swin Transformer, or with the heads of Cascade R-CNN."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    for part in [SWINS[part] for part in SWINS if part in name]:
        pyramid = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model.backbone
        pyramid.bottom_up, pyramid.in_features = LazyCall(SwinTransformer)(**part), ["p0", "p1", "p2", "p3"]
        pyramid.norm, pyramid.square_pad = "LN", 1024
        model.backbone = pyramid
    if name.startswith("cascade"):
        heads = model.roi_heads
        box_head, predictor, matcher = (heads.pop(part) for part in ("box_head", "box_predictor", "proposal_matcher"))
        predictor.cls_agnostic_bbox_reg, predictor.num_classes = True, heads.num_classes
        heads._target_ = CascadeROIHeads
        heads.box_heads = [deepcopy(box_head) for _ in range(3)]
        heads.box_predictors, heads.proposal_matchers = [], []
        for position, iou in ((10, 0.5), (20, 0.6), (30, 0.7)):
            heads.box_predictors.append(deepcopy(predictor))
            heads.box_predictors[-1].box2box_transform.weights = (position, position, position / 2, position / 2)
            heads.proposal_matchers.append(deepcopy(matcher))
            heads.proposal_matchers[-1].thresholds = [iou]
    return model


def for_losses(model: Any, side: int) -> Any:
    """The configuration of `vitdet_config` for losses that are reproducible: all candidates sampled, no drop path.

    `side`: that of the square canvas.
    """
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.batch_size_per_image = heads.batch_size_per_image = EVERYTHING
    rpn.pre_nms_topk, rpn.post_nms_topk, heads.positive_fraction = (200, 1000), (60, 1000), 0.5
    model.backbone.square_pad = side
    (model.backbone.net if "net" in model.backbone else model.backbone.bottom_up).drop_path_rate = 0.0
    return model


@torch.no_grad()
def random_detector(name: str, *, seed: int = 0, side: int | None = None, **changes: Any) -> torch.nn.Module:
    """Builds a detector with confident scores: random frozen statistics and scaled predictors.

    `side`: of those in `VITDETS`, for losses on a square canvas of this side, see `for_losses`.
    """
    torch.manual_seed(seed)
    if name in VITDETS:
        config = vitdet_config(name)
        model = instantiate(config if side is None else for_losses(config, side)).eval()
    else:
        model = new_lsj_detector() if name == LSJ else new_detector(name, **changes)
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | torch.nn.BatchNorm2d):
            module.weight.copy_(uniform(module.weight, 0.6, 1.0))
            module.bias.copy_(uniform(module.bias, -0.1, 0.1))
            module.running_mean.copy_(uniform(module.running_mean, -0.1, 0.1))
            module.running_var.copy_(uniform(module.running_var, 0.8, 1.2))
        elif isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.weight.mul_(module.groups**0.5)  # drawn by the fan-out of all groups, with which features vanish
        elif isinstance(module, torch.nn.LayerNorm | LayerNorm):
            module.weight.copy_(uniform(module.weight, 0.6, 1.4))
            module.bias.copy_(uniform(module.bias, -0.2, 0.2))
        elif isinstance(module, Attention | WindowAttention):
            module.qkv.weight.mul_(2)  # some pairs of tokens have large logits
            for table in ("rel_pos_h", "rel_pos_w", "relative_position_bias_table"):
                if hasattr(module, table):
                    getattr(module, table).copy_(uniform(getattr(module, table), -0.2, 0.2))
    # Residuals of long stages are scaled down, so that features do not grow with the depth.
    for stage in getattr(getattr(model.backbone, "bottom_up", None), "stages", ()):
        for block in stage if len(stage) > 6 else ():
            block.conv3.norm.weight.mul_((6 / len(stage)) ** 0.5)
    # Without a standard deviation, pixels are large.
    if float(model.pixel_std.max()) == 1:
        model.backbone.bottom_up.stem.conv1.weight.mul_(1 / 60)
    sharpen(model, torch.rand(3, 320, 480, generator=generator) * 255)
    return model


@torch.no_grad()
def sharpen(model: torch.nn.Module, image: torch.Tensor) -> None:
    """Scales the predictors, so that some scores are high and boxes differ in size and class."""
    if hasattr(model, "head"):
        logits = torch.cat([x.flatten(2) for x in outputs(model.head.cls_score, model, image)], dim=2)
        scale = 2.0 / logits.std(dim=2).mean()
        model.head.cls_score.weight.mul_(scale)
        model.head.cls_score.bias.sub_(logits.mean(dim=(0, 2))).mul_(scale).sub_(7.0)
        deltas = torch.cat([x.flatten(2) for x in outputs(model.head.bbox_pred, model, image)], dim=2)
        model.head.bbox_pred.weight.mul_(0.3 / deltas.std())
        return
    head, predictors = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for layer, spread in ((head.objectness_logits, 3.0), (head.anchor_deltas, 0.3)):
        values = torch.cat([x.flatten() for x in outputs(layer, model, image)])
        layer.weight.mul_(spread / values.std())
    for predictor in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:
        (logits,) = outputs(predictor.cls_score, model, image)
        scale = 2.5 / logits.std(dim=0).mean()
        predictor.cls_score.weight.mul_(scale)
        predictor.cls_score.bias.sub_(logits.mean(dim=0)).mul_(scale)
        (deltas,) = outputs(predictor.bbox_pred, model, image)
        predictor.bbox_pred.weight.mul_(1.0 / deltas.std())
    for name, layer in (("mask_head", "predictor"), ("keypoint_head", "score_lowres")):
        if hasattr(model.roi_heads, name):
            last = getattr(getattr(model.roi_heads, name), layer)
            (logits,) = outputs(last, model, image)
            last.weight.mul_(2.0 / logits.std())


def outputs(layer: torch.nn.Module, model: torch.nn.Module, image: torch.Tensor) -> list[Any]:
    """The outputs of a layer during a forward pass of the model on an image, BGR in 0..255."""
    found: list[Any] = []
    hook = layer.register_forward_hook(lambda _, __, output: found.append(output))
    model([{"image": image}])
    hook.remove()
    return found


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Converts the state dict to NumPy arrays, without counters and indices."""
    return {
        name: x.numpy().copy()
        for name, x in model.state_dict().items()
        if not name.endswith(("num_batches_tracked", "relative_position_index"))
    }


def resized(image: np.ndarray, short: int = 800, long: int = 1333) -> np.ndarray:
    """Detectron2's resize of an image on the host."""
    return transforms.ResizeShortestEdge([short, short], long).get_transform(image).apply_image(image)


@contextmanager
def double_detectron2(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model with parameters in float64. Inside, what Detectron2 converts to float32 stays in float64."""
    widened = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with mock.patch.object(torch, "float32", torch.float64), widened:
        yield deepcopy(model).double()


def _tensor(model: torch.nn.Module, image: np.ndarray) -> torch.Tensor:
    """An RGB image with its channels in the order that the model takes."""
    image = image[:, :, ::-1] if model.input_format == "BGR" else image
    dtype = next(model.parameters()).dtype
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1))).to(dtype)


@torch.no_grad()
def detections(model: torch.nn.Module, image: np.ndarray, *, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Detections in an RGB image that is already resized, in its own pixels or scaled to `size`."""
    tensor = _tensor(model, image)
    height, width = image.shape[:2] if size is None else size
    found = model([{"image": tensor, "height": height, "width": width}])[0]["instances"]
    result = {
        "boxes": found.pred_boxes.tensor.numpy(),
        "scores": found.scores.numpy(),
        "labels": found.pred_classes.numpy(),
    }
    masks = {"masks": found.pred_masks.numpy()} if found.has("pred_masks") else {}
    keypoints = {"keypoints": found.pred_keypoints.numpy()} if found.has("pred_keypoints") else {}
    return result | masks | keypoints


def losses(model: torch.nn.Module, pixels, boxes, labels, masks, keypoints) -> dict[str, torch.Tensor]:
    """Detectron2's losses of a batch of RGB images with objects."""
    batch = []
    for image, image_boxes, image_labels, image_masks, points in zip(
        pixels, boxes, labels, masks, keypoints, strict=True
    ):
        instances = Instances(image.shape[:2])
        instances.gt_boxes = Boxes(torch.from_numpy(image_boxes))
        instances.gt_classes = torch.from_numpy(image_labels).long()
        instances.gt_masks = BitMasks(torch.from_numpy(image_masks))
        instances.gt_keypoints = Keypoints(torch.from_numpy(points))
        tensor = _tensor(model, image)
        batch.append({"image": tensor, "instances": instances})
    model.train()
    with EventStorage(0):
        return model(batch)
