"""Tiny detectors with Detectron2's rules, for comparison with its own results. Uses neither torch nor Detectron2."""

import zlib
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax.random as jr
import numpy as np

from detectax_eqx import models, nn
from detectax_eqx.weights import detectron2_shapes


CLASSES, POINTS, WIDTH, CHANNELS, HIDDEN, DEPTH = 5, 3, 8, 16, 32, 2
SIZES = (16.0, 32.0, 64.0, 128.0, 256.0)
SHORT, LONG = 128, 208
# Images for transformers are resized to this, and placed on a square canvas of this side.
SIDE = 192
WINDOW, HEADS = 5, (1, 2)
KINDS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_mask_rcnn", "retinanet")
TRANSFORMERS = ("mask_rcnn_vitdet", "mask_rcnn_swin")


def sizes(kind):
    """The short and the long side of images after the resize."""
    return (SIDE, SIDE) if kind in TRANSFORMERS else (SHORT, LONG)


def make_transformer(kind):
    """A Mask R-CNN on a ViT of three blocks, or a Swin Transformer of two stages with two blocks each."""
    keys = jr.split(jr.key(0), 3)
    if kind == "mask_rcnn_vitdet":
        options = {"window": WINDOW, "global_blocks": (2,), "relative_side": SIDE // 16}
        body = nn.ViT(CHANNELS, 3, HEADS[1], key=keys[0], **options)
        backbone = nn.ViTFPN(body, key=keys[1], channels=CHANNELS)
    else:
        body = nn.Swin(WIDTH, (2, 2, 1, 1), (*HEADS, 4, 8), key=keys[0], window=WINDOW, drop_path=0.0)
        backbone = nn.BackboneWithFPN(body, key=keys[1], channels=CHANNELS, norm=nn.LayerNorm2d)
    return models.mask_rcnn_detectron2(
        backbone,
        CLASSES,
        key=keys[2],
        rpn_depth=2,
        box_head=partial(models.ConvBoxHead, norm=nn.LayerNorm2d, hidden_channels=CHANNELS, depth=DEPTH),
        mask_norm=nn.LayerNorm2d,
        hidden_channels=CHANNELS,
        hidden_size=HIDDEN,
        anchor_sizes=tuple((size,) for size in SIZES),
        preprocessing=models.VITDET_PREPROCESSING,
    )


def build(kind):
    """A detector on a ResNet of one bottleneck per stage, or on a small transformer, as shapes only."""

    def make():
        if kind in TRANSFORMERS:
            return make_transformer(kind)
        keys = jr.split(jr.key(0), 4)
        body = nn.ResNet(nn.Bottleneck, (1, 1, 1, 1), key=keys[0], width=WIDTH, stride_in_1x1=True)
        if kind == "retinanet":
            top = nn.ConvolvedTop(body.channels[-1], CHANNELS, key=keys[1], from_features=True)
            backbone = nn.BackboneWithFPN(body, key=keys[2], channels=CHANNELS, finest=3, top=top)
            octaves = tuple((size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)) for size in SIZES)
            return models.retinanet_detectron2(backbone, CLASSES, key=keys[3], depth=DEPTH, anchor_sizes=octaves)
        backbone = nn.BackboneWithFPN(body, key=keys[2], channels=CHANNELS)
        options = {"key": keys[3], "hidden_size": HIDDEN, "anchor_sizes": tuple((size,) for size in SIZES)}
        if kind == "keypoint_rcnn":
            points = {"num_keypoints": POINTS, "hidden_channels": CHANNELS, "depth": DEPTH}
            return models.keypoint_rcnn_detectron2(backbone, CLASSES, **points, **options)
        if kind == "cascade_mask_rcnn":
            options["box_head"] = models.CascadeHead
        if kind.endswith("mask_rcnn"):
            return models.mask_rcnn_detectron2(backbone, CLASSES, hidden_channels=CHANNELS, **options)
        return models.faster_rcnn_detectron2(backbone, CLASSES, **options)

    model = eqx.filter_eval_shape(make)
    short, long = sizes(kind)
    resize = replace(model.preprocessing.resize, min_size=short, max_size=long)
    return replace(model, preprocessing=replace(model.preprocessing, resize=resize))


def random_arrays(kind):
    """Random parameters by Detectron2's names. Each depends on its name and shape alone."""
    arrays = {}
    for name, shape in detectron2_shapes(build(kind)).items():
        draw = np.random.default_rng(zlib.crc32(name.encode()))
        low, high = {"weight": (0.6, 1.0), "running_var": (0.8, 1.2)}.get(name.rpartition(".")[2], (-0.1, 0.1))
        if len(shape) > 1:
            array = draw.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)  # keeps the scale of features through ReLUs
        else:
            array = draw.uniform(low, high, shape)
        arrays[name] = array.astype(np.float32)
    if "backbone.bottom_up.stem.conv1.weight" in arrays:
        arrays["backbone.bottom_up.stem.conv1.weight"] /= 60  # pixels are not divided by a standard deviation
    return arrays


def images(shapes=((6, 9, 90, 131), (11, 7, 290, 187))):
    """8-bit RGB images: blocks of random colours with noise. Of the two by default, one is enlarged, one shrunk.

    `shapes`: rows and columns of blocks, height and width of each image.
    """
    draw = np.random.default_rng(7)
    result = []
    for rows, columns, height, width in shapes:
        coarse = draw.integers(0, 256, (rows, columns, 3))
        y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
        noise = draw.integers(-25, 26, (height, width, 3))
        result.append(np.clip(coarse[y][:, x] + noise, 0, 255).astype(np.uint8))
    return result


def targets():
    """Pixels, boxes, labels, masks of image size, and keypoints, for a batch of two images of 128×160 pixels."""
    draw = np.random.default_rng(8)
    height, width, objects = 128, 160, 4
    pixels = draw.integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    corners = draw.uniform(0, (width - 70, height - 70), (2, objects, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(12, 70, (2, objects, 2))], axis=2).astype(np.float32)
    labels = draw.integers(0, CLASSES, (2, objects)).astype(np.int32)
    masks = draw.random((2, objects, height // 8, width // 8)) < 0.5
    masks = masks.repeat(8, axis=2).repeat(8, axis=3)
    inside_y = (np.arange(height) >= boxes[..., 1, None]) & (np.arange(height) < boxes[..., 3, None])
    inside_x = (np.arange(width) >= boxes[..., 0, None]) & (np.arange(width) < boxes[..., 2, None])
    masks = masks & inside_y[..., :, None] & inside_x[..., None, :]
    return pixels, boxes, labels, masks, keypoints(draw, boxes, POINTS)


def keypoints(draw, boxes, count):
    """Points at random places in and around each box; one in four is not labelled."""
    start, size = boxes[..., None, :2], (boxes[..., 2:] - boxes[..., :2])[..., None, :]
    places = start + size * draw.uniform(-0.1, 1.1, (*boxes.shape[:2], count, 2))
    visibility = np.where(draw.random((*boxes.shape[:2], count, 1)) < 0.25, 0, 2)
    return np.concatenate([places, visibility], axis=-1).astype(np.float32)
