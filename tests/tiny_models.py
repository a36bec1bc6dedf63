"""A tiny detector of each kind, built once, and objects to train it on."""

import functools
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from detectax_eqx import Targets, models, nn


CANVAS = (64, 96)
SIZE = jnp.array(CANVAS, jnp.int32)
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SAMPLING = models.TwoStageSampling(pre_nms_top_n=50, post_nms_top_n=40, rpn_samples=32, box_samples=32)
PREPROCESSING = models.Preprocessing(models.ShortestEdge(64, 96))


def tiny_body(key):
    return nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=key, width=8, norm=nn.GroupNorm)


def tiny_resnet(body_key, fpn_key, norm=None):
    return nn.BackboneWithFPN(tiny_body(body_key), key=fpn_key, channels=16, norm=norm)


def tiny_vit(body_key, fpn_key):
    options = {"side": 4, "window": 3, "global_blocks": (1,), "relative_side": 4}
    return nn.ViTFPN(nn.ViT(16, 2, 2, key=body_key, **options), key=fpn_key, channels=16)


def tiny_swin(body_key, fpn_key):
    body = nn.Swin(8, (1, 2, 1, 1), (1, 2, 2, 2), key=body_key, window=4, drop_path=0.0)
    return nn.BackboneWithFPN(body, key=fpn_key, channels=16, norm=nn.LayerNorm2d)


def tiny_two_stage(build, key, num_classes=3, make_backbone=tiny_resnet, **parts):
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = make_backbone(body_key, fpn_key)
    sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (96.0,))
    model = build(backbone, num_classes, key=heads_key, hidden_size=32, anchor_sizes=sizes, **parts)
    return replace(model, preprocessing=PREPROCESSING, sampling=SAMPLING)


def tiny_dense(build, key, num_classes=3, **parts):
    body_key, fpn_key, top_key, heads_key = jr.split(key, 4)
    top = nn.ConvolvedTop(16, 16, key=top_key)
    backbone = nn.BackboneWithFPN(tiny_body(body_key), key=fpn_key, channels=16, finest=3, top=top)
    return replace(build(backbone, num_classes, key=heads_key, depth=2, **parts), preprocessing=PREPROCESSING)


def tiny_mobilenet(build, key, num_classes=3):
    """A Faster R-CNN on a narrow MobileNet: levels of strides 16 to 64, the last two of the body of equal size."""
    body_key, fpn_key, heads_key = jr.split(key, 3)
    body = build(key=body_key, width_multiplier=0.25, norm=partial(nn.GroupNorm, groups=8))
    backbone = nn.MobileNetFPN(body, key=fpn_key, channels=16, levels=(3, 4, 5))
    sizes = ((8.0, 16.0, 32.0, 64.0),) * 4
    model = models.faster_rcnn(backbone, num_classes, key=heads_key, hidden_size=32, anchor_sizes=sizes)
    # Among two levels of equal anchors, detection must leave out the proposals that training leaves out.
    return replace(
        model,
        preprocessing=PREPROCESSING,
        sampling=replace(SAMPLING, rpn_score_threshold=0.01),
        selection=models.selected(model, rpn_score_threshold=0.01),
    )


BOXES = models.DefaultBoxes(steps=None)


def tiny_ssd(key, num_classes=3):
    body_key, extras_key, heads_key = jr.split(key, 3)
    extras = ((32, 2, 1), (16, 2, 1), (16, 2, 1), (16, 2, 1))
    backbone = nn.SSDVGG(nn.vgg16(key=body_key, width=8), key=extras_key, fc_channels=32, extras=extras)
    model = models.ssd(backbone, num_classes, key=heads_key, default_boxes=BOXES)
    return replace(model, preprocessing=PREPROCESSING)


def tiny_ssdlite(key, num_classes=3):
    body_key, extras_key, heads_key = jr.split(key, 3)
    norm = partial(nn.GroupNorm, groups=8)
    body = nn.mobilenet_v3_large(key=body_key, norm=norm, width_multiplier=0.25, reduced_tail=True)
    backbone = nn.SSDMobileNet(body, key=extras_key, norm=norm, extras=(32, 16, 16, 16))
    return replace(models.ssdlite(backbone, num_classes, key=heads_key, norm=norm), preprocessing=PREPROCESSING)


def tiny_rf_detr(build, key, num_classes=3):
    """On canvases that need not be square: patches of 8 pixels, in four windows."""
    keys = jr.split(key, 3)
    body = nn.WindowedViT(16, 2, key=keys[0], patch_size=8, side=8, windows=2, taps=(1, 2))
    backbone = nn.ProjectedViT(body, key=keys[1], channels=16, depth=1)
    options = {"layers": 2, "queries": 20, "groups": 2, "self_heads": 2, "cross_heads": 2, "hidden_size": 32}
    return replace(build(backbone, num_classes, key=keys[2], **options), preprocessing=PREPROCESSING)


