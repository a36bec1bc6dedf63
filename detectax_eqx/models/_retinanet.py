"""RetinaNet (arXiv:1708.02002): anchors of three scales and three shapes per cell, trained with the focal loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, Conv2d, Norm
from ..ops import decode_boxes, encode_boxes, giou_loss, match_boxes, pairwise_iou, smooth_l1_loss
from ._dense import (
    ConvTower,
    DenseSelection,
    by_anchor,
    class_loss,
    dense_detections,
    level_anchors,
    maps_by_anchor,
    start_rare,
)
from ._detector import AbstractDetector
from ._preprocessing import Preprocessing


# Three sizes per octave; torchvision rounds them down.
ANCHOR_SIZES = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in (32, 64, 128, 256, 512))

# Maps deltas, anchors and the boxes of matched objects, all `(a, 4)`, to a loss per anchor.
BoxLoss = Callable[[Float[Array, "a 4"], Float[Array, "a 4"], Float[Array, "a 4"]], Float[Array, " a"]]


def l1_of_deltas(
    deltas: Float[Array, "a 4"], anchors: Float[Array, "a 4"], boxes: Float[Array, "a 4"]
) -> Float[Array, " a"]:
    """Computes the absolute error of the deltas: the box loss of torchvision's first RetinaNet."""
    return smooth_l1_loss(deltas, encode_boxes(boxes, anchors).astype(deltas.dtype), beta=0.0).sum(axis=1)


def giou_of_boxes(
    deltas: Float[Array, "a 4"], anchors: Float[Array, "a 4"], boxes: Float[Array, "a 4"]
) -> Float[Array, " a"]:
    """Computes `ops.giou_loss` of the decoded boxes: the box loss of torchvision's second RetinaNet."""
    return giou_loss(decode_boxes(deltas, anchors.astype(deltas.dtype)), boxes.astype(deltas.dtype))


@dataclass(frozen=True)
class RetinaNetMatching:
    """IoU thresholds for matching anchors with objects; the defaults are the paper's.

    - `positive_iou`: an anchor is positive from this IoU with an object.
    - `negative_iou`: an anchor is negative below this IoU with all objects.

    Anchors in between are ignored, except for those with the highest IoU for an object, which are positive.
    """

    positive_iou: float = 0.5
    negative_iou: float = 0.4


