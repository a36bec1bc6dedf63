"""Writes Detectron2's own results for the tests: `python -m tests.parity.make_detectron2_reference [KIND …]`.

Runs where `detectron2_models.py` does. `tests/data/detectron2_names.json` holds the names and shapes of the parameters
of some detectors; `tests/data/detectron2_<kind>.npz` the predictors, detections and losses of tiny ones, whose other
parameters, images and objects `tests/detectron2_tiny.py` draws.
"""
# pyright: reportMissingImports=false

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec

from .. import detectron2_tiny as tiny
from .detectron2_models import (
    EVERYTHING,
    arrays_of,
    detections,
    for_losses,
    losses,
    new_detector,
    new_lsj_detector,
    resized,
    sharpen,
    vitdet_config,
)


DATA = Path(__file__).parent.parent / "data"
NAMED = (
    "mask_rcnn_resnet50_fpn_detectron2",
    "mask_rcnn_resnext101_32x8d_fpn_detectron2",
    "faster_rcnn_resnet101_fpn_detectron2",
    "keypoint_rcnn_resnet50_fpn_detectron2",
    "cascade_mask_rcnn_resnet50_fpn_detectron2",
    "retinanet_resnet50_fpn_detectron2",
)
# The parameters whose gradients are stored.
GRADIENTS = {
    *{"backbone.fpn_output3.weight", "backbone.bottom_up.res4.0.conv2.weight"},
    *{"backbone.net.blocks.1.attn.qkv.weight", "backbone.net.blocks.2.attn.rel_pos_h", "backbone.net.pos_embed"},
    "backbone.bottom_up.layers.1.blocks.1.attn.relative_position_bias_table",
    "backbone.bottom_up.layers.0.downsample.reduction.weight",
}
# The layers that `sharpen` changes, which are stored.
PREDICTORS = re.compile(r"cls_score|bbox_pred|objectness_logits|anchor_deltas|mask_head\.predictor|score_lowres")


def tiny_detector(kind: str, **changes: Any) -> torch.nn.Module:
    """Detectron2's counterpart of `detectron2_tiny.build(kind)`."""
    sizes = [[size] for size in tiny.SIZES]
    if kind == "retinanet":
        sizes = [[size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)] for size in tiny.SIZES]
    options = {
        "MODEL__RESNETS__STEM_OUT_CHANNELS": tiny.WIDTH,
        "MODEL__RESNETS__WIDTH_PER_GROUP": tiny.WIDTH,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 4 * tiny.WIDTH,
        "MODEL__FPN__OUT_CHANNELS": tiny.CHANNELS,
        "MODEL__ANCHOR_GENERATOR__SIZES": sizes,
        "MODEL__ROI_HEADS__NUM_CLASSES": tiny.CLASSES,
        "MODEL__ROI_BOX_HEAD__FC_DIM": tiny.HIDDEN,
        "MODEL__ROI_MASK_HEAD__CONV_DIM": tiny.CHANNELS,
        "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (tiny.CHANNELS,) * tiny.DEPTH,
        "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": tiny.POINTS,
        "MODEL__RETINANET__NUM_CLASSES": tiny.CLASSES,
        "MODEL__RETINANET__NUM_CONVS": tiny.DEPTH,
    }
    model = new_detector(f"{kind}_resnet50_fpn_detectron2", **(options | changes))
    bottom_up = model.backbone.bottom_up
    for i, name in enumerate(bottom_up.stage_names):  # one block per stage
        bottom_up.stages[i] = bottom_up.stages[i][:1]
        setattr(bottom_up, name, bottom_up.stages[i])
    return prepared(model, kind)


