"""Detectors on vision transformers, by name: ViTDet, and detectors on Swin Transformer, with Detectron2's parts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import (
    VITDET_PREPROCESSING,
    AbstractDetector,
    CascadeHead,
    ConvBoxHead,
    faster_rcnn_detectron2,
    mask_rcnn_detectron2,
    retinanet_detectron2,
)
from ..nn import (
    BackboneWithFPN,
    ConvolvedTop,
    LayerNorm2d,
    Norm,
    Swin,
    ViT,
    ViTFPN,
    swin_b,
    swin_l,
    swin_s,
    swin_t,
    vit_b,
    vit_h,
    vit_l,
)


# Sides in tokens of ViTDet's windows, and of the images on which it was trained.
WINDOW, SIDE = 14, 64


def _vitdet(
    detector: Callable[..., AbstractDetector],
    vit: Callable[..., ViT],
    global_blocks: tuple[int, ...],
    num_classes: int,
    *,
    drop_path: float,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm | None = None,
    **parts: Any,
) -> AbstractDetector:
    body_key, fpn_key, heads_key = jr.split(key, 3)
    options = {"window": WINDOW, "global_blocks": global_blocks, "relative_side": SIDE, "drop_path": drop_path}
    body = vit(key=body_key, checkpoint=checkpoint, **options)
    return detector(ViTFPN(body, key=fpn_key), num_classes, key=heads_key, **parts)


def _swin(
    detector: Callable[..., AbstractDetector],
    swin: Callable[..., Swin],
    num_classes: int,
    *,
    drop_path: float,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm | None = None,
    **parts: Any,
) -> AbstractDetector:
    body_key, fpn_key, heads_key = jr.split(key, 3)
    body = swin(key=body_key, checkpoint=checkpoint, drop_path=drop_path)
    return detector(BackboneWithFPN(body, key=fpn_key, norm=LayerNorm2d), num_classes, key=heads_key, **parts)


def _retinanet(
    swin: Callable[..., Swin],
    num_classes: int,
    *,
    drop_path: float,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm | None = None,
    **parts: Any,
) -> AbstractDetector:
    """On P3..P7, where P6 is computed from C5."""
    body_key, fpn_key, top_key, heads_key = jr.split(key, 4)
    body = swin(key=body_key, checkpoint=checkpoint, drop_path=drop_path)
    top = ConvolvedTop(body.channels[-1], 256, key=top_key, from_features=True)
    backbone = BackboneWithFPN(body, key=fpn_key, finest=3, top=top)
    model = retinanet_detectron2(backbone, num_classes, key=heads_key, **parts)
    return replace(model, preprocessing=VITDET_PREPROCESSING)


# The heads of Detectron2's project ViTDet, with a norm after each convolution.
_BOX_HEAD = partial(ConvBoxHead, norm=LayerNorm2d)
_PARTS = {"rpn_depth": 2, "preprocessing": VITDET_PREPROCESSING}
_TWO_STAGE: dict[str, Callable[..., AbstractDetector]] = {
    "faster_rcnn": partial(faster_rcnn_detectron2, box_head=_BOX_HEAD, **_PARTS),
    "mask_rcnn": partial(mask_rcnn_detectron2, box_head=_BOX_HEAD, mask_norm=LayerNorm2d, **_PARTS),
    "cascade_mask_rcnn": partial(
        mask_rcnn_detectron2, box_head=partial(CascadeHead, head=_BOX_HEAD), mask_norm=LayerNorm2d, **_PARTS
    ),
}
# The transformers of ViTDet, their blocks with global attention, and the drop path of their last block
# (arXiv:2203.16527, sections 3 and A.2).
_VITS: dict[str, tuple[Callable[..., ViT], tuple[int, ...], float]] = {
    "b": (vit_b, (2, 5, 8, 11), 0.1),
    "l": (vit_l, (5, 11, 17, 23), 0.4),
    "h": (vit_h, (7, 15, 23, 31), 0.5),
}
# The Swin Transformers, and the drop path of their last block: that of Detectron2.
_SWINS: dict[str, tuple[Callable[..., Swin], float]] = {
    "t": (swin_t, 0.2),
    "s": (swin_s, 0.2),
    "b": (swin_b, 0.4),
    "l": (swin_l, 0.4),
}
TRANSFORMERS: dict[str, Callable[..., AbstractDetector]] = {
    **{
        f"{name}_vitdet_{size}": partial(_vitdet, _TWO_STAGE[name], vit, global_blocks, drop_path=drop_path)
        for name in ("mask_rcnn", "cascade_mask_rcnn")
        for size, (vit, global_blocks, drop_path) in _VITS.items()
    },
    **{
        f"{name}_swin_{size}_fpn": partial(_swin, detector, swin, drop_path=drop_path)
        for name, detector in _TWO_STAGE.items()
        for size, (swin, drop_path) in _SWINS.items()
    },
    **{
        f"retinanet_swin_{size}_fpn": partial(_retinanet, swin, drop_path=drop_path)
        for size, (swin, drop_path) in _SWINS.items()
    },
}
