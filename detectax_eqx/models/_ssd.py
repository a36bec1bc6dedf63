"""SSD (arXiv:1512.02325) and SSDlite (arXiv:1801.04381): predictions from maps of several sizes, by default boxes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Conv2d, FrozenBatchNorm, Norm, SeparableConv2d, SSDBackbone
from ..ops import clip_boxes, decode_boxes, encode_boxes, match_boxes, pairwise_iou, smooth_l1_loss
from ._box_head import BOX_WEIGHTS
from ._dense import by_anchor
from ._detector import AbstractDetector
from ._preprocessing import Preprocessing, Square
from ._rpn import Weights
from ._suppress import suppress


# Glorot and Bengio's initialisation, that of torchvision's heads.
XAVIER_UNIFORM = variance_scaling(1.0, "fan_avg", "uniform", in_axis=1, out_axis=0)
# Mean RGB values, 0..255, of the weights that SSD's VGG was trained from, which take pixels of this range.
VGG_MEAN = (0.48235 * 255, 0.45882 * 255, 0.40784 * 255)
# SSDlite's network takes pixels scaled to -1..1.
LITE_MEAN = LITE_STD = (0.5 * 255, 0.5 * 255, 0.5 * 255)


@dataclass(frozen=True)
class DefaultBoxes:
    """The default boxes of an SSD (section 2.2 of the paper); the defaults are those of SSD300 in torchvision.

    A cell of level `k` has a square box of side `scales[k]`, one of side `√(scales[k] · scales[k + 1])`, and for each
    aspect ratio of the level a wide and a tall box with the area of the first.

    - `aspect_ratios`: for each level, ratios of the sides, apart from 1.
    - `scales`: as fractions of the canvas's sides, for each level and one more.
    - `steps`: distance between cells in pixels, for each level; `None` for the canvas divided by the map's size.
    """

    aspect_ratios: tuple[tuple[float, ...], ...] = ((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0,), (2.0,))
    scales: tuple[float, ...] = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
    steps: tuple[float, ...] | None = (8.0, 16.0, 32.0, 64.0, 100.0, 300.0)

    def __post_init__(self) -> None:
        levels = len(self.aspect_ratios)
        if len(self.scales) != levels + 1 or (self.steps is not None and len(self.steps) != levels):
            raise ValueError(
                f"scales must have one entry more than the {levels} levels of aspect_ratios, and steps one per level, "
                f"got {self.scales} and {self.steps}."
            )

    @property
    def per_cell(self) -> tuple[int, ...]:
        """Number of boxes per cell of each level."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)

    def __call__(self, sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> Float[Array, "a 4"]:
        """Returns the boxes of maps of these `(h, w)` on a canvas of `(height, width)` pixels, in canvas pixels.

        They are ordered by level, row, column, and as above. A box is at most as large as the canvas, but may extend
        beyond it.

        >>> boxes = DefaultBoxes(aspect_ratios=((),), scales=(0.25, 1.0), steps=None)
        >>> boxes([(1, 2)], (40, 40)).tolist()[0]
        [5.0, 15.0, 15.0, 25.0]
        """
        if len(sizes) != len(self.aspect_ratios):
            raise ValueError(f"There are default boxes for {len(self.aspect_ratios)} levels, but {len(sizes)} maps.")
        pixels = np.array([canvas[1], canvas[0]], np.float64)  # (x, y)
        boxes = []
        for level, (height, width) in enumerate(sizes):
            step = pixels / (width, height) if self.steps is None else np.full(2, self.steps[level])
            centers = (
                np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1) * step
            )  # (h, w, 2)
            sides = np.minimum(self._sides(level), 1.0) * pixels  # (b, 2)
            centers = centers.reshape(-1, 1, 2)  # (h w, 1, 2)
            level_boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=2)  # (h w, b, 4)
            boxes.append(level_boxes.reshape(-1, 4))
        return jnp.asarray(np.concatenate(boxes), jnp.result_type(float))

    def _sides(self, level: int) -> Float[np.ndarray, "b 2"]:
        """Widths and heights of the boxes of a cell, as fractions of the canvas."""
        scale, larger = self.scales[level], math.sqrt(self.scales[level] * self.scales[level + 1])
        sides = [(scale, scale), (larger, larger)]
        for ratio in self.aspect_ratios[level]:
            long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sides += [(long, short), (short, long)]
        return np.array(sides, np.float32).astype(np.float64)  # rounded, as in torchvision