def tiny_detr(key, num_classes=3):
    keys = jr.split(key, 3)
    body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=keys[0], norm=nn.GroupNorm, width=8)
    backbone = nn.ProjectedResNet(body, key=keys[1], channels=16)
    options = {"layers": 2, "queries": 20, "heads": 2, "hidden_size": 32}
    return replace(models.detr(backbone, num_classes, key=keys[2], **options), preprocessing=PREPROCESSING)


def tiny_deformable_detr(key, num_classes=3):
    keys = jr.split(key, 3)
    body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=keys[0], norm=nn.GroupNorm, width=8)
    backbone = nn.ProjectedLevels(body, key=keys[1], channels=16)
    options = {"layers": 2, "queries": 20, "heads": 2, "points": 2, "hidden_size": 32}
    model = models.deformable_detr(backbone, num_classes, key=keys[2], refine=True, two_stage=True, **options)
    return replace(model, preprocessing=PREPROCESSING)


V2 = {
    "make_backbone": partial(tiny_resnet, norm=nn.GroupNorm),
    "rpn_depth": 2,
    "box_head": partial(models.ConvBoxHead, hidden_channels=16, depth=2, norm=nn.GroupNorm),
}
# How to build each tiny detector, and the names of its loss terms.
MODELS = {
    "faster": (partial(tiny_two_stage, models.faster_rcnn), LOSSES),
    "mask": (partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16), LOSSES | {"loss_mask"}),
    "keypoint": (
        partial(tiny_two_stage, models.keypoint_rcnn, num_keypoints=3, hidden_channels=16, depth=2),
        LOSSES | {"loss_keypoint"},
    ),
    "mask_v2": (
        partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16, mask_norm=nn.GroupNorm, **V2),
        LOSSES | {"loss_mask"},
    ),
    "cascade": (
        partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16, box_head=models.CascadeHead),
        {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
        | {f"{name}_stage{i}" for name in ("loss_classifier", "loss_box_reg") for i in range(3)},
    ),
    "vit": (partial(tiny_two_stage, models.faster_rcnn, make_backbone=tiny_vit), LOSSES),
    "swin": (partial(tiny_two_stage, models.faster_rcnn, make_backbone=tiny_swin), LOSSES),
    "mobilenet": (partial(tiny_mobilenet, nn.mobilenet_v3_large), LOSSES),
    "retinanet": (
        partial(tiny_dense, models.retinanet, anchor_sizes=((12.0,), (24.0,), (36.0,), (48.0,), (64.0,))),
        {"classification", "bbox_regression"},
    ),
    "ssd": (tiny_ssd, {"classification", "bbox_regression"}),
    "ssdlite": (tiny_ssdlite, {"classification", "bbox_regression"}),
    "rf_detr": (partial(tiny_rf_detr, models.rf_detr), {"loss_class", "loss_l1", "loss_giou"}),
    "rf_detr_seg": (
        partial(tiny_rf_detr, models.rf_detr_seg),
        {"loss_class", "loss_l1", "loss_giou", "loss_mask", "loss_dice"},
    ),
    "detr": (tiny_detr, {"loss_class", "loss_l1", "loss_giou"}),
    "deformable_detr": (tiny_deformable_detr, {"loss_class", "loss_l1", "loss_giou"}),
    "fcos": (partial(tiny_dense, models.fcos), {"classification", "bbox_regression", "bbox_ctrness"}),
}


def targets_of(boxes, labels, capacity=4):
    """Rectangular objects, padded to a capacity. Three points of each lie on the diagonal of its box."""
    n = len(labels)
    padded = jnp.zeros((capacity, 4)).at[:n].set(jnp.asarray(boxes, jnp.float32).reshape(n, 4))
    return Targets(
        padded,
        jnp.zeros(capacity, jnp.int32).at[:n].set(jnp.asarray(labels, jnp.int32)),
        jnp.arange(capacity) < n,
        jnp.full((capacity, 14, 14), 255, jnp.uint8),
        padded,
        points_of(padded),
    )


def points_of(boxes):
    """`(x, y, visibility)` at one quarter, half and three quarters of the way from a box's first to its last corner."""
    along = jnp.array([0.25, 0.5, 0.75])[None, :, None]
    places = boxes[:, None, :2] * (1 - along) + boxes[:, None, 2:] * along  # (n, 3, 2)
    visibility = jnp.broadcast_to(jnp.array([2.0, 1.0, 2.0])[None, :, None], (*places.shape[:2], 1))
    return jnp.concatenate([places, visibility], axis=2)


@functools.cache
def made(kind):
    """The model of a kind, built once."""
    return eqx.filter_jit(MODELS[kind][0])(jr.key(0))
