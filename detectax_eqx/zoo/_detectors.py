"""Builds detectors by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import (
    ANCHOR_SIZES,
    DETECTRON2_PREPROCESSING,
    SSD,
    AbstractDetector,
    CascadeHead,
    ConvBoxHead,
    FasterRCNN,
    ShortestEdge,
    faster_rcnn,
    faster_rcnn_detectron2,
    fcos,
    giou_of_boxes,
    keypoint_rcnn,
    keypoint_rcnn_detectron2,
    mask_rcnn,
    mask_rcnn_detectron2,
    retinanet,
    retinanet_detectron2,
    ssd,
    ssdlite,
)
from ..nn import (
    SSDVGG,
    BackboneWithFPN,
    ConvolvedTop,
    FrozenBatchNorm,
    GroupNorm,
    MobileNet,
    MobileNetFPN,
    Norm,
    ResNet,
    SSDMobileNet,
    mobilenet_v2,
    mobilenet_v3_large,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    vgg16,
    wide_resnet50_2,
    wide_resnet101_2,
)
from ._detr import DETRS
from ._rf_detr import RF_DETRS
from ._transformers import TRANSFORMERS


def names() -> tuple[str, ...]:
    """The names that `build` accepts.

    >>> names()[:2]
    ('faster_rcnn_resnet18_fpn', 'faster_rcnn_resnet34_fpn')
    """
    return tuple(_DETECTORS)


def detectron2_detectors() -> frozenset[str]:
    """The names of the detectors that follow Detectron2, whose files have its names. Transformers are among them."""
    return frozenset(_OF_DETECTRON2)


def build(
    name: str,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm | None = None,
    checkpoint: bool = False,
    **parts: Any,
) -> AbstractDetector:
    """Builds the named detector with random parameters and torchvision's defaults.

    - `num_classes`: foreground classes only. torchvision also counts the background: its 91 classes are 90 here.
    - `norm`: the normalisation of the backbone: `FrozenBatchNorm` for imported weights, `GroupNorm` for training from
      scratch. The default is `FrozenBatchNorm` with the `eps` of torchvision's detector. torchvision's first COCO
      checkpoints need `functools.partial(FrozenBatchNorm, eps=0.0)`. SSD300 has no norms, and transformers have
      `LayerNorm`: they do not use it.
    - `checkpoint`: gradient checkpointing in the backbone, see `nn.ResNet`.
    - `parts`: further arguments of the detector's own function in `models`, such as `anchor_sizes` of `faster_rcnn`.
      Those on transformers also take `drop_path`, that of the last block.

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
        options = parts if norm is None else parts | {"norm": norm}
        return _DETECTORS[name](num_classes, key=key, checkpoint=checkpoint, **options)
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
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    pyramid_norm: Norm | None = None,
    **parts: Any,
) -> AbstractDetector:
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = BackboneWithFPN(resnet(key=body_key, norm=norm, checkpoint=checkpoint), key=fpn_key, norm=pyramid_norm)
    return detector(backbone, num_classes, key=heads_key, **parts)


def _two_stage_v2(*arguments: Any, norm: Norm = FrozenBatchNorm, **options: Any) -> AbstractDetector:
    """torchvision's second version: norms in the pyramid and the heads too, and one more convolution in the RPN."""
    second = {"pyramid_norm": norm, "rpn_depth": 2, "box_head": partial(ConvBoxHead, norm=norm)}
    return _two_stage(*arguments, norm=norm, **(second | options))


def _lsj(*arguments: Any, norm: Norm = FrozenBatchNorm, **options: Any) -> AbstractDetector:
    """Detectron2's baselines with large-scale jitter (arXiv:2012.07177), which have the parts of the second version."""
    return _two_stage_v2(mask_rcnn_detectron2, *arguments, norm=norm, **({"mask_norm": norm} | options))


def _mask_rcnn_v2(*arguments: Any, norm: Norm = FrozenBatchNorm, **options: Any) -> AbstractDetector:
    return _two_stage_v2(mask_rcnn, *arguments, norm=norm, **({"mask_norm": norm} | options))


