"""RF-DETR and LW-DETR by name: what their sizes consist of."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import AbstractDetector, Preprocessing, Square, rf_detr, rf_detr_seg
from ..nn import FrozenBatchNorm, Norm, ProjectedViT, WindowedViT


# DINOv2's small transformer: channels and heads, and the numbers of blocks before each map.
CHANNELS, HEADS, TAPS = 384, 6, (3, 6, 9, 12)
# Side in patches of the images on which LW-DETR's transformers were trained: 224 / 16.
PRETRAINED_SIDE = 14


class _Size(NamedTuple):
    """`size`: side of the images in pixels. `layers`: of the decoder."""

    patch_size: int
    windows: int
    size: int
    layers: int
    queries: int = 300


_BOXES = {
    "nano": _Size(16, 2, 384, 2),
    "small": _Size(16, 2, 512, 3),
    "medium": _Size(16, 2, 576, 4),
    "large": _Size(16, 2, 704, 4),
}
_MASKS = {
    "nano": _Size(12, 1, 312, 4, 100),
    "small": _Size(12, 2, 384, 4, 100),
    "medium": _Size(12, 2, 432, 5, 200),
    "large": _Size(12, 2, 504, 5, 200),
    "xlarge": _Size(12, 2, 624, 6),
    "2xlarge": _Size(12, 2, 768, 6),
}


def _rf_detr(
    detector: Callable[..., AbstractDetector],
    size: _Size,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm | None = None,
    drop_path: float = 0.0,
    **parts: Any,
) -> AbstractDetector:
    body_key, projector_key, heads_key = jr.split(key, 3)
    body = WindowedViT(
        CHANNELS,
        HEADS,
        key=body_key,
        patch_size=size.patch_size,
        side=size.size // size.patch_size,
        windows=size.windows,
        taps=TAPS,
        drop_path=drop_path,
        checkpoint=checkpoint,
    )
    backbone = ProjectedViT(body, key=projector_key)
    options = {"size": size.size, "layers": size.layers, "queries": size.queries} | parts
    return detector(backbone, num_classes, key=heads_key, **options)


class _LWSize(NamedTuple):
    """`taps`, `global_blocks`: of the transformer, see `nn.WindowedViT`. `wide`: whether two maps of 384 channels."""

    channels: int
    taps: tuple[int, ...] = (3, 5, 6, 10)
    global_blocks: tuple[int, ...] = (2, 4, 5, 8)
    queries: int = 300
    wide: bool = False


_LW_SIZES = {
    "tiny": _LWSize(192, (2, 4, 6), (1, 3, 5), 100),
    "small": _LWSize(192),
    "medium": _LWSize(384),
    "large": _LWSize(384, wide=True),
    "xlarge": _LWSize(768, wide=True),
}
# The maps of the two large sizes, of twice and half the sides of the transformer's, and their decoder.
_WIDE_PROJECTION = {"channels": 384, "doublings": (1, -1)}
_WIDE_DECODER = {"self_heads": 12, "cross_heads": 24, "points": 4}
# Heads of the transformer, the initial factor of its branches, and the side of the images in pixels.
LW_HEADS, LW_SCALE, LW_SIDE = 12, 0.1, 640


def _lw_detr(
    size: _LWSize,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    drop_path: float = 0.0,
    **parts: Any,
) -> AbstractDetector:
    """RF-DETR with its predecessor's transformer and projector, of which `norm` is, and its resize."""
    body_key, projector_key, heads_key = jr.split(key, 3)
    body = WindowedViT(
        size.channels,
        LW_HEADS,
        key=body_key,
        patch_size=16,
        side=PRETRAINED_SIDE,
        windows=4,
        taps=size.taps,
        global_blocks=size.global_blocks,
        class_token=False,
        norm=False,
        antialias=False,
        drop_path=drop_path,
        layer_scale=LW_SCALE,
        checkpoint=checkpoint,
    )
    projection, decoder = (_WIDE_PROJECTION, _WIDE_DECODER) if size.wide else ({}, {})
    backbone = ProjectedViT(body, key=projector_key, norm=norm, **projection)
    model = rf_detr(backbone, num_classes, key=heads_key, **({"queries": size.queries} | decoder | parts))
    return replace(model, preprocessing=Preprocessing(Square(LW_SIDE), pillow=True))


RF_DETRS: dict[str, Callable[..., AbstractDetector]] = {
    **{f"rf_detr_{name}": partial(_rf_detr, rf_detr, size) for name, size in _BOXES.items()},
    **{f"rf_detr_seg_{name}": partial(_rf_detr, rf_detr_seg, size) for name, size in _MASKS.items()},
    **{f"lw_detr_{name}": partial(_lw_detr, size) for name, size in _LW_SIZES.items()},
}
