"""FCOS (arXiv:1904.01355): every cell of a pyramid predicts the box that it lies in, and how central it is there."""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, Conv2d, GroupNorm, Norm, relu
from ..ops import box_area, giou_loss
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


# One square per cell, of the side that the level's distances are measured in.
ANCHOR_SIZES = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
# Square pixels, more than any box has.
LARGEST_AREA = 1e8


@dataclass(frozen=True)
class FCOSMatching:
    """Which objects a cell may answer for, in units of its level's anchor size; the defaults are torchvision's.

    - `center_radius`: how far the object's middle may lie from the cell's, along either axis.
    - `least`, `most`: the farthest side of the box lies between; the finest level has no least, the coarsest no most.
    """

    center_radius: float = 1.5
    least: float = 4.0
    most: float = 8.0


class FCOS(AbstractDetector[DenseSelection]):
    """A one-stage box detector without anchors of several shapes: per cell a class, four distances and a centreness.

    `fcos` builds one with torchvision's parts. Classes are as in `RetinaNet`.

    - `class_tower`, `box_tower`: 3×3 convolutions before `class_logits` `(k, h, w)`, and before `distances`
      `(4, h, w)` and `centerness` `(1, h, w)`.
    - `preprocessing`, `selection`, `matching`: static options; the defaults are torchvision's.
    """

    backbone: Backbone
    class_tower: ConvTower
    class_logits: Conv2d
    box_tower: ConvTower
    distances: Conv2d
    centerness: Conv2d
    anchor_sizes: tuple[tuple[float, ...], ...] = eqx.field(static=True, kw_only=True, default=ANCHOR_SIZES)
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing())
    selection: DenseSelection = eqx.field(
        static=True, kw_only=True, default=DenseSelection(score_threshold=0.2, nms_threshold=0.6, max_detections=100)
    )
    matching: FCOSMatching = eqx.field(static=True, kw_only=True, default=FCOSMatching())

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits.weight.shape[0]

    def predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"]
    ) -> list[tuple[Float[Array, "1 k a"], Float[Array, "a 1"], Float[Array, "a 4"], Float[Array, "a 4"]]]:
        """Class logits, centreness logits, distances and anchors of each level."""
        features = self.backbone(self.preprocessing.normalize(image, canvas_size))
        canvas = (image.shape[0], image.shape[1])
        anchors = level_anchors(features, canvas, sizes=self.anchor_sizes, aspect_ratios=(1.0,))
        levels = []
        for x, of_level in zip(features, anchors, strict=True):
            logits = maps_by_anchor(self.class_logits(self.class_tower(x)), self.num_classes)
            x = self.box_tower(x)
            distances = by_anchor(relu(self.distances(x)), 4)
            levels.append((logits, by_anchor(self.centerness(x), 1), distances, of_level))
        return levels

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: DenseSelection | None = None
    ) -> Detections:
        """Detections in canvas pixels; see `AbstractDetector`. A score is √(class probability · centreness)."""
        levels = self.predict(image, canvas_size)
        return dense_detections(_scores, decode_distances, levels, canvas_size, selection or self.selection)

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """`classification`, the focal loss, `bbox_regression`, by GIoU, and `bbox_ctrness` of one image.

        As in torchvision, all are divided by the number of positive cells of the batch. Nothing is drawn at random.
        """
        targets.check_labels(self.num_classes)
        levels = self.predict(image, canvas_size)
        counts = [len(anchors) for *_, anchors in levels]
        logits, *others = zip(*levels, strict=True)
        centerness, distances, anchors = map(jnp.concatenate, others)
        matched, positive = match_cells(anchors, targets, counts, self.matching)
        labels = jnp.where(positive, targets.labels[matched], -1)
        # Of cells without an object, any box with an area will do: their loss is not used.
        boxes = jnp.where(positive[:, None], targets.boxes[matched], anchors)
        box_losses = giou_loss(decode_distances(distances, anchors).astype(boxes.dtype), boxes)
        wanted = centerness_of(boxes, anchors)
        center_losses = jax.nn.softplus(centerness[:, 0]) - wanted.astype(jnp.float32) * centerness[:, 0]
        count = positive.sum().astype(jnp.float32)

        def over_positives(losses: Float[Array, " a"]) -> WeightedSum:
            return WeightedSum(jnp.where(positive, losses, 0.0).sum().astype(jnp.float32), count)

        return {
            "classification": WeightedSum(class_loss(logits, labels, jnp.ones_like(positive)), count),
            "bbox_regression": over_positives(box_losses),
            "bbox_ctrness": over_positives(center_losses),
        }


def _scores(logits: Float[Array, "a k"], centerness: Float[Array, "a 1"]) -> Float[Array, "a k"]:
    return jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(centerness))


