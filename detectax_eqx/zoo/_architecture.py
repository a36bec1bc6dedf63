"""The name of a detector and the options that determine its arrays, from which it can be rebuilt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax.random as jr
from jaxtyping import PRNGKeyArray

from ..models import AbstractDetector
from ..nn import FrozenBatchNorm, GroupNorm, Norm
from ._detectors import build


# The number of groups of GroupNorm where it divides the number of channels, as it does in ResNets.
GROUPS = 32


def _group_norm(channels: int) -> GroupNorm:
    """A norm of 32 groups, or of the most that divide both 32 and the channels: MobileNets have widths such as 40."""
    return GroupNorm(channels, groups=math.gcd(GROUPS, channels))


NormName = Literal["frozen_batch", "frozen_batch_eps0", "group"]
NORMS: dict[NormName, Norm] = {
    "frozen_batch": FrozenBatchNorm,
    # torchvision's first COCO detectors were trained with `eps=0`.
    "frozen_batch_eps0": partial(FrozenBatchNorm, eps=0.0),
    "group": _group_norm,
}


@dataclass(frozen=True)
class Architecture:
    """A detector's name and options, as stored in checkpoints and saved predictors.

    - `name`: one of `zoo.names()`. `norm`: the normalisation of the backbone, one of `zoo.NORMS`.
    - `anchor_sizes`: side in pixels of the square anchor on each level. `aspect_ratios`: height / width of the anchors.
      `num_keypoints`: points per object. `None` for the detector's defaults.

    >>> Architecture("fcos_resnet50_fpn").shapes(3).num_classes
    3
    """

    name: str
    norm: NormName = "frozen_batch"
    anchor_sizes: tuple[float, ...] | None = None
    aspect_ratios: tuple[float, ...] | None = None
    num_keypoints: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"There is no norm {self.norm!r}; choose one of {', '.join(NORMS)}.")

    def build(self, num_classes: int, *, key: PRNGKeyArray, checkpoint: bool = False) -> AbstractDetector:
        """Builds the detector with random parameters. `checkpoint`: gradient checkpointing in the backbone.

        Raises a `ValueError` if the name is unknown, or if an option is given that the detector lacks.
        """
        parts: dict[str, Any] = {}
        if self.anchor_sizes is not None:
            parts["anchor_sizes"] = tuple((size,) for size in self.anchor_sizes)
        if self.aspect_ratios is not None:
            parts["aspect_ratios"] = self.aspect_ratios
        if self.num_keypoints is not None:
            parts["num_keypoints"] = self.num_keypoints
        # Each detector's frozen norm has an `eps` of its own.
        norm = None if self.norm == "frozen_batch" else NORMS[self.norm]
        return build(self.name, num_classes, key=key, norm=norm, checkpoint=checkpoint, **parts)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Architecture":
        """The architecture of `asdict`'s output as read from JSON. Options that older files lack have their defaults.

        >>> Architecture.from_fields({"name": "fcos_resnet50_fpn", "norm": "group", "anchor_sizes": None})
        Architecture(name='fcos_resnet50_fpn', norm='group', anchor_sizes=None, aspect_ratios=None, num_keypoints=None)
        """
        anchors = {key: fields.get(key) and tuple(map(float, fields[key])) for key in ("anchor_sizes", "aspect_ratios")}
        return cls(fields["name"], fields["norm"], **anchors, num_keypoints=fields.get("num_keypoints"))

    def shapes(self, num_classes: int) -> AbstractDetector:
        """The detector with `jax.ShapeDtypeStruct`s instead of arrays, so that no memory is allocated."""
        return eqx.filter_eval_shape(partial(self.build, num_classes), key=jr.key(0))