def tiny_transformer(kind: str, *, training: bool = False) -> torch.nn.Module:
    """Detectron2's counterpart of `detectron2_tiny.make_transformer(kind)`."""
    name = {"mask_rcnn_vitdet": "mask_rcnn_vitdet_b", "mask_rcnn_swin": "mask_rcnn_swin_t_fpn"}[kind]
    model = vitdet_config(name)
    backbone, rpn, heads = model.backbone, model.proposal_generator, model.roi_heads
    backbone.square_pad, backbone.out_channels = tiny.SIDE, tiny.CHANNELS
    if kind == "mask_rcnn_vitdet":
        backbone.net.update(embed_dim=tiny.CHANNELS, depth=3, num_heads=tiny.HEADS[1])
        backbone.net.update(img_size=tiny.SIDE, window_size=tiny.WINDOW, window_block_indexes=[0, 1])
    else:
        depths, num_heads = [2, 2, 1, 1], [*tiny.HEADS, 4, 8]
        backbone.bottom_up.update(embed_dim=tiny.WIDTH, depths=depths, num_heads=num_heads, window_size=tiny.WINDOW)
    rpn.head.in_channels, rpn.anchor_generator.sizes = tiny.CHANNELS, [[size] for size in tiny.SIZES]
    heads.num_classes = tiny.CLASSES
    heads.box_head.update(conv_dims=[tiny.CHANNELS] * tiny.DEPTH, fc_dims=[tiny.HIDDEN])
    heads.box_head.input_shape = ShapeSpec(channels=tiny.CHANNELS, height=7, width=7)
    heads.box_predictor.input_shape = ShapeSpec(channels=tiny.HIDDEN)
    heads.mask_head.update(
        input_shape=ShapeSpec(channels=tiny.CHANNELS, height=14, width=14), conv_dims=[tiny.CHANNELS] * 5
    )
    return prepared(instantiate(for_losses(model, tiny.SIDE) if training else model).eval(), kind)


def prepared(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The model with the parameters of `detectron2_tiny.random_arrays`, and sharpened predictors."""
    arrays = tiny.random_arrays(kind)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=False)
    assert {name: x.shape for name, x in arrays_of(model).items()} == {name: x.shape for name, x in arrays.items()}
    generator = torch.Generator().manual_seed(0)
    sharpen(model, torch.rand(3, 128, 192, generator=generator) * 255)
    return model


def reference(kind: str) -> dict[str, np.ndarray]:
    """The predictors of a tiny detector, its detections in two images, and its losses with all candidates sampled."""
    model = tiny_transformer(kind) if kind in tiny.TRANSFORMERS else tiny_detector(kind)
    result = {f"weights.{name}": x for name, x in arrays_of(model).items() if PREDICTORS.search(name)}
    for i, image in enumerate(tiny.images()):
        own = resized(image, *tiny.sizes(kind))
        result[f"{i}.resized"] = np.array(own.shape[:2])
        result |= {f"{i}.own.{key}": x for key, x in detections(model, own).items() if key != "masks"}
        found = detections(model, own, size=image.shape[:2])
        if "masks" in found:
            found["masks"] = np.packbits(found["masks"])
        result |= {f"{i}.{key}": x for key, x in found.items()}
        assert len(found["scores"]) > 20, "too few detections to show much"
    sampling = {
        "MODEL__RPN__BATCH_SIZE_PER_IMAGE": EVERYTHING,
        "MODEL__RPN__PRE_NMS_TOPK_TRAIN": 200,
        "MODEL__RPN__POST_NMS_TOPK_TRAIN": 60,
        "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": EVERYTHING,
        "MODEL__ROI_HEADS__POSITIVE_FRACTION": 0.5,
        "INPUT__MASK_FORMAT": "bitmask",
    }
    transformer = kind in tiny.TRANSFORMERS
    model = tiny_transformer(kind, training=True) if transformer else tiny_detector(kind, **sampling)
    terms = losses(model, *tiny.targets())
    result |= {f"loss.{term}": np.array(value.item()) for term, value in terms.items()}
    if kind == "retinanet":
        result["loss_normalizer"] = np.array(model.loss_normalizer)
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in model.named_parameters():
        if name in GRADIENTS:
            result[f"grad.{name}"] = parameter.grad.numpy()
    return result


def names_and_shapes() -> dict[str, dict[str, str]]:
    """Names and shapes of the parameters of some detectors."""
    models = {name: new_detector(name) for name in NAMED}
    models["mask_rcnn_resnet50_fpn_lsj_detectron2"] = new_lsj_detector()
    return {
        name: {key: "x".join(map(str, x.shape)) for key, x in model.state_dict().items() if "num_batches" not in key}
        for name, model in models.items()
    }


def compact(shapes: dict[str, str]) -> dict[str, Any]:
    """A tree of the names, split at dots."""
    root: dict[str, Any] = {}
    for name, shape in shapes.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            node = node.setdefault(part, {})
        node[last] = shape
    return root


if __name__ == "__main__":
    for kind in sys.argv[1:] or (*tiny.KINDS, *tiny.TRANSFORMERS):
        arrays: Any = reference(kind)
        np.savez_compressed(DATA / f"detectron2_{kind}.npz", **arrays)
    trees = {name: compact(shapes) for name, shapes in names_and_shapes().items()}
    (DATA / "detectron2_names.json").write_text(json.dumps(trees, separators=(",", ":")) + "\n", encoding="utf-8")
