"""Tiny detectors of DETR and Deformable DETR, to compare with Hugging Face's. Uses neither torch nor transformers."""

import re
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np

from detectax_eqx import models, nn
from detectax_eqx.weights import detr_shapes

from . import rf_detr_tiny


CLASSES, WIDTH, CHANNELS, LAYERS, QUERIES, HEADS, HIDDEN = 5, 4, 32, 2, 20, 4, 64
SHORT, LONG = 128, 192
# A canvas for several images, whose cells are partly padding.
CANVAS = (192, 192)
# `(height, width)` of images on the canvas, for losses.
SIZES = ((192, 192), (128, 192), (180, 100), (65, 192))


KINDS = ("detr", "deformable_detr", "deformable_detr_refine", "deformable_detr_two_stage")


def build(kind="detr"):
    """A detector on a ResNet of one block per stage, as shapes only."""

    def make():
        keys = jr.split(jr.key(0), 3)
        body = nn.ResNet(nn.Bottleneck, (1, 1, 1, 1), key=keys[0], width=WIDTH)
        options: dict[str, Any] = {"layers": LAYERS, "queries": QUERIES, "heads": HEADS, "hidden_size": HIDDEN}
        if kind == "detr":
            backbone = nn.ProjectedResNet(body, key=keys[1], channels=CHANNELS)
            model = models.detr(backbone, CLASSES, key=keys[2], **options)
        else:
            backbone = nn.ProjectedLevels(body, key=keys[1], channels=CHANNELS)
            options |= {"refine": kind != "deformable_detr", "two_stage": kind.endswith("two_stage")}
            model = models.deformable_detr(backbone, CLASSES, key=keys[2], **options)
        resize = models.ShortestEdge(SHORT, LONG, rounded_short=True)
        return replace(model, preprocessing=replace(model.preprocessing, resize=resize))

    return eqx.filter_eval_shape(make)


def random_arrays(adjusted, kind="detr"):
    """Random parameters by the authors' names. Each depends on its name and shape alone, except `adjusted`."""
    shapes = detr_shapes(build(kind))
    return {name: random_array(name, flat(name, shape)) for name, shape in shapes.items()} | adjusted


def flat(name, shape):
    """The shape in the arrangement of DETR's authors: queries, keys and values along one axis."""
    return (3 * shape[1], *shape[2:]) if ".in_proj_" in name else shape


def random_array(name, shape):
    """A random parameter that leaves predictions different from each other."""
    array = rf_detr_tiny.random_array(name, shape)
    if name.endswith("running_var"):
        return np.exp(array)
    if re.search(r"(\.(bn\d|downsample\.1)|input_proj\.\d\.1)\.weight$", name):
        return (1 + 0.2 * np.sign(array)).astype(np.float32)
    if name.endswith("in_proj_weight"):  # attention that is not even
        return array * np.repeat(np.array([4, 4, 2], np.float32), len(array) // 3)[:, None]
    return 3 * array if name == "query_embed.weight" else array


def images():
    """Two 8-bit RGB images, wide and tall."""
    return rf_detr_tiny.images()


def targets():
    """Pixels, boxes, labels, and which are valid, for images of `SIZES` with 0, 1, 8 and 24 objects.

    There are fewer queries than that. Pixels of the padding are noise too.
    """
    draw = np.random.default_rng(8)
    counts, capacity = (0, 1, 8, 24), 24
    pixels = draw.integers(0, 256, (len(counts), *CANVAS, 3)).astype(np.uint8)
    limits = np.array([[width, height] for height, width in SIZES])[:, None] - 20
    corners = draw.uniform(0, 1, (len(counts), capacity, 2)) * limits
    boxes = np.concatenate([corners, corners + draw.uniform(6, 20, corners.shape)], axis=2).astype(np.float32)
    labels = draw.integers(0, CLASSES, boxes.shape[:2]).astype(np.int32)
    return pixels, boxes, labels, np.arange(capacity) < np.array(counts)[:, None]
