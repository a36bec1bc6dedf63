"""Tiny detectors of RF-DETR, for comparison with its own results. Uses neither torch nor rfdetr."""

import zlib

import equinox as eqx
import jax.random as jr
import numpy as np

from detectax_eqx import models, nn
from detectax_eqx.weights import rf_detr_shapes
from detectax_eqx.weights._rf_detr import _theirs as in_their_arrangement

from . import detectron2_tiny


CLASSES, CHANNELS, HIDDEN, HEADS, DEPTH = 5, 32, 2048, 2, 4
PATCH, SIDE, TAPS = 8, 8, (1, 3, 4)
SIZE = PATCH * SIDE
WIDTH, LAYERS, QUERIES, GROUPS = 32, 2, 20, 3
KINDS = ("boxes", "masks")
# Canvases on which the features are compared: its own, one not square, one with more cells than proposals are used.
CANVASES = ((SIZE, SIZE), (96, 64), (416, 32))


def build(kind, groups=GROUPS):
    """A detector on a transformer of four blocks, as shapes only."""

    def make():
        keys = jr.split(jr.key(0), 3)
        body = nn.WindowedViT(CHANNELS, HEADS, key=keys[0], patch_size=PATCH, side=SIDE, windows=2, taps=TAPS)
        backbone = nn.ProjectedViT(body, key=keys[1], channels=WIDTH)
        detector = models.rf_detr if kind == "boxes" else models.rf_detr_seg
        options = {"size": SIZE, "layers": LAYERS, "queries": QUERIES, "groups": groups}
        heads = {"self_heads": 4, "cross_heads": 4, "points": 2, "hidden_size": HIDDEN}
        return detector(backbone, CLASSES, key=keys[2], **options, **heads)

    return eqx.filter_eval_shape(make)


def random_arrays(kind):
    """Random parameters, decisive ones, by RF-DETR's names. Each depends on its name and shape alone."""
    return in_their_arrangement(
        {name: random_array(name, shape) for name, shape in rf_detr_shapes(build(kind)).items()}
    )


def random_array(name, shape):
    """A random parameter that leaves predictions different from each other."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    array = draw.normal(0, 1, shape)
    if name == "query_feat.weight" or name.endswith("sampling_offsets.bias"):
        pass
    elif "lambda1" in name:
        array = 0.5 + 0.2 * array
    elif "norm" in name or ".bn." in name or ".stages.0.1." in name:
        array = 0.2 * array + (1 if name.endswith("weight") else 0)
    elif name == "refpoint_embed.weight" or name.endswith(("cls_token", "class_position", "position_embeddings")):
        array = 0.2 * array
    elif name.endswith("class_embed.bias"):
        array = 0.1 * array - 2
    elif name.endswith("bias"):
        array = 0.1 * array
    else:
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        factor = 2.0 if "class_embed" in name else 0.3 if name.endswith("layers.2.weight") and "bbox" in name else 1.0
        array = factor * array / fan_in**0.5
    return array.astype(np.float32)


def images():
    """Two 8-bit RGB images, wide and tall."""
    return detectron2_tiny.images(((6, 9, 90, 131), (11, 7, 150, 107)))


def targets():
    """Pixels, boxes, labels, masks of image size, and which are valid, for images with 0, 1, 8 and 24 objects.

    There are fewer queries than that.
    """
    draw = np.random.default_rng(8)
    counts, capacity = (0, 1, 8, 24), 24
    pixels = draw.integers(0, 256, (len(counts), SIZE, SIZE, 3)).astype(np.uint8)
    corners = draw.uniform(0, SIZE - 30, (len(counts), capacity, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(6, 30, corners.shape)], axis=2).astype(np.float32)
    labels = draw.integers(0, CLASSES, boxes.shape[:2]).astype(np.int32)
    masks = (draw.random((*boxes.shape[:2], SIZE // 8, SIZE // 8)) < 0.5).repeat(8, axis=2).repeat(8, axis=3)
    valid = np.arange(capacity) < np.array(counts)[:, None]
    return pixels, boxes, labels, masks, valid


def small_targets():
    """Those of `targets` at half the size, where there are fewer cells than queries."""
    pixels, boxes, labels, masks, valid = targets()
    return pixels[:, ::2, ::2], boxes / 2, labels, masks[:, :, ::2, ::2], valid


def points(count):
    """The points that stand for those drawn at random, the same for all masks."""
    return np.random.default_rng(count).random((count, 2)).astype(np.float32)
