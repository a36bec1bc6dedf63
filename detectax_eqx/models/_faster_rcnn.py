"""Faster R-CNN (arXiv:1506.01497) on a feature pyramid."""

from collections.abc import Callable

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone
from ._box_head import BoxHead
from ._cascade import AnyBoxHead
from ._detector import AbstractDetector
from ._preprocessing import Preprocessing
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS, RPN
from ._two_stage import RoIPooling, TwoStageSampling, TwoStageSelection, box_losses, detect_boxes


class FasterRCNN(AbstractDetector[TwoStageSelection]):
    """A two-stage box detector: backbone with pyramid, region proposals, box head.

    `faster_rcnn` builds one with torchvision's parts. Calling the model takes an image on its canvas; `detect` accepts
    an image of any size.

    - `pooling`, `preprocessing`, `selection`, `sampling`: static options; the defaults are torchvision's.
    """

    backbone: Backbone
    rpn: RPN
    box_head: AnyBoxHead
    pooling: RoIPooling = eqx.field(static=True, kw_only=True, default=RoIPooling())
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing())
    selection: TwoStageSelection = eqx.field(static=True, kw_only=True, default=TwoStageSelection())
    sampling: TwoStageSampling = eqx.field(static=True, kw_only=True, default=TwoStageSampling())

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.box_head.num_classes

    def __call__(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        *,
        selection: TwoStageSelection | None = None,
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`."""
        return detect_boxes(self, image, canvas_size, selection or self.selection)[1]

    def loss(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        targets: Targets,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, WeightedSum]:
        """Returns `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier` and `loss_box_reg` of one image.

        Matching, sampling and normalisation are torchvision's. An image without objects has only negatives and gives
        finite losses. `key` determines the sampled anchors and proposals.
        """
        return box_losses(self, image, canvas_size, targets, self.sampling, key)[0]


def faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
    hidden_size: int = 1024,
    rpn_depth: int = 1,
    box_head: Callable[..., AnyBoxHead] = BoxHead,
) -> FasterRCNN:
    """Builds a `FasterRCNN` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `num_classes`: foreground classes.
    - `anchor_sizes`: side lengths in canvas pixels, one tuple per level; `aspect_ratios`: height / width.
    - `hidden_size`: width of the box head.
    - `rpn_depth`: number of 3×3 convolutions of the RPN. `box_head`: the class of the box head. torchvision's second
      version has 2 and `ConvBoxHead`.

    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32).num_classes
    3
    """
    keys = jr.split(key)
    rpn = RPN(backbone.channels, key=keys[0], anchor_sizes=anchor_sizes, aspect_ratios=aspect_ratios, depth=rpn_depth)
    return FasterRCNN(backbone, rpn, box_head(backbone.channels, num_classes, key=keys[1], hidden_size=hidden_size))
