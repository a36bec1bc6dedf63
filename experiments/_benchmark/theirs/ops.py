"""torchvision's operators."""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from ..inputs import IMAGE_SIZE
from ..worker import Case


Arrays = dict[str, np.ndarray]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensor(array: np.ndarray) -> torch.Tensor:
    """An array on the device that is measured."""
    return torch.from_numpy(array).to(DEVICE)


def ready(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, returning once its result is there."""
    if DEVICE.type == "cpu":
        return function

    def run() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return run


def evaluated(function: Callable[[], Any], **names: Callable[[Any], torch.Tensor]) -> Case:
    """A case of a function that needs no gradients; each name says which part of its result it stands for."""

    def run() -> Any:
        with torch.inference_mode():
            return function()

    return Case(ready(run), lambda result: {name: part(result).cpu().numpy() for name, part in names.items()})


def nms(arrays: Arrays, *, iou_threshold: float) -> Case:
    boxes, scores = tensor(arrays["boxes"]), tensor(arrays["scores"])

    def mask(indices):
        return torch.zeros(len(boxes), dtype=torch.bool).index_fill(0, indices.cpu(), True)

    return evaluated(lambda: ops.nms(boxes, scores, iou_threshold), keep=mask)


def box_selection(arrays: Arrays, *, score_threshold: float, iou_threshold: float, max_detections: int) -> Case:
    """`RoIHeads.postprocess_detections` from scores and decoded boxes on."""
    all_boxes, all_scores = tensor(arrays["boxes"]), tensor(arrays["scores"])

    def select():
        labels = torch.arange(all_scores.shape[1], device=DEVICE).view(1, -1).expand_as(all_scores).reshape(-1)
        boxes, scores = all_boxes.reshape(-1, 4), all_scores.reshape(-1)
        inds = torch.where(scores > score_threshold)[0]
        boxes, scores, labels = boxes[inds], scores[inds], labels[inds]
        keep = ops.batched_nms(boxes, scores, labels, iou_threshold)[:max_detections]
        return boxes[keep], scores[keep], labels[keep]

    return evaluated(select, boxes=lambda r: r[0], scores=lambda r: r[1], labels=lambda r: r[2])


def roi_align(arrays: Arrays, *, levels: int, backward: bool) -> Case:
    maps = {str(i): tensor(arrays[f"map{i}"])[None] for i in range(levels)}
    pooler, boxes = ops.MultiScaleRoIAlign(list(maps), 7, 2), tensor(arrays["boxes"])
    if not backward:
        return evaluated(lambda: pooler(maps, [boxes], [IMAGE_SIZE]), pooled=lambda r: r)
    cotangent, inputs = tensor(arrays["cotangent"]), [m.requires_grad_() for m in maps.values()]

    def gradient():
        return torch.autograd.grad(pooler(maps, [boxes], [IMAGE_SIZE]), inputs, cotangent)

    return Case(ready(gradient), lambda r: {f"gradient{i}": g[0].cpu().numpy() for i, g in enumerate(r)})


def paste_masks(arrays: Arrays, *, image_size: tuple[int, int], threshold: float | None = None) -> Case:
    masks, boxes = tensor(arrays["masks"])[:, None], tensor(arrays["boxes"])

    def paste():
        pasted = paste_masks_in_image(masks, boxes, tuple(image_size))
        return pasted if threshold is None else pasted > threshold

    return evaluated(paste, pasted=lambda r: r[:, 0])


def redraw_masks(arrays: Arrays, *, image_size: tuple[int, int]) -> Case:
    """As `paste_masks`: torchvision's takes no memory for its result."""
    return paste_masks(arrays, image_size=image_size)


def mask_targets(arrays: Arrays) -> Case:
    masks, rois, matched = tensor(arrays["masks"]), tensor(arrays["rois"]), tensor(arrays["matched"]).long()
    return evaluated(lambda: project_masks_on_boxes(masks, rois, matched, 28), targets=lambda r: r)


def pairwise_iou(arrays: Arrays) -> Case:
    boxes, anchors = tensor(arrays["boxes"]), tensor(arrays["anchors"])
    return evaluated(lambda: ops.box_iou(boxes, anchors), iou=lambda r: r)


def decode_boxes(arrays: Arrays) -> Case:
    deltas, anchors, coder = tensor(arrays["deltas"]), tensor(arrays["anchors"]), BoxCoder((1.0, 1.0, 1.0, 1.0))
    return evaluated(lambda: coder.decode_single(deltas, anchors), boxes=lambda r: r)


def match_boxes(arrays: Arrays) -> Case:
    iou, matcher = tensor(arrays["iou"]), Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return evaluated(lambda: matcher(iou), matches=lambda r: r)


def resize(arrays: Arrays, *, output_size: tuple[int, int]) -> Case:
    image = tensor(arrays["image"]).permute(2, 0, 1)[None].float().contiguous()

    def resized():
        return functional.interpolate(image, size=tuple(output_size), mode="bilinear", align_corners=False)

    return evaluated(resized, image=lambda r: r[0].permute(1, 2, 0))


def backbone(arrays: Arrays, *, body: str, weights: str, backward: bool) -> Case:
    """Its parameters are drawn here and left in the file `weights` for the other side."""
    torch.manual_seed(0)
    norm = ops.FrozenBatchNorm2d
    model = resnet_fpn_backbone(backbone_name=body, weights=None, norm_layer=norm, trainable_layers=5)
    np.savez(weights, **{name: value.numpy() for name, value in model.state_dict().items()})
    model, images = model.to(DEVICE), tensor(arrays["images"])
    if not backward:
        levels = {f"p{level}": name for level, name in zip(range(2, 7), ("0", "1", "2", "3", "pool"), strict=True)}
        return evaluated(lambda: model(images), **{key: lambda r, name=name: r[name] for key, name in levels.items()})
    parameters = list(model.parameters())
    shown = {"stem": model.body.conv1.weight, "top": model.fpn.layer_blocks[3][0].weight}
    positions = {name: next(i for i, p in enumerate(parameters) if p is shown[name]) for name in shown}

    def gradient():
        total = sum((output**2).mean() for output in model(images).values())
        return torch.autograd.grad(total, parameters)

    return Case(ready(gradient), lambda r: {name: r[i].cpu().numpy() for name, i in positions.items()})


CASES = {
    case.__name__: case
    for case in (
        nms, box_selection, roi_align, paste_masks, redraw_masks, mask_targets, pairwise_iou, decode_boxes, match_boxes,
        resize, backbone,
    )
}  # fmt: skip
