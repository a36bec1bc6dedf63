"""What the scripts share: models by name, and the category that each of a model's labels stands for."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax.random as jr

from detectax_eqx import models, nn


ModelName = Literal[
    "faster_rcnn_resnet18_fpn",
    "faster_rcnn_resnet34_fpn",
    "faster_rcnn_resnet50_fpn",
    "faster_rcnn_resnet101_fpn",
    "mask_rcnn_resnet18_fpn",
    "mask_rcnn_resnet34_fpn",
    "mask_rcnn_resnet50_fpn",
    "mask_rcnn_resnet101_fpn",
]
NormName = Literal["frozen_batch", "frozen_batch_eps0", "group"]

NORMS: dict[NormName, nn.Norm] = {
    "frozen_batch": nn.FrozenBatchNorm,
    "frozen_batch_eps0": partial(nn.FrozenBatchNorm, eps=0.0),
    "group": nn.GroupNorm,
}


def build(model: ModelName, num_classes: int, norm: NormName, seed: int = 0) -> models.FasterRCNN | models.MaskRCNN:
    """The named detector with random parameters."""
    return getattr(models, model)(num_classes, key=jr.key(seed), norm=NORMS[norm])


def category_ids_of(num_classes: int, dataset_ids: Sequence[int]) -> tuple[int, ...]:
    """The category id of each label of a model that comes without a map of its own.

    A model with as many classes as the dataset has categories knows them in the order of their ids. One with more, such
    as torchvision's 90 for COCO's 80, knows ids themselves: label + 1.
    """
    if num_classes == len(dataset_ids):
        return tuple(dataset_ids)
    if num_classes >= max(dataset_ids):
        return tuple(range(1, num_classes + 1))
    raise SystemExit(
        f"The model has {num_classes} classes, but the annotations {len(dataset_ids)} categories with ids up to "
        f"{max(dataset_ids)}: the labels cannot be told. Use the annotations that the model was trained for."
    )
