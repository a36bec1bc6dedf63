"""The usual detectors, with torchvision's defaults. For anything else compose the modules yourself."""

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..nn import FrozenBatchNorm, Norm, ResNetFPN, resnet18, resnet34, resnet50, resnet101
from ._faster_rcnn import FasterRCNN
from ._mask_rcnn import MaskRCNN
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS


AnchorSizes = tuple[tuple[float, ...], ...]


def faster_rcnn_resnet18_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> FasterRCNN:
    """Faster R-CNN on ResNet-18-FPN; see `faster_rcnn_resnet50_fpn`.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: faster_rcnn_resnet18_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _faster_rcnn(resnet18, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def faster_rcnn_resnet34_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> FasterRCNN:
    """Faster R-CNN on ResNet-34-FPN; see `faster_rcnn_resnet50_fpn`.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: faster_rcnn_resnet34_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _faster_rcnn(resnet34, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def faster_rcnn_resnet50_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> FasterRCNN:
    """Faster R-CNN on ResNet-50-FPN: torchvision's `fasterrcnn_resnet50_fpn`, 41.8 million parameters at 90 classes.

    - `num_classes`: foreground classes; torchvision counts the background too (its 91 are 90 here).
    - `norm`: `FrozenBatchNorm` for imported weights, `GroupNorm` for training from scratch. torchvision's COCO
      checkpoints want `functools.partial(FrozenBatchNorm, eps=0.0)`.
    - `checkpoint`: gradient checkpointing in the backbone, see `ResNet`.
    - `anchor_sizes`: sides of the square anchors in canvas pixels, a tuple for each of the five levels, equally many on
      each. `aspect_ratios`: height / width.

    >>> import equinox as eqx
    >>> from functools import partial
    >>> from detectax_eqx.nn import FrozenBatchNorm
    >>> norm = partial(FrozenBatchNorm, eps=0.0)
    >>> # Its shapes alone: the parameters themselves are not made.
    >>> model = eqx.filter_eval_shape(lambda: faster_rcnn_resnet50_fpn(90, key=jr.key(0), norm=norm))
    >>> model.num_classes, model.backbone.strides
    (90, (4, 8, 16, 32, 64))
    """
    return _faster_rcnn(resnet50, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def faster_rcnn_resnet101_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> FasterRCNN:
    """Faster R-CNN on ResNet-101-FPN; see `faster_rcnn_resnet50_fpn`.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: faster_rcnn_resnet101_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _faster_rcnn(resnet101, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def mask_rcnn_resnet18_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> MaskRCNN:
    """Mask R-CNN on ResNet-18-FPN; see `faster_rcnn_resnet50_fpn` for the arguments.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: mask_rcnn_resnet18_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _mask_rcnn(resnet18, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def mask_rcnn_resnet34_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> MaskRCNN:
    """Mask R-CNN on ResNet-34-FPN; see `faster_rcnn_resnet50_fpn` for the arguments.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: mask_rcnn_resnet34_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _mask_rcnn(resnet34, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def mask_rcnn_resnet50_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> MaskRCNN:
    """Mask R-CNN on ResNet-50-FPN: torchvision's `maskrcnn_resnet50_fpn`, 44.4 million parameters at 90 classes.

    See `faster_rcnn_resnet50_fpn` for the arguments.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: mask_rcnn_resnet50_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _mask_rcnn(resnet50, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def mask_rcnn_resnet101_fpn(
    num_classes: int,
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    checkpoint: bool = False,
    anchor_sizes: AnchorSizes = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
) -> MaskRCNN:
    """Mask R-CNN on ResNet-101-FPN; see `faster_rcnn_resnet50_fpn` for the arguments.

    >>> import equinox as eqx
    >>> eqx.filter_eval_shape(lambda: mask_rcnn_resnet101_fpn(3, key=jr.key(0))).num_classes  # its shapes alone
    3
    """
    return _mask_rcnn(resnet101, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=key)


def _faster_rcnn(
    resnet,
    num_classes: int,
    norm: Norm,
    checkpoint: bool,
    anchor_sizes: AnchorSizes,
    aspect_ratios: tuple[float, ...],
    *,
    key: PRNGKeyArray,
) -> FasterRCNN:
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = ResNetFPN(resnet(key=body_key, norm=norm, checkpoint=checkpoint), key=fpn_key)
    return FasterRCNN(backbone, num_classes, key=heads_key, anchor_sizes=anchor_sizes, aspect_ratios=aspect_ratios)


def _mask_rcnn(
    resnet,
    num_classes: int,
    norm: Norm,
    checkpoint: bool,
    anchor_sizes: AnchorSizes,
    aspect_ratios: tuple[float, ...],
    *,
    key: PRNGKeyArray,
) -> MaskRCNN:
    box_key, mask_key = jr.split(key)
    boxes = _faster_rcnn(resnet, num_classes, norm, checkpoint, anchor_sizes, aspect_ratios, key=box_key)
    return MaskRCNN(boxes, key=mask_key)
