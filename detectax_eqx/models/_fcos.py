"""FCOS (arXiv:1904.01355): each cell of a pyramid predicts the box that contains it, and its centreness in that box."""

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


# One square anchor per cell. Its side is the unit of the level's distances.
ANCHOR_SIZES = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
# In square pixels, larger than any box.
LARGEST_AREA = 1e8


@dataclass(frozen=True)
class FCOSMatching:
    """Which objects a cell may be matched to, in units of its level's anchor size; the defaults are torchvision's.

    - `center_radius`: upper limit of the distance between the centres of object and cell along each axis.
    - `least`, `most`: limits of the distance from the cell's centre to the farthest side of the box. The finest level
      has no lower limit, the coarsest no upper one.
    """

    center_radius: float = 1.5
    least: float = 4.0
    most: float = 8.0


class FCOS(AbstractDetector[DenseSelection]):
    """A one-stage detector with a single anchor per cell, which predicts a class, four distances and a centreness.

    `fcos` builds one with torchvision's parts. Classes are encoded as in `RetinaNet`.

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
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> list[tuple[Float[Array, "1 k a"], Float[Array, "a 1"], Float[Array, "a 4"], Float[Array, "a 4"]]]:
        """Returns the class logits, centreness logits, distances and anchors of each level."""
        features = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
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
        """Returns detections in canvas pixels, see `AbstractDetector`. A score is √(class probability · centreness)."""
        levels = self.predict(image, canvas_size)
        return dense_detections(_scores, decode_distances, levels, canvas_size, selection or self.selection)

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `classification` (focal loss), `bbox_regression` (GIoU loss) and `bbox_ctrness` of one image.

        As in torchvision, all are divided by the number of positive cells in the batch. `key` is for the
        backbone.
        """
        targets.check_labels(self.num_classes)
        levels = self.predict(image, canvas_size, key=key)
        counts = [len(anchors) for *_, anchors in levels]
        logits, *others = zip(*levels, strict=True)
        centerness, distances, anchors = map(jnp.concatenate, others)
        matched, positive = match_cells(anchors, targets, counts, self.matching)
        labels = jnp.where(positive, targets.labels[matched], -1)
        # Cells without an object take their anchor as a placeholder with nonzero area; their loss is masked out below.
        boxes = jnp.where(positive[:, None], targets.boxes[matched], anchors)
        box_losses = giou_loss(decode_distances(distances, anchors).astype(boxes.dtype), boxes)
        target_centerness = centerness_of(boxes, anchors)
        # Binary cross entropy with logits x and targets t: log(1 + eˣ) - t x.
        center_losses = jax.nn.softplus(centerness[:, 0]) - target_centerness.astype(jnp.float32) * centerness[:, 0]
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
    """Decodes distances to the left, top, right and bottom sides, from the anchor's centre and in units of its sides.

    >>> decode_distances(jnp.array([[0.5, 1.0, 0.5, 0.0]]), jnp.array([[0.0, 0.0, 8.0, 8.0]])).tolist()
    [[0.0, -4.0, 8.0, 4.0]]
    """
    middle = jnp.tile((anchors[:, :2] + anchors[:, 2:]) / 2, 2)  # (a, 4): x y x y
    sides = jnp.tile(anchors[:, 2:] - anchors[:, :2], 2)
    outward = jnp.array([-1.0, -1.0, 1.0, 1.0], anchors.dtype)[None]
    return middle + outward * distances.astype(anchors.dtype) * sides


def distances_to_sides(boxes: Float[Array, "*#n 4"], points: Float[Array, "*#n 2"]) -> Float[Array, "... 4"]:
    """Returns the distances from each point `(x, y)` to the left, top, right and bottom sides of its box, in pixels.

    A distance is negative where the point lies outside that side.
    """
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def centerness_of(boxes: Float[Array, "a 4"], anchors: Float[Array, "a 4"]) -> Float[Array, " a"]:
    """Computes centreness: √(min(l, r) / max(l, r) · min(t, b) / max(t, b)), 1 at the centre of a box (equation 3).

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
    """Matches each cell to at most one object. Returns the objects' indices, and which cells are positive.

    - `anchors`: of all levels, one per cell. `counts`: number of anchors of each level.

    A cell may be matched to an object if the cell's centre lies inside the box and near the box's centre, and if the
    size of the box suits the cell's level (`FCOSMatching`). Of several such objects, the smallest is chosen.
    """
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2  # (a, 2)
    size = anchors[:, 2] - anchors[:, 0]  # (a)
    objects = targets.boxes.astype(anchors.dtype)
    object_middle = (objects[:, :2] + objects[:, 2:]) / 2  # (n, 2)
    center_distance = jnp.abs(middle[:, None] - object_middle[None]).max(axis=2)  # (a, n)
    sides = distances_to_sides(objects[None], middle[:, None])  # (a, n, 4)
    farthest = sides.max(axis=2)
    last = jnp.arange(len(anchors)) >= len(anchors) - counts[-1]
    least = jnp.where(jnp.arange(len(anchors)) < counts[0], 0.0, matching.least * size)
    most = jnp.where(last, jnp.inf, matching.most * size)
    possible = (
        (center_distance < matching.center_radius * size[:, None])
        & (sides.min(axis=2) > 0)
        & (farthest > least[:, None])
        & (farthest < most[:, None])
        & targets.valid[None]
    )
    if objects.shape[0] == 0:
        return jnp.zeros(len(anchors), jnp.int32), jnp.zeros(len(anchors), bool)
    # As in torchvision: in float32, areas that differ by a few pixels compare equal here, and the first object wins.
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
    """Builds an `FCOS` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `anchor_sizes`: for each level, the unit of distances in canvas pixels.
    - `head_norm`: norm of the towers. `depth`: number of convolutions in each tower.

    >>> from detectax_eqx.nn import ConvolvedTop, BackboneWithFPN, resnet18
    >>> keys = jr.split(jr.key(0), 4)
    >>> top = ConvolvedTop(16, 16, key=keys[0])
    >>> backbone = BackboneWithFPN(resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
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