# Scales from .2 to .95 in equal steps, and 1 (table 5 of the MobileNetV2 paper, section 6.2).
LITE_BOXES = DefaultBoxes(
    aspect_ratios=((2.0, 3.0),) * 6, scales=(*(0.2 + 0.75 * k / 5 for k in range(6)), 1.0), steps=None
)


@dataclass(frozen=True)
class SSDSelection:
    """Which predictions an SSD keeps; the defaults are torchvision's for SSD300.

    - `score_threshold`: score in 0..1 above which detections are kept.
    - `nms_threshold`: IoU above which the lower-scoring of two detections of a class is dropped.
    - `max_detections`: maximum number of detections per image.
    - `top_n`: number of candidates per class before suppression.
    """

    score_threshold: float = 0.01
    nms_threshold: float = 0.45
    max_detections: int = 200
    top_n: int = 400


@dataclass(frozen=True)
class SSDMatching:
    """How default boxes are matched to objects for the loss; the defaults are the paper's.

    - `positive_iou`: a default box is positive from this IoU with an object. So is the best one of each object.
    - `negatives_per_positive`: number of negatives that count in the class loss, those with the highest loss.
    """

    positive_iou: float = 0.5
    negatives_per_positive: float = 3.0


class SSD(AbstractDetector[SSDSelection]):
    """A one-stage detector with a softmax over the classes and the background, for each default box of each map.

    `ssd` and `ssdlite` build one with torchvision's parts.

    - `class_heads`, `box_heads`: for each level, a module that maps its features to class logits `(b (k + 1), h, w)`,
      background first, and to deltas `(b 4, h, w)`.
    - `default_boxes`, `preprocessing`, `selection`, `matching`: static options; the defaults are those of SSD300.
    - `weights`: of the box coder. `smooth_l1_beta`: of the box loss.
    """

    backbone: SSDBackbone  # pyright: ignore[reportIncompatibleVariableOverride]  # levels differ in width
    class_heads: tuple[Callable, ...]
    box_heads: tuple[Callable, ...]
    default_boxes: DefaultBoxes = eqx.field(static=True, kw_only=True, default=DefaultBoxes())
    num_outputs: int = eqx.field(static=True, kw_only=True)
    preprocessing: Preprocessing = eqx.field(
        static=True, kw_only=True, default=Preprocessing(Square(300), VGG_MEAN, (1.0, 1.0, 1.0))
    )
    selection: SSDSelection = eqx.field(static=True, kw_only=True, default=SSDSelection())
    matching: SSDMatching = eqx.field(static=True, kw_only=True, default=SSDMatching())
    weights: Weights = eqx.field(static=True, kw_only=True, default=BOX_WEIGHTS)
    smooth_l1_beta: float = eqx.field(static=True, kw_only=True, default=1.0)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.num_outputs - 1

    def predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "a k1"], Float[Array, "a 4"], Float[Array, "a 4"]]:
        """Returns the class logits, deltas and default boxes of all levels. Classes have the background first."""
        features = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
        sizes = [(x.shape[1], x.shape[2]) for x in features]
        boxes = self.default_boxes(sizes, (image.shape[0], image.shape[1]))
        logits = [by_anchor(head(x), self.num_outputs) for head, x in zip(self.class_heads, features, strict=True)]
        deltas = [by_anchor(head(x), 4) for head, x in zip(self.box_heads, features, strict=True)]
        return jnp.concatenate(logits), jnp.concatenate(deltas), boxes

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: SSDSelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`."""
        selection = selection or self.selection
        logits, deltas, default_boxes = self.predict(image, canvas_size)
        boxes = decode_boxes(deltas, default_boxes.astype(deltas.dtype), weights=self.weights)
        boxes = clip_boxes(boxes, canvas_size.astype(jnp.float32))
        scores = jax.nn.softmax(logits)[:, 1:].T  # (k, a), background removed
        scores, rows = lax.top_k(scores, min(selection.top_n, len(boxes)))  # (k, t): the best boxes of each class
        labels = jnp.broadcast_to(jnp.arange(len(rows), dtype=jnp.int32)[:, None], rows.shape)
        scores, rows, labels = (x.reshape(-1) for x in (scores, rows, labels))  # (k t)
        return suppress(
            boxes[rows],
            scores,
            labels,
            scores > selection.score_threshold,
            nms_threshold=selection.nms_threshold,
            max_detections=selection.max_detections,
        )

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `classification` (cross entropy with the hardest negatives) and `bbox_regression` of one image.

        As in torchvision, both are divided by the number of positive default boxes in the batch. `key` is for
        the backbone.
        """
        targets.check_labels(self.num_classes)
        logits, deltas, default_boxes = self.predict(image, canvas_size, key=key)
        default_boxes = default_boxes.astype(targets.boxes.dtype)
        matched, positive = match_default_boxes(
            pairwise_iou(targets.boxes, default_boxes), targets.valid, positive_iou=self.matching.positive_iou
        )
        labels = jnp.where(positive, targets.labels[matched] + 1, 0)  # (a,)
        labels = jnp.where(positive & (labels < 1), self.num_outputs, labels)  # a label out of range gives NaN
        log_probabilities = jax.nn.log_softmax(logits)
        class_losses = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]  # (a,)
        count = positive.sum().astype(jnp.float32)
        hard = hardest(class_losses, ~positive, self.matching.negatives_per_positive * count)
        # Default boxes without an object take their own box as a placeholder of nonzero area.
        boxes = jnp.where(positive[:, None], targets.boxes[matched], default_boxes)
        target_deltas = encode_boxes(boxes, default_boxes, weights=self.weights).astype(deltas.dtype)
        box_losses = smooth_l1_loss(deltas, target_deltas, beta=self.smooth_l1_beta).sum(axis=1)  # (a,)
        return {
            "classification": WeightedSum(jnp.where(positive | hard, class_losses, 0.0).sum(), count),
            "bbox_regression": WeightedSum(jnp.where(positive, box_losses, 0.0).sum(), count),
        }


def match_default_boxes(
    iou: Float[Array, "n a"], valid: Bool[Array, " n"], *, positive_iou: float = 0.5
) -> tuple[Int32[Array, " a"], Bool[Array, " a"]]:
    """Matches each default box to at most one object. Returns the objects' indices, and which boxes are positive.

    A default box is positive if its IoU with some object is at least `positive_iou`, and is matched to the object with
    the highest. Then each object is matched to the default box with which it has the highest IoU, whatever that is; if
    two objects share it, to the last of them. Objects that are not `valid` are ignored.

    >>> iou = jnp.array([[0.7, 0.1, 0.2], [0.6, 0.3, 0.1]])
    >>> matched, positive = match_default_boxes(iou, jnp.array([True, True]))
    >>> matched.tolist(), positive.tolist()
    ([1, 0, 0], [True, False, False])
    """
    matches = match_boxes(iou, valid, low_threshold=positive_iou, high_threshold=positive_iou)
    if iou.shape[0] == 0:
        return matches.indices, matches.positive
    best = jnp.argmax(lax.stop_gradient(iou), axis=1)  # (n,)
    forced = valid[:, None] & (best[:, None] == jnp.arange(iou.shape[1])[None])  # (n, a)
    rows = jnp.arange(iou.shape[0], dtype=jnp.int32)[:, None]
    last = jnp.where(forced, rows, -1).max(axis=0)  # (a,)
    return jnp.where(last >= 0, last, matches.indices), matches.positive | (last >= 0)


def hardest(losses: Float[Array, " a"], candidates: Bool[Array, " a"], count: Float[Array, ""]) -> Bool[Array, " a"]:
    """Returns which of the `candidates` have the highest losses: at most `count` of them, on ties the first.

    >>> losses = jnp.array([3.0, 1.0, 2.0, 9.0])
    >>> hardest(losses, jnp.array([True, True, True, False]), jnp.array(2.0)).tolist()
    [True, False, True, False]
    """
    ranked = jnp.argsort(-jnp.where(candidates, lax.stop_gradient(losses), -jnp.inf))  # (a,), the highest first
    rank = jnp.argsort(ranked)  # (a,): the position of each box in that order
    return candidates & (rank.astype(jnp.float32) < count)


def ssd(
    backbone: SSDBackbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    default_boxes: DefaultBoxes = DefaultBoxes(),
    predictor: Callable[..., Callable] = partial(Conv2d, kernel_size=3, init=XAVIER_UNIFORM),  # noqa: B008
) -> SSD:
    """Builds an `SSD` on `backbone` with torchvision's heads, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `default_boxes`: for each level of the backbone.
    - `predictor`: builds the heads of a level: takes the number of its channels, that of outputs, and a `key`.

    >>> from detectax_eqx.nn import SSDVGG, vgg16
    >>> extras = ((32, 2, 1), (16, 2, 1), (16, 2, 1), (16, 2, 1))
    >>> backbone = SSDVGG(vgg16(key=jr.key(0), width=8), key=jr.key(1), fc_channels=32, extras=extras)
    >>> ssd(backbone, 3, key=jr.key(2)).num_classes
    3
    """
    if num_classes < 1:
        raise ValueError(f"num_classes counts foreground classes and must be at least 1, got {num_classes}.")
    if len(backbone.channels) != len(default_boxes.per_cell):
        raise ValueError(
            f"default_boxes has {len(default_boxes.per_cell)} levels, but the backbone has {len(backbone.channels)}."
        )
    levels = list(zip(backbone.channels, default_boxes.per_cell, strict=True))
    keys = jr.split(key, 2 * len(levels))
    outputs = num_classes + 1
    return SSD(
        backbone,
        tuple(predictor(i, count * outputs, key=k) for (i, count), k in zip(levels, keys[::2], strict=True)),
        tuple(predictor(i, count * 4, key=k) for (i, count), k in zip(levels, keys[1::2], strict=True)),
        default_boxes=default_boxes,
        num_outputs=outputs,
    )


def ssdlite(
    backbone: SSDBackbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    default_boxes: DefaultBoxes = LITE_BOXES,
    norm: Norm = FrozenBatchNorm,
    size: int = 320,
) -> SSD:
    """Builds an `SSD` with depthwise heads and torchvision's options for SSDlite, randomly initialised.

    - `norm`: of the heads. `size`: images are resized to this square. The other arguments are those of `ssd`.

    >>> from detectax_eqx.nn import SSDMobileNet, mobilenet_v3_large
    >>> body = mobilenet_v3_large(key=jr.key(0), width_multiplier=0.25, reduced_tail=True)
    >>> backbone = SSDMobileNet(body, key=jr.key(1), extras=(32, 16, 16, 16))
    >>> ssdlite(backbone, 3, key=jr.key(2)).selection.max_detections
    300
    """
    heads = partial(SeparableConv2d, norm=norm)
    model = ssd(backbone, num_classes, key=key, default_boxes=default_boxes, predictor=heads)
    return replace(
        model,
        preprocessing=Preprocessing(Square(size), LITE_MEAN, LITE_STD),
        selection=SSDSelection(score_threshold=0.001, nms_threshold=0.55, max_detections=300, top_n=300),
    )