def decode_distances(distances: Float[Array, "a 4"], anchors: Float[Array, "a 4"]) -> Float[Array, "a 4"]:
    """Boxes whose left, top, right and bottom sides lie that far from the anchor's middle, in units of its sides.

    >>> decode_distances(jnp.array([[0.5, 1.0, 0.5, 0.0]]), jnp.array([[0.0, 0.0, 8.0, 8.0]])).tolist()
    [[0.0, -4.0, 8.0, 4.0]]
    """
    middle = jnp.tile((anchors[:, :2] + anchors[:, 2:]) / 2, 2)  # (a, 4): x y x y
    sides = jnp.tile(anchors[:, 2:] - anchors[:, :2], 2)
    outward = jnp.array([-1.0, -1.0, 1.0, 1.0], anchors.dtype)[None]
    return middle + outward * distances.astype(anchors.dtype) * sides


def distances_to_sides(boxes: Float[Array, "*#n 4"], points: Float[Array, "*#n 2"]) -> Float[Array, "... 4"]:
    """How far inside the left, top, right and bottom sides of its box each point `(x, y)` lies, in pixels."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def centerness_of(boxes: Float[Array, "a 4"], anchors: Float[Array, "a 4"]) -> Float[Array, " a"]:
    """Equation 3: √(least / greatest horizontal distance · least / greatest vertical one), 1 in the middle of a box.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 4.0]])
    >>> centerness_of(boxes, jnp.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 4.0, 2.0]])).tolist()
    [1.0, 0.3333333432674408]
    """
    distances = distances_to_sides(boxes, ((anchors[:, :2] + anchors[:, 2:]) / 2).astype(boxes.dtype))
    low = jnp.minimum(distances[:, :2], distances[:, 2:])  # (a, 2): horizontal, vertical
    high = jnp.maximum(distances[:, :2], distances[:, 2:])
    inside = (low > 0) & (high > 0)
    ratio = jnp.where(inside, low / jnp.where(inside, high, 1), 0)
    product = ratio[:, 0] * ratio[:, 1]
    return jnp.where(product > 0, jnp.sqrt(jnp.where(product > 0, product, 1)), 0)


def match_cells(
    anchors: Float[Array, "a 4"], targets: Targets, counts: list[int], matching: FCOSMatching
) -> tuple[Int32[Array, " a"], Bool[Array, " a"]]:
    """The object that each cell answers for, and which cells answer for any: of several objects, the smallest.

    - `anchors`: of all levels, one per cell; `counts`: how many each level has.

    A cell may answer for an object if its middle lies within the box and near the box's middle, and if the box is of
    the size that the cell's level is for (`FCOSMatching`).
    """
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2  # (a, 2)
    size = anchors[:, 2] - anchors[:, 0]  # (a)
    objects = targets.boxes.astype(anchors.dtype)
    object_middle = (objects[:, :2] + objects[:, 2:]) / 2  # (n, 2)
    apart = jnp.abs(middle[:, None] - object_middle[None]).max(axis=2)  # (a, n)
    sides = distances_to_sides(objects[None], middle[:, None])  # (a, n, 4)
    farthest = sides.max(axis=2)
    last = jnp.arange(len(anchors)) >= len(anchors) - counts[-1]
    least = jnp.where(jnp.arange(len(anchors)) < counts[0], 0.0, matching.least * size)
    most = jnp.where(last, jnp.inf, matching.most * size)
    possible = (
        (apart < matching.center_radius * size[:, None])
        & (sides.min(axis=2) > 0)
        & (farthest > least[:, None])
        & (farthest < most[:, None])
        & targets.valid[None]
    )
    if objects.shape[0] == 0:
        return jnp.zeros(len(anchors), jnp.int32), jnp.zeros(len(anchors), bool)
    # torchvision's arithmetic: in float32, areas that differ by a few pixels are equal, and the first object wins.
    smallness = jnp.where(possible, LARGEST_AREA - box_area(objects)[None], 0)  # (a, n)
    return jnp.argmax(smallness, axis=1).astype(jnp.int32), possible.any(axis=1)


def fcos(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
    head_norm: Norm = GroupNorm,
    depth: int = 4,
) -> FCOS:
    """An `FCOS` on `backbone` with torchvision's heads at random; `dataclasses.replace` changes its options.

    - `anchor_sizes`: per level, the unit of distances in canvas pixels. `head_norm`: of the towers.

    >>> from detectax_eqx.nn import ConvolvedTop, ResNetFPN, resnet18
    >>> keys = jr.split(jr.key(0), 4)
    >>> top = ConvolvedTop(16, 16, key=keys[0])
    >>> backbone = ResNetFPN(resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
    >>> fcos(backbone, 3, key=keys[3]).num_classes
    3
    """
    keys, channels, init = jr.split(key, 5), backbone.channels, normal(0.01)
    tower = partial(ConvTower, channels, depth, init=init, norm=head_norm)
    class_logits = Conv2d(channels, num_classes, 3, init=init, key=keys[1])
    return FCOS(
        backbone,
        tower(key=keys[0]),
        start_rare(class_logits),
        tower(key=keys[2]),
        Conv2d(channels, 4, 3, init=init, key=keys[3]),
        Conv2d(channels, 1, 3, init=init, key=keys[4]),
        anchor_sizes=anchor_sizes,
    )
