"""Writes torchvision's own results for the tests: `.venv-parity/bin/python tests/parity/make_reference.py`.

`tests/data/torchvision_ops.npz` holds inputs and results of its operators, under `<operator>.<what>`;
`tests/data/torchvision_names.json` holds the names and shapes of its detectors' parameters, as trees.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import ops
from torchvision.models import mobilenet_v2
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    fcos_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops.boxes import _batched_nms_vanilla


DATA = Path(__file__).parent.parent / "data"
BODIES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")
DENSE = (retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2, fcos_resnet50_fpn)
WHOLE = {
    "faster_rcnn_mobilenet_v3_large_fpn": fasterrcnn_mobilenet_v3_large_fpn,
    "ssd300_vgg16": ssd300_vgg16,
    "ssdlite320_mobilenet_v3_large": ssdlite320_mobilenet_v3_large,
}
# A canvas whose P5 has an odd number of rows, so that P6's stride is not 64.
CANVAS, STRIDES, SIZES, ASPECT_RATIOS = (800, 1088), (4, 8, 16, 32, 64), (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)


def random_boxes(rng, count, height, width, side=(0.05, 0.6)):
    """Boxes `(x0, y0, x1, y1)`, some of which extend beyond the image."""
    size = np.array([width, height])
    corner = rng.uniform(-0.2, 0.9, (count, 2)) * size
    return np.concatenate([corner, corner + rng.uniform(*side, (count, 2)) * size], axis=1).astype(np.float32)


def special_boxes(height, width):
    """The borders of an image, points and lines inside it and on its border, and boxes that are far outside or huge."""
    h, w = height, width
    boxes = [
        [0, 0, w, h],
        [-1, -1, w + 1, h + 1],
        [w / 2, h / 2, w / 2, h / 2],
        [w, h, w, h],
        [3, 5, 3, 17],
        [3, 5, 17, 5],
        [-9, -7, -4, -3],
        [w + 9, h + 9, w + 30, h + 20],
        [-5 * w, -3 * h, 4 * w, 6 * h],
        [w - 0.5, h - 0.5, w + 3, h + 2],
        [0.25, 0.25, 0.75, 0.5],
    ]
    return np.array(boxes, np.float32)


def overlaps(rng):
    a, b = random_boxes(rng, 24, 100, 120), random_boxes(rng, 20, 100, 120)
    b[:4], a[4, 3], a[5, 2] = a[:4], a[4, 1], a[5, 0]  # equal boxes and two lines; torchvision's CIoU of points is NaN
    measures = {
        "iou": ops.box_iou,
        "giou": ops.generalized_box_iou,
        "diou": ops.distance_box_iou,
        "ciou": ops.complete_box_iou,
    }
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    return {"a": a, "b": b} | {name: measure(ta, tb) for name, measure in measures.items()}


def suppression(rng):
    boxes = random_boxes(rng, 120, 100, 100, side=(0.2, 0.6)).round()
    labels = rng.integers(0, 4, 120)
    scores = rng.permutation(120).astype(np.float32) / 120
    tied = np.floor(scores * 8) / 8
    t = torch.from_numpy
    results = {"boxes": boxes, "labels": labels, "scores": scores, "tied": tied}
    for threshold in (0.3, 0.5, 0.7):
        results[f"nms.{threshold}"] = ops.nms(t(boxes), t(tied), threshold)
        results[f"batched.{threshold}"] = _batched_nms_vanilla(t(boxes), t(scores), t(labels), threshold)
    return results


def pooling(rng):
    features = rng.normal(size=(2, 12, 15)).astype(np.float32)
    boxes = np.concatenate([random_boxes(rng, 24, 48, 60), special_boxes(48, 60)])
    results = {"features": features, "boxes": boxes}
    for aligned in (False, True):
        for sampling_ratio in (0, 2):
            results[f"{aligned}.{sampling_ratio}"] = ops.roi_align(
                torch.from_numpy(features)[None],
                [torch.from_numpy(boxes)],
                (3, 2),
                spatial_scale=0.25,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
    return results


def pyramid_pooling(rng):
    height, width = 128, 160
    strides = STRIDES[:-1]
    maps = [rng.normal(size=(2, height // stride, width // stride)).astype(np.float32) for stride in strides]
    sides = np.exp(rng.uniform(np.log(4), np.log(160), (24, 2)))
    centres = rng.uniform(0, 1, (24, 2)) * [width, height]
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    squares = np.array([[8, 8, 8 + side, 8 + side] for side in (14, 28, 56, 112)])  # exactly between two levels
    boxes = np.concatenate([boxes, squares, special_boxes(height, width)]).astype(np.float32)
    pool = ops.MultiScaleRoIAlign(
        ["0", "1", "2", "3"], output_size=3, sampling_ratio=2, canonical_scale=56, canonical_level=4
    )
    pooled = pool(
        {str(i): torch.from_numpy(level)[None] for i, level in enumerate(maps)},
        [torch.from_numpy(boxes)],
        [(height, width)],
    )
    return {f"features.{i}": level for i, level in enumerate(maps)} | {"boxes": boxes, "pooled": pooled}


def coding(rng):
    anchors = random_boxes(rng, 24, 100, 120)
    boxes = random_boxes(rng, 24, 100, 120)
    deltas = rng.normal(size=(24, 4)).astype(np.float32)
    deltas[:4, 2:] *= 40  # beyond the clamp
    results = {"anchors": anchors, "boxes": boxes, "deltas": deltas}
    for name, weights in {"rpn": (1.0, 1.0, 1.0, 1.0), "box": (10.0, 10.0, 5.0, 5.0)}.items():
        coder = BoxCoder(weights)
        results[f"encoded.{name}"] = coder.encode_single(torch.from_numpy(boxes), torch.from_numpy(anchors))
        results[f"decoded.{name}"] = coder.decode_single(torch.from_numpy(deltas), torch.from_numpy(anchors))
    return results


def anchors():
    """Per level: its size, sums with and without the position as weight, and every 997th anchor."""
    generator = AnchorGenerator(tuple((size,) for size in SIZES), (ASPECT_RATIOS,) * len(SIZES))
    sizes = [(-(-CANVAS[0] // stride), -(-CANVAS[1] // stride)) for stride in STRIDES]
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    everything = generator(ImageList(torch.zeros(1, 3, *CANVAS), [CANVAS]), maps)[0].numpy()
    results, ends = {}, np.cumsum([3 * h * w for h, w in sizes])[:-1]
    for i, (level, size) in enumerate(zip(np.split(everything, ends), sizes, strict=True)):
        whole = level.astype(np.int64)
        assert (whole == level).all()
        results |= {
            f"size.{i}": size,
            f"samples.{i}": level[::997],
            f"sums.{i}": np.stack([whole.sum(axis=0), (whole * np.arange(len(whole))[:, None]).sum(axis=0)]),
        }
    return results


def matching(rng):
    quality = np.round(rng.uniform(0, 1, (6, 40)), 1).astype(np.float32)  # multiples of 0.1, for many ties
    quality[:, 20:] *= 0.5
    quality[5] *= 0.4
    results = {"quality": quality}
    for high, low, allow_low_quality in ((0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False)):
        matched = Matcher(high, low, allow_low_quality)(torch.from_numpy(quality))
        results[f"{high}.{low}.{allow_low_quality}"] = matched
    return results


def masks(rng):
    height, width = 28, 36
    boxes = np.concatenate([random_boxes(rng, 8, height, width), special_boxes(height, width)[:6]])
    small = rng.uniform(0, 1, (len(boxes), 5, 5)).astype(np.float32)
    pasted = paste_masks_in_image(torch.from_numpy(small)[:, None], torch.from_numpy(boxes), (height, width))[:, 0]
    whole = rng.random((3, height, width)) < 0.5
    rois = np.concatenate([random_boxes(rng, 12, height, width), special_boxes(height, width)])
    matched = rng.integers(0, 3, len(rois))
    cropped = project_masks_on_boxes(
        torch.from_numpy(whole.astype(np.uint8)), torch.from_numpy(rois), torch.from_numpy(matched), 6
    )
    return {
        "boxes": boxes,
        "small": small,
        "pasted": pasted,
        "whole": whole,
        "rois": rois,
        "matched": matched,
        "cropped": cropped,
    }


def losses(rng):
    a, b = random_boxes(rng, 16, 100, 120), random_boxes(rng, 16, 100, 120)
    b[:3], a[3, 3], a[4, 2] = a[:3], a[3, 1], a[4, 0]
    logits = rng.normal(size=(6, 8)).astype(np.float32) * 6
    targets = (rng.random((6, 8)) < 0.3).astype(np.float32)
    ta, tb, tl, tt = (torch.from_numpy(x) for x in (a, b, logits, targets))
    return {
        "a": a,
        "b": b,
        "logits": logits,
        "targets": targets,
        "giou": ops.generalized_box_iou_loss(ta, tb),
        "diou": ops.distance_box_iou_loss(ta, tb),
        "ciou": ops.complete_box_iou_loss(ta, tb),
        "focal": ops.sigmoid_focal_loss(tl, tt),
        "focal_unweighted": ops.sigmoid_focal_loss(tl, tt, alpha=-1, gamma=1.5),
        "smooth_l1": F.smooth_l1_loss(tl, tt, beta=1 / 9, reduction="none"),
    }


def parameter_names():
    """Names and shapes of the backbones with their pyramids, and of each detector's other parameters.

    These are a two-stage detector's heads, and the pyramid and heads of dense detectors and of second versions.
    Detectors with another body are whole.
    """

    def shapes(model):
        state = model.state_dict()
        return {name: "x".join(map(str, x.shape)) for name, x in state.items() if "num_batches" not in name}

    def tree(flat):
        root = {}
        for name, shape in flat.items():
            *path, last = name.split(".")
            node = root
            for part in path:
                node = node.setdefault(part, {})
            node[last] = shape
        return root

    backbones = {body: shapes(resnet_fpn_backbone(backbone_name=body, weights=None)) for body in BODIES}
    trees = {
        "backbones": {body: tree(flat) for body, flat in backbones.items()},
        "heads": {},
        "second": {},
        "dense": {},
        "whole": {},
    }
    two_stage = {
        "faster_rcnn": fasterrcnn_resnet50_fpn,
        "mask_rcnn": maskrcnn_resnet50_fpn,
        "keypoint_rcnn": keypointrcnn_resnet50_fpn,
    }
    for name, build in two_stage.items():
        everything = shapes(build(weights=None, weights_backbone=None))
        backbone = {k.removeprefix("backbone."): v for k, v in everything.items() if k.startswith("backbone.")}
        assert backbone == backbones["resnet50"]
        trees["heads"][name] = tree({k: v for k, v in everything.items() if not k.startswith("backbone.")})
    body = {k: v for k, v in backbones["resnet50"].items() if k.startswith("body.")}
    for kind, name, build in (
        ("second", "faster_rcnn_resnet50_fpn_v2", fasterrcnn_resnet50_fpn_v2),
        ("second", "mask_rcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
        *(("dense", build.__name__, build) for build in DENSE),
    ):
        everything = shapes(build(weights=None, weights_backbone=None))
        assert body == {k.removeprefix("backbone."): v for k, v in everything.items() if "backbone.body." in k}
        trees[kind][name] = tree({k: v for k, v in everything.items() if "backbone.body." not in k})
    for name, build in WHOLE.items():
        trees["whole"][name] = tree(shapes(build(weights=None, weights_backbone=None)))
    trees["mobilenet_v2"] = tree(shapes(mobilenet_v2(weights=None)))
    return trees


if __name__ == "__main__":
    makers = (overlaps, suppression, pooling, pyramid_pooling, coding, matching, masks, losses)
    groups = {make.__name__: make(np.random.default_rng(i)) for i, make in enumerate(makers)} | {"anchors": anchors()}
    arrays: dict[str, Any] = {
        f"{group}.{name}": np.asarray(x) for group, entries in groups.items() for name, x in entries.items()
    }
    np.savez_compressed(DATA / "torchvision_ops.npz", **arrays)
    names = json.dumps(parameter_names(), separators=(",", ":"))
    (DATA / "torchvision_names.json").write_text(names + "\n", encoding="utf-8")
