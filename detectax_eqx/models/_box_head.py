"""The second stage, which classifies proposals and refines their boxes: heads, sampling, loss and detections."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from .._types import Detections, Targets, WeightedSum
from ..nn import Conv2d, FrozenBatchNorm, Norm, relu
from ..ops import (
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match_boxes,
    pairwise_iou,
    sample_balanced,
    smooth_l1_loss,
)
from ._rpn import SMOOTH_L1_BETA, Proposals, Weights, has_size
from ._suppress import suppress, without_empty


# The inverse of the standard deviations of matched proposals' deltas on COCO, about 0.1 for offsets and 0.2 for sizes
# (Fast R-CNN, arXiv:1504.08083).
BOX_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)


class BoxHead(eqx.Module):
    """Two fully connected layers on a proposal's features, followed by class logits and one box per class.

    Outputs have `num_classes + 1` entries, background first, to match torchvision's weights. The background's box is
    never used.

    - `weights`: of the box coder.
    - `smooth_l1_beta`: of the box regression loss; 0 gives the L1 loss, as in Detectron2.
    - `class_agnostic`: whether all classes share one box, the only one that the last layer predicts.
    """

    fc6: eqx.nn.Linear
    fc7: eqx.nn.Linear
    class_logits: eqx.nn.Linear
    box_deltas: eqx.nn.Linear
    pool_size: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    weights: Weights = eqx.field(static=True)
    smooth_l1_beta: float = eqx.field(static=True)
    class_agnostic: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        key: PRNGKeyArray,
        pool_size: int = 7,
        hidden_size: int = 1024,
        weights: Weights = BOX_WEIGHTS,
        smooth_l1_beta: float = SMOOTH_L1_BETA,
        class_agnostic: bool = False,
    ):
        """Initialises the head.

        - `num_classes`: foreground classes.
        - `pool_size`: side of the pooled features, in bins.
        - `hidden_size`: width of the two fully connected layers.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes counts foreground classes and must be at least 1, got {num_classes}.")
        keys = jr.split(key, 4)
        self.fc6 = eqx.nn.Linear(channels * pool_size**2, hidden_size, key=keys[0])
        self.fc7 = eqx.nn.Linear(hidden_size, hidden_size, key=keys[1])
        self.class_logits = eqx.nn.Linear(hidden_size, num_classes + 1, key=keys[2])
        self.box_deltas = eqx.nn.Linear(hidden_size, _num_deltas(num_classes, class_agnostic), key=keys[3])
        self.pool_size = pool_size
        self.num_classes = num_classes
        self.weights = weights
        self.smooth_l1_beta = smooth_l1_beta
        self.class_agnostic = class_agnostic

    @property
    def stages(self) -> "tuple[BoxHead | ConvBoxHead, ...]":
        """The heads that refine a box one after another: this one alone, see `CascadeHead`."""
        return (self,)

    def __call__(self, features: Float[Array, "p c s s"]) -> tuple[Float[Array, "p k1"], Float[Array, "p k1 4"]]:
        """Returns class logits and box deltas in float32, background at index 0."""
        x = features.reshape(features.shape[0], -1)  # (p, c s s)
        x = relu(_linear(self.fc6, x))
        return _outputs(self.class_logits, self.box_deltas, relu(_linear(self.fc7, x)))


