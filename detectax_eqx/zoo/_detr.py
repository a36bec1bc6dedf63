"""DETR and Deformable DETR by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import AbstractDetector, deformable_detr, detr
from ..nn import FrozenBatchNorm, Norm, ProjectedLevels, ProjectedResNet, ResNet, resnet50, resnet101


def _detr(
    build: Callable[..., AbstractDetector],
    project: type[ProjectedResNet] | type[ProjectedLevels],
    resnet: Callable[..., ResNet],
    num_classes: int,
    *,
    key: PRNGKeyArray,
    checkpoint: bool,
    norm: Norm = FrozenBatchNorm,
    **parts: Any,
) -> AbstractDetector:
    body_key, projection_key, heads_key = jr.split(key, 3)
    backbone = project(resnet(key=body_key, norm=norm, checkpoint=checkpoint), key=projection_key)
    return build(backbone, num_classes, key=heads_key, **parts)


DETRS: dict[str, Callable[..., AbstractDetector]] = {
    "detr_resnet50": partial(_detr, detr, ProjectedResNet, resnet50),
    "detr_resnet101": partial(_detr, detr, ProjectedResNet, resnet101),
    "deformable_detr_resnet50": partial(_detr, deformable_detr, ProjectedLevels, resnet50),
    "deformable_detr_refine_resnet50": partial(_detr, deformable_detr, ProjectedLevels, resnet50, refine=True),
    "deformable_detr_two_stage_resnet50": partial(
        _detr, deformable_detr, ProjectedLevels, resnet50, refine=True, two_stage=True
    ),
}
