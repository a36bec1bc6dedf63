"""torchvision's counterparts of what the benchmark measures, as functions without arguments to be timed."""

import re

import numpy as np
import torch
from torchvision import ops
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detectax_eqx.weights import to_torchvision


def nms(boxes, scores, threshold):
    """Keep mask of boxes."""
    boxes, scores = torch.from_numpy(boxes), torch.from_numpy(scores)

    def run():
        keep = torch.zeros(len(boxes), dtype=torch.bool)
        keep[ops.nms(boxes, scores, threshold)] = True
        return keep

    return run


def multilevel_roi_align(maps, boxes, image_size):
    """Pooled features of boxes, 7×7 with two samples a bin and axis."""
    pooler = ops.MultiScaleRoIAlign([str(i) for i in range(len(maps))], 7, 2)
    tensors = {str(i): torch.from_numpy(m)[None] for i, m in enumerate(maps)}
    boxes = torch.from_numpy(boxes)
    return lambda: pooler(tensors, [boxes], [image_size])


def paste_masks(masks, boxes, image_size):
    """Masks on an image."""
    masks, boxes = torch.from_numpy(masks)[:, None], torch.from_numpy(boxes)
    return lambda: paste_masks_in_image(masks, boxes, image_size)[:, 0]


def detector(name, model, **sizes):
    """The named detector with the parameters of ours."""
    body = re.search(r"resnet\d+", name)[0]
    norm = ops.FrozenBatchNorm2d
    backbone = resnet_fpn_backbone(backbone_name=body, weights=None, norm_layer=norm, trainable_layers=5)
    reference = (MaskRCNN if name.startswith("mask") else FasterRCNN)(backbone, model.num_classes + 1, **sizes)
    reference.load_state_dict({key: torch.from_numpy(array) for key, array in to_torchvision(model).items()})
    return reference


def inference(name, model, image, **sizes):
    """Detection in one image."""
    reference = detector(name, model, **sizes).eval()
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255

    def run():
        with torch.no_grad():
            return reference([tensor])[0]["boxes"].numpy()

    return run


def training(name, model, images, boxes, labels):
    """Forward and backward on a batch with rectangular masks."""
    size = images.shape[1:3]
    reference = detector(name, model, min_size=min(size), max_size=max(size)).train()
    tensors = [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images]
    targets = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        masks = torch.zeros((len(image_boxes), *size), dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, image_boxes.astype(np.int64), strict=True):
            mask[y0:y1, x0:x1] = 1
        labels_ = torch.from_numpy(image_labels + 1).long()
        targets.append({"boxes": torch.from_numpy(image_boxes), "labels": labels_, "masks": masks})

    def run():
        reference.zero_grad()
        sum(reference(tensors, targets).values()).backward()

    return run