class ConvBoxHead(eqx.Module):
    """3×3 convolutions with norms and one fully connected layer, followed by the outputs of `BoxHead`.

    The box head of torchvision's second Faster R-CNN and Mask R-CNN, from Mask R-CNN with GroupNorm (arXiv:1803.08494,
    section 4.2).

    - `weights`, `smooth_l1_beta`, `class_agnostic`: as in `BoxHead`.
    """

    convs: tuple[Conv2d, ...]
    norms: tuple[Callable, ...]
    fc: eqx.nn.Linear
    class_logits: eqx.nn.Linear
    box_deltas: eqx.nn.Linear
    pool_size: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    weights: Weights = eqx.field(static=True)
    smooth_l1_beta: float = eqx.field(static=True)
    class_agnostic: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        key: PRNGKeyArray,
        pool_size: int = 7,
        hidden_size: int = 1024,
        hidden_channels: int = 256,
        depth: int = 4,
        norm: Norm = FrozenBatchNorm,
        weights: Weights = BOX_WEIGHTS,
        smooth_l1_beta: float = SMOOTH_L1_BETA,
        class_agnostic: bool = False,
    ):
        """Initialises the head.

        - `num_classes`: foreground classes.
        - `pool_size`: side of the pooled features, in bins.
        - `hidden_size`: width of the fully connected layer.
        - `hidden_channels`, `depth`: width and number of the convolutions. `norm`: the norm after each of them.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes counts foreground classes and must be at least 1, got {num_classes}.")
        keys = jr.split(key, depth + 3)
        widths = (channels,) + (hidden_channels,) * depth
        self.convs = tuple(
            Conv2d(i, o, 3, use_bias=False, key=k) for i, o, k in zip(widths[:-1], widths[1:], keys[3:], strict=True)
        )
        self.norms = tuple(norm(hidden_channels) for _ in self.convs)
        self.fc = eqx.nn.Linear(widths[-1] * pool_size**2, hidden_size, key=keys[0])
        self.class_logits = eqx.nn.Linear(hidden_size, num_classes + 1, key=keys[1])
        self.box_deltas = eqx.nn.Linear(hidden_size, _num_deltas(num_classes, class_agnostic), key=keys[2])
        self.pool_size = pool_size
        self.num_classes = num_classes
        self.weights = weights
        self.smooth_l1_beta = smooth_l1_beta
        self.class_agnostic = class_agnostic

    @property
    def stages(self) -> "tuple[BoxHead | ConvBoxHead, ...]":
        """The heads that refine a box one after another: this one alone, see `CascadeHead`."""
        return (self,)

    def __call__(self, features: Float[Array, "p c s s"]) -> tuple[Float[Array, "p k1"], Float[Array, "p k1 4"]]:
        """Returns class logits and box deltas in float32, background at index 0."""
        x = features
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.vmap(lambda x, conv=conv, norm=norm: relu(norm(conv(x))))(x)
        x = relu(_linear(self.fc, x.reshape(x.shape[0], -1)))  # (p, c, s, s) -> (p, c s s) -> (p, hidden)
        return _outputs(self.class_logits, self.box_deltas, x)


def _num_deltas(num_classes: int, class_agnostic: bool) -> int:
    return 4 if class_agnostic else 4 * (num_classes + 1)


def _outputs(
    class_logits: eqx.nn.Linear, box_deltas: eqx.nn.Linear, x: Float[Array, "p i"]
) -> tuple[Float[Array, "p k1"], Float[Array, "p k1 4"]]:
    """Class logits and box deltas of each proposal in float32."""
    logits = _linear(class_logits, x).astype(jnp.float32)  # (p, k + 1)
    deltas = _linear(box_deltas, x).astype(jnp.float32).reshape(x.shape[0], -1, 4)  # one for all classes, or one each
    return logits, jnp.broadcast_to(deltas, (*logits.shape, 4))


def _linear(layer: eqx.nn.Linear, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
    y = jnp.einsum("ni,oi->no", x, layer.weight)
    return y if layer.bias is None else y + layer.bias[None]


class SampledProposals(eqx.Module):
    """The proposals sampled for the loss, positives first.

    `matched` is the index of the object that each is matched to.
    """

    boxes: Float[Array, "s 4"]
    valid: Bool[Array, " s"]
    positive: Bool[Array, " s"]
    matched: Int32[Array, " s"]


def sample_proposals(
    proposals: Proposals,
    targets: Targets,
    *,
    key: PRNGKeyArray,
    num_samples: int = 512,
    positive_fraction: float = 0.25,
    positive_iou: float = 0.5,
) -> SampledProposals:
    """Draws a balanced sample of proposals. The objects' own boxes are added first, so that there are positives.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 20.0]])
    >>> proposals = Proposals(boxes, jnp.array([0.9, 0.8]), jnp.array([True, True]))
    >>> targets = Targets(boxes[:1] + 1, jnp.array([2]), jnp.array([True]))
    >>> sampled = sample_proposals(proposals, targets, key=jr.key(0), num_samples=4, positive_fraction=0.5)
    >>> sampled.positive.tolist(), sampled.valid.tolist()
    ([True, True, False], [True, True, True])
    """
    boxes = jnp.concatenate([proposals.boxes, targets.boxes])  # (p + n, 4)
    valid = jnp.concatenate([proposals.valid, targets.valid])
    matches = match_boxes(
        pairwise_iou(targets.boxes, boxes), targets.valid, low_threshold=positive_iou, high_threshold=positive_iou
    )
    sampled, sampled_valid = sample_balanced(
        matches.positive & valid,
        matches.negative & valid,
        num_samples=num_samples,
        positive_fraction=positive_fraction,
        key=key,
    )
    return SampledProposals(
        boxes[sampled], sampled_valid, matches.positive[sampled] & sampled_valid, matches.indices[sampled]
    )


def match_proposals(
    boxes: Float[Array, "s 4"], valid: Bool[Array, " s"], targets: Targets, *, positive_iou: float
) -> SampledProposals:
    """Matches boxes to the objects, without sampling: they keep their places, and positives may be anywhere.

    >>> boxes = jnp.array([[4.0, 4.0, 20.0, 20.0], [0.0, 0.0, 8.0, 8.0]])
    >>> targets = Targets(boxes[1:] + 1, jnp.array([2]), jnp.array([True]))
    >>> match_proposals(boxes, jnp.array([True, True]), targets, positive_iou=0.6).positive.tolist()
    [False, True]
    """
    ious = pairwise_iou(targets.boxes, boxes)
    matches = match_boxes(ious, targets.valid, low_threshold=positive_iou, high_threshold=positive_iou)
    return SampledProposals(boxes, valid, matches.positive & valid, matches.indices)


def box_loss(
    logits: Float[Array, "s k1"],
    deltas: Float[Array, "s k1 4"],
    sampled: SampledProposals,
    targets: Targets,
    *,
    weights: Weights = BOX_WEIGHTS,
    beta: float = SMOOTH_L1_BETA,
) -> dict[str, WeightedSum]:
    """Computes the classification and box losses of the sampled proposals: `loss_classifier`, `loss_box_reg`.

    Both are normalised by the number of sampled proposals, as in torchvision. Only positives contribute to the box
    loss. A label out of range raises a `ValueError`, or gives NaN in a compiled program (`Targets.check_labels`).

    - `weights`: of the box coder. `beta`: of the smooth L1 loss.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0]])
    >>> sampled = SampledProposals(boxes, jnp.array([True]), jnp.array([True]), jnp.array([0]))
    >>> targets = Targets(boxes, jnp.array([2]), jnp.array([True]))
    >>> losses = box_loss(jnp.zeros((1, 4)), jnp.zeros((1, 4, 4)), sampled, targets)  # three classes and background
    >>> {name: round(float(loss.mean()), 3) for name, loss in losses.items()}
    {'loss_classifier': 1.386, 'loss_box_reg': 0.0}
    """
    num_classes = logits.shape[1] - 1
    targets.check_labels(num_classes)
    matched = targets.labels[sampled.matched]  # (s,)
    matched = jnp.where(matched < 0, num_classes, matched)  # out of range gives NaN; -1 + 1 would be background
    labels = jnp.where(sampled.positive, matched + 1, 0)
    log_probabilities = jax.nn.log_softmax(logits)
    class_losses = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]  # -log p of each label, (s,)
    target_deltas = encode_boxes(targets.boxes[sampled.matched], sampled.boxes, weights=weights)  # (s, 4)
    predicted = jnp.take_along_axis(deltas, labels[:, None, None], axis=1)[:, 0]  # (s, k + 1, 4) -> (s, 4)
    box_losses = smooth_l1_loss(predicted, target_deltas, beta=beta).sum(axis=1)  # (s,)
    count = sampled.valid.sum().astype(jnp.float32)
    return {
        "loss_classifier": WeightedSum(jnp.where(sampled.valid, class_losses, 0.0).sum(), count),
        "loss_box_reg": WeightedSum(jnp.where(sampled.positive, box_losses, 0.0).sum(), count),
    }


def box_detections(
    logits: Float[Array, "p k1"],
    deltas: Float[Array, "p k1 4"],
    proposals: Proposals,
    image_size: Float[Array, " 2"],
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    min_size: float = 1e-2,
    weights: Weights = BOX_WEIGHTS,
) -> Detections:
    """Selects the best boxes with non-maximum suppression per class, in canvas pixels, without masks.

    A proposal yields one candidate for each class whose softmax score exceeds `score_threshold`. Boxes are clipped to
    the image, and those with a side below `min_size` pixels are dropped. All remaining candidates enter suppression.
    With a `min_size` of 0, as in Detectron2, boxes without area count as detections until `max_detections` are chosen,
    and are dropped from the result.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0]])
    >>> proposals = Proposals(boxes, jnp.array([0.9]), jnp.array([True]))
    >>> logits = jnp.array([[0.0, -9.0, 2.0]])  # background and two classes
    >>> found = box_detections(logits, jnp.zeros((1, 3, 4)), proposals, jnp.array([16.0, 16.0]), max_detections=2)
    >>> found.labels.tolist(), found.valid.tolist(), round(float(found.scores[0]), 2)
    ([1, 0], [True, False], 0.88)
    """
    if not 0 <= nms_threshold <= 1:
        raise ValueError(f"nms_threshold must be in 0..1, got {nms_threshold}.")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
    num_proposals, num_classes = logits.shape[0], logits.shape[1] - 1
    scores = jax.nn.softmax(logits)[:, 1:]  # (p, k), background removed
    boxes = decode_boxes(
        deltas[:, 1:].reshape(-1, 4), jnp.repeat(proposals.boxes, num_classes, axis=0), weights=weights
    )
    boxes = clip_boxes(boxes, image_size)
    scores = scores.reshape(-1)  # (p, k) -> (p k)
    labels = jnp.tile(jnp.arange(num_classes, dtype=jnp.int32), num_proposals)  # (p k)
    candidates = jnp.repeat(proposals.valid, num_classes) & (scores > score_threshold) & has_size(boxes, min_size)
    found = suppress(boxes, scores, labels, candidates, nms_threshold=nms_threshold, max_detections=max_detections)
    return without_empty(found) if min_size <= 0 else found