class RetinaNet(AbstractDetector[DenseSelection]):
    """A one-stage box detector: predicts a class and a box for each anchor of each cell, on all levels of a pyramid.

    `retinanet` builds one with torchvision's parts.

    - `class_tower`, `box_tower`: 3×3 convolutions before `class_logits` `(a k, h, w)` and `deltas` `(a 4, h, w)`.
    - `rounded_anchors`, `anchor_strides`: see `RPN`. `normalize_per_image`: whether losses are divided by the positives
      of each image and averaged, as in torchvision, rather than divided by the positives of the batch.
    - `box_loss`, `preprocessing`, `selection`, `matching`: static options; the defaults are those of torchvision's
      first version.

    Each class has its own sigmoid, and there is no background class. torchvision's checkpoints use COCO's category ids
    as labels: 91 classes, of which 0 is never used.
    """

    backbone: Backbone
    class_tower: ConvTower
    class_logits: Conv2d
    box_tower: ConvTower
    deltas: Conv2d
    anchor_sizes: tuple[tuple[float, ...], ...] = eqx.field(static=True, kw_only=True, default=ANCHOR_SIZES)
    aspect_ratios: tuple[float, ...] = eqx.field(static=True, kw_only=True, default=(0.5, 1.0, 2.0))
    rounded_anchors: bool = eqx.field(static=True, kw_only=True, default=True)
    anchor_strides: tuple[int, ...] | None = eqx.field(static=True, kw_only=True, default=None)
    normalize_per_image: bool = eqx.field(static=True, kw_only=True, default=True)
    box_loss: BoxLoss = eqx.field(static=True, kw_only=True, default=l1_of_deltas)
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing())
    selection: DenseSelection = eqx.field(static=True, kw_only=True, default=DenseSelection())
    matching: RetinaNetMatching = eqx.field(static=True, kw_only=True, default=RetinaNetMatching())

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits.weight.shape[0] // (len(self.anchor_sizes[0]) * len(self.aspect_ratios))

    def predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> list[tuple[Float[Array, "r k p"], Float[Array, "a 4"], Float[Array, "a 4"]]]:
        """Returns the class logits, deltas and anchors of each level.

        A level has `p` cells of `r` anchors each, `a = p r` anchors in all.
        """
        features = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
        canvas = (image.shape[0], image.shape[1])
        anchors = level_anchors(
            features,
            canvas,
            sizes=self.anchor_sizes,
            aspect_ratios=self.aspect_ratios,
            strides=self.anchor_strides,
            rounded=self.rounded_anchors,
        )
        logits = [maps_by_anchor(self.class_logits(self.class_tower(x)), self.num_classes) for x in features]
        deltas = [by_anchor(self.deltas(self.box_tower(x)), 4) for x in features]
        return list(zip(logits, deltas, anchors, strict=True))

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: DenseSelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`."""
        levels = [(logits, deltas[:, :0], deltas, a) for logits, deltas, a in self.predict(image, canvas_size)]
        return dense_detections(_sigmoid, decode_boxes, levels, canvas_size, selection or self.selection)

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `classification` (focal loss) and `bbox_regression` of one image.

        As in torchvision, both are divided by the image's number of positive anchors, then averaged over images. If not
        `normalize_per_image`, both are divided by the number of positive anchors of all images. `key` is for
        the backbone.
        """
        targets.check_labels(self.num_classes)
        logits, *others = zip(*self.predict(image, canvas_size, key=key), strict=True)
        deltas, anchors = map(jnp.concatenate, others)
        matches = match_boxes(
            pairwise_iou(targets.boxes, anchors.astype(targets.boxes.dtype)),
            targets.valid,
            low_threshold=self.matching.negative_iou,
            high_threshold=self.matching.positive_iou,
            allow_low_quality=True,
        )
        labels = jnp.where(matches.positive, targets.labels[matches.indices], -1)  # (a,)
        counted = matches.positive | matches.negative
        # Anchors without an object take their own box as a placeholder of nonzero area; their loss is masked out.
        boxes = jnp.where(matches.positive[:, None], targets.boxes[matches.indices], anchors)
        box_losses = self.box_loss(deltas, anchors, boxes)  # (a,)
        losses = {
            "classification": class_loss(logits, labels, counted),
            "bbox_regression": jnp.where(matches.positive, box_losses, 0.0).sum(),
        }
        positives = matches.positive.sum().astype(jnp.float32)
        if not self.normalize_per_image:
            return {name: WeightedSum(loss, positives) for name, loss in losses.items()}
        one = jnp.ones((), jnp.float32)
        return {name: WeightedSum(loss / jnp.maximum(positives, 1), one) for name, loss in losses.items()}


def _sigmoid(logits: Float[Array, "a k"], _: Array) -> Float[Array, "a k"]:
    return jax.nn.sigmoid(logits)


def retinanet(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    head_norm: Norm | None = None,
    box_loss: BoxLoss = l1_of_deltas,
    depth: int = 4,
) -> RetinaNet:
    """Builds a `RetinaNet` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `anchor_sizes`: side lengths in canvas pixels, one tuple per level; `aspect_ratios`: height / width.
    - `head_norm`: norm of the towers. torchvision's first version has none; its second has `GroupNorm` and
      `giou_of_boxes`.
    - `depth`: number of convolutions in each tower.

    >>> from detectax_eqx.nn import ConvolvedTop, BackboneWithFPN, resnet18
    >>> keys = jr.split(jr.key(0), 4)
    >>> top = ConvolvedTop(16, 16, key=keys[0])
    >>> backbone = BackboneWithFPN(resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
    >>> retinanet(backbone, 3, key=keys[3]).backbone.strides
    (8, 16, 32, 64, 128)
    """
    keys, channels, init = jr.split(key, 4), backbone.channels, normal(0.01)
    num_anchors = len(anchor_sizes[0]) * len(aspect_ratios)
    tower = partial(ConvTower, channels, depth, init=init, norm=head_norm, use_bias=head_norm is None)
    class_logits = Conv2d(channels, num_anchors * num_classes, 3, init=init, key=keys[1])
    return RetinaNet(
        backbone,
        tower(key=keys[0]),
        start_rare(class_logits),
        tower(key=keys[2]),
        Conv2d(channels, num_anchors * 4, 3, init=init, key=keys[3]),
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        box_loss=box_loss,
    )