def _dense(
    detector: Callable[..., AbstractDetector],
    resnet: Callable[..., ResNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    from_features: bool = False,
    **parts: Any,
) -> AbstractDetector:
    """A dense detector on P3..P7. P6 is computed from P5, or from C5 with `from_features`."""
    body_key, fpn_key, top_key, heads_key = jr.split(key, 4)
    body = resnet(key=body_key, norm=norm, checkpoint=checkpoint)
    top = ConvolvedTop(body.channels[-1], 256, key=top_key, from_features=from_features)
    return detector(BackboneWithFPN(body, key=fpn_key, finest=3, top=top), num_classes, key=heads_key, **parts)


def _mobilenet(
    mobilenet: Callable[..., MobileNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    **parts: Any,
) -> FasterRCNN:
    """A Faster R-CNN on the last two maps of a MobileNet, with anchors of all sizes on each level."""
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = MobileNetFPN(mobilenet(key=body_key, norm=norm, checkpoint=checkpoint), key=fpn_key)
    every_size = tuple(size for sizes in ANCHOR_SIZES for size in sizes)
    parts = {"anchor_sizes": (every_size,) * len(backbone.strides)} | parts
    return faster_rcnn(backbone, num_classes, key=heads_key, **parts)


def _mobilenet_320(num_classes: int, **options: Any) -> FasterRCNN:
    """torchvision's low-resolution detector, with fewer proposals."""
    model = _mobilenet(mobilenet_v3_large, num_classes, **options)
    return replace(
        model,
        preprocessing=replace(model.preprocessing, resize=ShortestEdge(320, 640)),
        selection=replace(model.selection, pre_nms_top_n=150, post_nms_top_n=150, rpn_score_threshold=0.05),
        sampling=replace(model.sampling, rpn_score_threshold=0.05),
    )


def _ssd300(num_classes: int, *, key: PRNGKeyArray, checkpoint: bool, norm: Norm | None = None, **parts: Any) -> SSD:
    """SSD on VGG-16, which has no norms."""
    body_key, extras_key, heads_key = jr.split(key, 3)
    body = vgg16(key=body_key, rounded_up=(2,), checkpoint=checkpoint)
    return ssd(SSDVGG(body, key=extras_key), num_classes, key=heads_key, **parts)


_SSDLITE_NORM: Norm = partial(FrozenBatchNorm, eps=1e-3)


def _ssdlite320(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = _SSDLITE_NORM,
    **parts: Any,
) -> SSD:
    body_key, extras_key, heads_key = jr.split(key, 3)
    body = mobilenet_v3_large(key=body_key, norm=norm, reduced_tail=True, checkpoint=checkpoint)
    backbone = SSDMobileNet(body, key=extras_key, norm=norm)
    return ssdlite(backbone, num_classes, key=heads_key, norm=norm, **parts)


# Detectron2's ResNeXt was trained on pixels with the standard deviation of ImageNet's, RGB.
_RESNEXT_PREPROCESSING = replace(DETECTRON2_PREPROCESSING, std=(58.395, 57.12, 57.375))
# Bodies of two-stage detectors, by the name that is part of the detector's.
_RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnext50_32x4d": resnext50_32x4d,
    "resnext101_32x8d": resnext101_32x8d,
    "resnext101_64x4d": resnext101_64x4d,
    "wide_resnet50_2": wide_resnet50_2,
    "wide_resnet101_2": wide_resnet101_2,
}
# Those of MSRA, from which Detectron2's detectors were trained, have their strides in the 1×1 convolutions.
_DETECTRON2_RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet50": partial(resnet50, stride_in_1x1=True),
    "resnet101": partial(resnet101, stride_in_1x1=True),
}
_DETECTRON2: dict[str, Callable[..., AbstractDetector]] = {
    "faster_rcnn": faster_rcnn_detectron2,
    "mask_rcnn": mask_rcnn_detectron2,
    "keypoint_rcnn": keypoint_rcnn_detectron2,
}
_OF_DETECTRON2: dict[str, Callable[..., AbstractDetector]] = {
    **{
        f"{name}_{body}_fpn_detectron2": partial(_two_stage, detector, build)
        for name, detector in _DETECTRON2.items()
        for body, build in _DETECTRON2_RESNETS.items()
    },
    **{
        f"{name}_resnext101_32x8d_fpn_detectron2": partial(
            _two_stage, detector, resnext101_32x8d, preprocessing=_RESNEXT_PREPROCESSING
        )
        for name, detector in _DETECTRON2.items()
    },
    "cascade_mask_rcnn_resnet50_fpn_detectron2": partial(
        _two_stage,
        mask_rcnn_detectron2,
        _DETECTRON2_RESNETS["resnet50"],
        box_head=CascadeHead,
        post_nms_top_n=2000,
    ),
    **{f"mask_rcnn_{body}_fpn_lsj_detectron2": partial(_lsj, build) for body, build in _DETECTRON2_RESNETS.items()},
    **{
        f"retinanet_{body}_fpn_detectron2": partial(_dense, retinanet_detectron2, build, from_features=True)
        for body, build in _DETECTRON2_RESNETS.items()
    },
    **TRANSFORMERS,
}
_DETECTORS: dict[str, Callable[..., AbstractDetector]] = {
    **{f"faster_rcnn_{body}_fpn": partial(_two_stage, faster_rcnn, build) for body, build in _RESNETS.items()},
    "faster_rcnn_resnet50_fpn_v2": partial(_two_stage_v2, faster_rcnn, resnet50),
    "faster_rcnn_mobilenet_v2_fpn": partial(_mobilenet, mobilenet_v2),
    "faster_rcnn_mobilenet_v3_large_fpn": partial(_mobilenet, mobilenet_v3_large),
    "faster_rcnn_mobilenet_v3_large_320_fpn": _mobilenet_320,
    **{f"mask_rcnn_{body}_fpn": partial(_two_stage, mask_rcnn, build) for body, build in _RESNETS.items()},
    "mask_rcnn_resnet50_fpn_v2": partial(_mask_rcnn_v2, resnet50),
    "keypoint_rcnn_resnet50_fpn": partial(_two_stage, keypoint_rcnn, resnet50),
    "retinanet_resnet50_fpn": partial(_dense, retinanet, resnet50),
    "retinanet_resnet50_fpn_v2": partial(
        _dense, retinanet, resnet50, from_features=True, head_norm=GroupNorm, box_loss=giou_of_boxes
    ),
    "fcos_resnet50_fpn": partial(_dense, fcos, resnet50),
    "ssd300_vgg16": _ssd300,
    "ssdlite320_mobilenet_v3_large": _ssdlite320,
    **_OF_DETECTRON2,
    **RF_DETRS,
    **DETRS,
}
