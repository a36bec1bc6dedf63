"""DETR by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import AbstractDetector, detr
from ..nn import FrozenBatchNorm, Norm, ProjectedResNet, ResNet, resnet50, resnet101


def _detr(
    resnet: Callable[..., ResNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    **parts: Any,
) -> AbstractDetector:
    body_key, projection_key, heads_key = jr.split(key, 3)
    backbone = ProjectedResNet(resnet(key=body_key, norm=norm, checkpoint=checkpoint), key=projection_key)
    return detr(backbone, num_classes, key=heads_key, **parts)


DETRS: dict[str, Callable[..., AbstractDetector]] = {
    "detr_resnet50": partial(_detr, resnet50),
    "detr_resnet101": partial(_detr, resnet101),
}
