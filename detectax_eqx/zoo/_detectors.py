"""Builds detectors by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import AbstractDetector, faster_rcnn, fcos, giou_of_boxes, keypoint_rcnn, mask_rcnn, retinanet
from ..nn import (
    ConvolvedTop,
    FrozenBatchNorm,
    GroupNorm,
    Norm,
    ResNet,
    ResNetFPN,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)


def names() -> tuple[str, ...]:
    """The names that `build` accepts.

    >>> names()[:2]
    ('faster_rcnn_resnet18_fpn', 'faster_rcnn_resnet34_fpn')
    """
    return tuple(_DETECTORS)


def build(
    name: str,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    **parts: Any,
) -> AbstractDetector:
    """Builds the named detector with random parameters and torchvision's defaults.

    - `num_classes`: foreground classes only. torchvision also counts the background: its 91 classes are 90 here.
    - `norm`: the normalisation of the backbone: `FrozenBatchNorm` for imported weights, `GroupNorm` for training from
      scratch. torchvision's COCO checkpoints need `functools.partial(FrozenBatchNorm, eps=0.0)`.
    - `checkpoint`: gradient checkpointing in the backbone, see `nn.ResNet`.
    - `parts`: further arguments of the detector's own function in `models`, such as `anchor_sizes` of `faster_rcnn`.

    Raises a `ValueError` that lists all names if the name is unknown, and a `ValueError` for a part that the detector
    does not accept.

    >>> import equinox as eqx
    >>> # Only the shapes: no parameters are allocated.
    >>> model = eqx.filter_eval_shape(lambda: build("faster_rcnn_resnet50_fpn", 90, key=jr.key(0)))
    >>> model.num_classes, model.backbone.strides
    (90, (4, 8, 16, 32, 64))
    """
    if name not in _DETECTORS:
        raise ValueError(f"There is no detector {name!r}; choose one of {', '.join(names())}.")
    try:
        return _DETECTORS[name](num_classes, key=key, norm=norm, checkpoint=checkpoint, **parts)
    except TypeError as error:
        unknown = [part for part in parts if f"unexpected keyword argument '{part}'" in str(error)]
        if not unknown:
            raise
        raise ValueError(f"{name} does not take {unknown[0]}. Omit it.") from None


def _two_stage(
    detector: Callable[..., AbstractDetector],
    resnet: Callable[..., ResNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm,
    checkpoint: bool,
    **parts: Any,
) -> AbstractDetector:
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = ResNetFPN(resnet(key=body_key, norm=norm, checkpoint=checkpoint), key=fpn_key)
    return detector(backbone, num_classes, key=heads_key, **parts)


def _dense(
    detector: Callable[..., AbstractDetector],
    resnet: Callable[..., ResNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm,
    checkpoint: bool,
    from_features: bool = False,
    **parts: Any,
) -> AbstractDetector:
    """A dense detector on P3..P7. P6 is computed from P5, or from C5 with `from_features`."""
    body_key, fpn_key, top_key, heads_key = jr.split(key, 4)
    body = resnet(key=body_key, norm=norm, checkpoint=checkpoint)
    top = ConvolvedTop(body.channels[-1], 256, key=top_key, from_features=from_features)
    return detector(ResNetFPN(body, key=fpn_key, finest=3, top=top), num_classes, key=heads_key, **parts)


_DETECTORS: dict[str, Callable[..., AbstractDetector]] = {
    "faster_rcnn_resnet18_fpn": partial(_two_stage, faster_rcnn, resnet18),
    "faster_rcnn_resnet34_fpn": partial(_two_stage, faster_rcnn, resnet34),
    "faster_rcnn_resnet50_fpn": partial(_two_stage, faster_rcnn, resnet50),
    "faster_rcnn_resnet101_fpn": partial(_two_stage, faster_rcnn, resnet101),
    "mask_rcnn_resnet18_fpn": partial(_two_stage, mask_rcnn, resnet18),
    "mask_rcnn_resnet34_fpn": partial(_two_stage, mask_rcnn, resnet34),
    "mask_rcnn_resnet50_fpn": partial(_two_stage, mask_rcnn, resnet50),
    "mask_rcnn_resnet101_fpn": partial(_two_stage, mask_rcnn, resnet101),
    "keypoint_rcnn_resnet50_fpn": partial(_two_stage, keypoint_rcnn, resnet50),
    "retinanet_resnet50_fpn": partial(_dense, retinanet, resnet50),
    "retinanet_resnet50_fpn_v2": partial(
        _dense, retinanet, resnet50, from_features=True, head_norm=GroupNorm, box_loss=giou_of_boxes
    ),
    "fcos_resnet50_fpn": partial(_dense, fcos, resnet50),
}
