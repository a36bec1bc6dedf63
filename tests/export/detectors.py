"""Tiny detectors to export, and their options."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from detectax_eqx import Detections, export, models, nn
from detectax_eqx.export import _extras
from detectax_eqx.weights import load_detr, load_rf_detr

from .. import detr_tiny, lw_detr_tiny, rf_detr_tiny


PREPROCESSING = models.Preprocessing(models.ShortestEdge(64, 96))
SELECTION = models.TwoStageSelection(max_detections=20)
SHAPE = export.Shape(2, (48, 64), (64, 96))
NAMES = ["cat", "dog", "owl"]


def with_statistics(model, key):
    """Replaces the statistics of frozen norms by random ones, so that the norms are not the identity."""

    def norms(model):
        return [n for n in jax.tree.leaves(model, is_leaf=is_norm) if is_norm(n)]

    def is_norm(node):
        return isinstance(node, nn.FrozenBatchNorm)

    def measured(norm, key):
        keys = jr.split(key, 4)
        values = [jr.uniform(k, norm.weight.shape, minval=0.5, maxval=1.5) for k in keys]
        return eqx.tree_at(lambda n: (n.weight, n.bias, n.running_mean, n.running_var), norm, values)

    frozen = norms(model)
    return eqx.tree_at(norms, model, [measured(n, k) for n, k in zip(frozen, jr.split(key, len(frozen)), strict=True)])


def dense(name):
    """A tiny one-stage detector that detects something in noise."""
    keys = jr.split(jr.key(0), 5)
    top = nn.ConvolvedTop(64, 16, key=keys[0])
    backbone = nn.BackboneWithFPN(nn.resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
    if name == "fcos":
        model = models.fcos(backbone, 3, key=keys[3])
    else:
        norm = nn.GroupNorm if name == "retinanet_v2" else None
        sizes = tuple((float(side), 1.5 * side) for side in (8, 16, 32, 64, 96))
        model = models.retinanet(backbone, 3, key=keys[3], anchor_sizes=sizes, head_norm=norm)
    model = replace(model, preprocessing=PREPROCESSING)
    logits = model.class_logits
    assert logits.bias is not None
    # Scores range from nearly 0 to nearly 1. With the usual initialisation they would all be about 0.01.
    wide = 40 * logits.weight, jnp.linspace(-1.0, 0.5, logits.bias.size)
    model = eqx.tree_at(lambda m: (m.class_logits.weight, m.class_logits.bias), model, wide)
    return with_statistics(model, keys[4])


# Shape of a program for `rf_detr`, whose images are square.
SQUARE = export.Shape(2, (48, 64), (64, 64))


def rf_detr(kind):
    """A tiny RF-DETR with parameters by which predictions differ. `kind`: "boxes" or "masks"."""
    return load_rf_detr(rf_detr_tiny.build(kind), rf_detr_tiny.random_arrays(kind))


def detr(kind):
    """A tiny DETR, Deformable DETR or LW-DETR, which resizes as Pillow. `kind`: in the `KINDS` of each."""
    if kind in detr_tiny.KINDS:
        return load_detr(detr_tiny.build(kind), detr_tiny.random_arrays({}, kind))
    return load_rf_detr(lw_detr_tiny.build(kind), lw_detr_tiny.random_arrays(kind))


def transformer(kind):
    """A tiny Mask R-CNN on a vision transformer, with norms in its heads. `kind`: "vit" or "swin"."""
    keys = jr.split(jr.key(0), 4)
    if kind == "vit":
        body = nn.ViT(16, 2, 2, key=keys[0], side=4, window=3, global_blocks=(1,), relative_side=4)
        backbone = nn.ViTFPN(body, key=keys[1], channels=16)
    else:
        body = nn.Swin(8, (1, 2, 1, 1), (1, 2, 2, 2), key=keys[0], window=3, drop_path=0.0)
        backbone = nn.BackboneWithFPN(body, key=keys[1], channels=16, norm=nn.LayerNorm2d)
    sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (96.0,))
    parts = {"hidden_size": 32, "hidden_channels": 8, "mask_norm": nn.LayerNorm2d}
    model = models.mask_rcnn(backbone, 3, key=keys[2], anchor_sizes=sizes, **parts)
    noise = iter(jr.split(keys[3], 200))

    def uneven(leaf):  # so that norms, biases and tables of positions count
        return leaf + 0.2 * jr.normal(next(noise), leaf.shape) if eqx.is_inexact_array(leaf) else leaf

    return replace(
        eqx.tree_at(lambda m: m.backbone, model, jax.tree.map(uneven, backbone)), preprocessing=PREPROCESSING
    )


def needs(extra):
    """Skips the test if a package of the extra is not installed."""
    if any(find_spec(module) is None for module in _extras.EXTRAS[extra]):
        pytest.skip(f"needs the extra {extra}")


class Cells(eqx.Module):
    """A minimal backbone: the means of 8×8 pixels."""

    weight: jax.Array
    channels, strides, stages, divisor = 1, (8,), (), 8

    def __call__(self, image, *, key=None):
        _, height, width = image.shape
        return ((image * self.weight).reshape(1, height // 8, 8, width // 8, 8).mean((2, 4)),)


@dataclass(frozen=True)
class Few:
    """A minimal selection."""

    score_threshold: float = 0.05
    max_detections: int = 5


class Brightest(models.AbstractDetector):
    """A custom detector: a box around each of the brightest cells of a one-channel image."""

    backbone: nn.Backbone
    preprocessing: models.Preprocessing = eqx.field(
        static=True, default=models.Preprocessing(models.ShortestEdge(64, 96), (0.0,), (255.0,))
    )
    selection: Few = eqx.field(static=True, default=Few())
    num_classes: int = eqx.field(static=True, default=3)  # pyright: ignore[reportIncompatibleMethodOverride]
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def loss(self, image, canvas_size, targets, *, key):
        return {}

    def __call__(self, image, canvas_size, *, selection=None):
        image_size, selection = canvas_size, selection or self.selection
        (cells,) = self.backbone(self.preprocessing.normalize(image, canvas_size))
        cells = cells[0]
        scores, at = jax.lax.top_k(cells.reshape(-1), selection.max_detections)
        corner = 8.0 * jnp.stack([at % cells.shape[1], at // cells.shape[1]], axis=1).astype(jnp.float32)
        inside = corner < image_size[None, ::-1].astype(jnp.float32)
        valid = (scores > selection.score_threshold) & inside.all(axis=1)
        return Detections(jnp.concatenate([corner, corner + 8], axis=1), scores, (at % 3).astype(jnp.int32), valid)
