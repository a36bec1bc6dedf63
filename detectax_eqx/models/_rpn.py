"""Region proposal network (arXiv:1506.01497) on a feature pyramid: head, proposals, sampling and loss."""

from collections.abc import Sequence
from itertools import accumulate

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jax import lax
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from .._types import Targets, WeightedSum
from ..nn import Conv2d, conv2d, relu
from ..ops import (
    anchor_grid,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match_boxes,
    nms_indices,
    pairwise_iou,
    sample_balanced,
    smooth_l1_loss,
)


# torchvision's anchors: sides in canvas pixels, one tuple per pyramid level, and height / width.
ANCHOR_SIZES = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
ASPECT_RATIOS = (0.5, 1.0, 2.0)
# Deltas of anchors are not scaled, as in torchvision and Detectron2. `SMOOTH_L1_BETA` is torchvision's.
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
SMOOTH_L1_BETA = 1 / 9
Weights = tuple[float, float, float, float]


class RPNOutput(eqx.Module):
    """The head's raw predictions for the anchors of every level, in `anchor_grid`'s order.

    - `logits`: objectness of each anchor.
    - `deltas`: refine anchors to boxes (`decode_boxes`).
    - `anchors`: in canvas pixels.
    """

    logits: tuple[Float[Array, "*b _"], ...]
    deltas: tuple[Float[Array, "*b _ 4"], ...]
    anchors: tuple[Float[Array, "_ 4"], ...]


class Proposals(eqx.Module):
    """Class-agnostic boxes in canvas pixels, best first, with objectness scores in 0..1."""

    boxes: Float[Array, "*b p 4"]
    scores: Float[Array, "*b p"]
    valid: Bool[Array, "*b p"]


class RPN(eqx.Module):
    """3×3 convolutions and two 1×1 output convolutions, shared by all levels, and the anchors they refer to.

    - `weights`: of the box coder.
    - `smooth_l1_beta`: of the box regression loss; 0 gives the L1 loss, as in Detectron2.
    - `rounded_anchors`: whether the sides of anchors are whole pixels, as in torchvision but not in Detectron2.
    - `anchor_strides`: distance in pixels between anchors for each level, as in Detectron2. `None` for torchvision's:
      the integer quotient of the canvas's and the map's side, which is not 64 for a P6 above a P5 of odd size.
    """

    convs: tuple[Conv2d, ...]
    objectness: Conv2d
    deltas: Conv2d
    anchor_sizes: tuple[tuple[float, ...], ...] = eqx.field(static=True)
    aspect_ratios: tuple[float, ...] = eqx.field(static=True)
    weights: Weights = eqx.field(static=True)
    smooth_l1_beta: float = eqx.field(static=True)
    rounded_anchors: bool = eqx.field(static=True)
    anchor_strides: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        *,
        key: PRNGKeyArray,
        anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
        aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
        depth: int = 1,
        weights: Weights = RPN_WEIGHTS,
        smooth_l1_beta: float = SMOOTH_L1_BETA,
        rounded_anchors: bool = True,
        anchor_strides: tuple[int, ...] | None = None,
    ):
        """Initialises the head.

        - `anchor_sizes`: side lengths in canvas pixels, one tuple per level; `aspect_ratios`: height / width.
        - `depth`: number of 3×3 convolutions.
        """
        counts = {len(sizes) for sizes in anchor_sizes}
        if len(counts) != 1:
            raise ValueError(f"anchor_sizes must have the same number of sizes for each level, got {anchor_sizes}.")
        if anchor_strides is not None and len(anchor_strides) != len(anchor_sizes):
            raise ValueError(f"anchor_strides must have one stride for each level, got {anchor_strides}.")
        num_anchors = counts.pop() * len(aspect_ratios)
        conv_key, *keys = jr.split(key, 3)
        conv_keys = [conv_key] if depth == 1 else jr.split(conv_key, depth)
        init = normal(0.01)
        self.convs = tuple(Conv2d(channels, channels, 3, init=init, key=k) for k in conv_keys)
        self.objectness = Conv2d(channels, num_anchors, 1, init=init, key=keys[0])
        self.deltas = Conv2d(channels, 4 * num_anchors, 1, init=init, key=keys[1])
        self.anchor_sizes = anchor_sizes
        self.aspect_ratios = aspect_ratios
        self.weights = weights
        self.smooth_l1_beta = smooth_l1_beta
        self.rounded_anchors = rounded_anchors
        self.anchor_strides = anchor_strides

    def __call__(self, features: Sequence[Float[Array, "c _ _"]], canvas: tuple[int, int]) -> RPNOutput:
        """Returns predictions at all anchors for an image on a canvas of `(height, width)` pixels."""
        if len(features) != len(self.anchor_sizes):
            raise ValueError(f"anchor_sizes has {len(self.anchor_sizes)} levels, but the backbone has {len(features)}.")
        logits, deltas, anchors = [], [], []
        strides = anchor_strides(features, canvas, self.anchor_strides)
        for feature, stride, sizes in zip(features, strides, self.anchor_sizes, strict=True):
            size = feature.shape[1], feature.shape[2]
            level_logits, level_deltas = self._at_cells(feature)
            logits.append(level_logits)
            deltas.append(level_deltas)
            options = {"aspect_ratios": self.aspect_ratios, "rounded": self.rounded_anchors}
            anchors.append(anchor_grid(size, stride=stride, sizes=sizes, **options))
        return RPNOutput(tuple(logits), tuple(deltas), tuple(anchors))

    def _at_cells(self, x: Float[Array, "c h w"]) -> tuple[Float[Array, " a"], Float[Array, "a 4"]]:
        """Returns the logits and deltas of all anchors of a level."""
        for conv in self.convs:
            x = relu(conv(x))
        logits = rearrange(self.objectness(x), "a h w -> (h w a)").astype(jnp.float32)
        return logits, rearrange(self.deltas(x), "(a d) h w -> (h w a) d", d=4).astype(jnp.float32)

    def at_anchors(
        self, features: Sequence[Float[Array, "c _ _"]], indices: Int32[Array, " s"]
    ) -> tuple[Float[Array, " s"], Float[Array, "s 4"]]:
        """Returns the logits and deltas of the anchors at `indices`, which count all levels concatenated.

        These equal the predictions of `__call__`, but are computed only from the feature patches in the receptive field
        of each anchor. A loss samples a few hundred of a few hundred thousand anchors; this way the
        cost of its gradient depends only on the sampled ones. If their patches together are larger than the maps, the
        predictions at all anchors are computed instead.
        """
        # Outputs of all convolutions: a patch shrinks by two cells per side and convolution, to one cell.
        of_patches = indices.shape[0] * sum((2 * k + 1) ** 2 for k in range(len(self.convs)))
        of_maps = sum(x.shape[1] * x.shape[2] for x in features) * len(self.convs)
        if of_patches > of_maps:
            logits, deltas = map(jnp.concatenate, zip(*map(self._at_cells, features), strict=True))
            return logits[indices], deltas[indices]
        return self._at_patches(features, indices)

    def _at_patches(
        self, features: Sequence[Float[Array, "c _ _"]], indices: Int32[Array, " s"]
    ) -> tuple[Float[Array, " s"], Float[Array, "s 4"]]:
        """Computes `at_anchors` from one patch of features per anchor."""
        border = len(self.convs)  # cells of a patch on each side of its centre
        padded = [jnp.pad(x, ((0, 0), (border, border), (border, border))) for x in features]
        cells = jnp.concatenate([rearrange(x, "c h w -> (h w) c") for x in padded])  # (cells of all levels, c)
        sizes, padded_sizes = ([x.shape[1:] for x in maps] for maps in (features, padded))
        height, width = (jnp.array(sides, jnp.int32) for sides in zip(*sizes, strict=True))
        padded_width = jnp.array([w for _, w in padded_sizes], jnp.int32)
        first, padded_first = (
            jnp.array([0, *accumulate(h * w for h, w in maps[:-1])], jnp.int32) for maps in (sizes, padded_sizes)
        )

        num_anchors = self.objectness.weight.shape[0]
        pixel, anchor = indices // num_anchors, indices % num_anchors  # index = cell * anchors per cell + anchor
        level = jnp.searchsorted(first, pixel, side="right").astype(jnp.int32) - 1  # (s,)
        row, column = jnp.divmod(pixel - first[level], width[level])
        taps = jnp.arange(2 * border + 1, dtype=jnp.int32)
        rows, columns = row[:, None] + taps[None], column[:, None] + taps[None]  # (s, 2 border + 1), in the padded map
        patch = padded_first[level][:, None, None] + rows[:, :, None] * padded_width[level][:, None, None]
        patch = patch + columns[:, None, :]  # (s, rows, columns), indices into cells
        x = cells.at[patch].get(mode="promise_in_bounds")  # (s, rows, columns, c)

        for conv in self.convs[:-1]:
            x = relu(jax.vmap(lambda x, conv=conv: _valid(conv, x))(x))
            border, rows, columns = border - 1, rows[:, 1:-1], columns[:, 1:-1]
            # The next convolution pads with zeros: discard this one's outputs outside the map.
            start = len(self.convs)
            inside_rows = (rows >= start) & (rows < start + height[level][:, None])
            inside_columns = (columns >= start) & (columns < start + width[level][:, None])
            x = jnp.where((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], x, 0)
        conv = self.convs[-1]
        hidden = relu(_with_bias(jnp.einsum("shwi,oihw->so", x, conv.weight), conv))
        logits = _with_bias(hidden @ self.objectness.weight[:, :, 0, 0].T, self.objectness)
        deltas = _with_bias(hidden @ self.deltas.weight[:, :, 0, 0].T, self.deltas).reshape(-1, num_anchors, 4)
        each = jnp.arange(indices.shape[0])
        return logits[each, anchor].astype(jnp.float32), deltas[each, anchor].astype(jnp.float32)


def _valid(conv: Conv2d, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
    """Applies a convolution without padding, channels last."""
    return conv2d(x.transpose(2, 0, 1), conv.weight, conv.bias).transpose(1, 2, 0)


def _with_bias(x: Float[Array, "s o"], conv: Conv2d) -> Float[Array, "s o"]:
    return x if conv.bias is None else x + conv.bias[None]


def anchor_strides(
    features: Sequence[Float[Array, "c _ _"]], canvas: tuple[int, int], strides: tuple[int, ...] | None
) -> list[tuple[int, int]]:
    """The vertical and horizontal distance between the anchors of each level; `strides`: see `RPN.anchor_strides`."""
    if strides is not None:
        return [(stride, stride) for stride in strides]
    return [(canvas[0] // x.shape[1], canvas[1] // x.shape[2]) for x in features]


class SampledAnchors(eqx.Module):
    """The anchors sampled for the loss, positives first.

    `indices` count the anchors of all levels concatenated. `matched` is the index of each one's matched object.
    """

    indices: Int32[Array, " s"]
    boxes: Float[Array, "s 4"]
    valid: Bool[Array, " s"]
    positive: Bool[Array, " s"]
    matched: Int32[Array, " s"]


def propose(
    output: RPNOutput,
    image_size: Float[Array, " 2"],
    *,
    pre_nms_top_n: int = 1000,
    post_nms_top_n: int = 1000,
    nms_threshold: float = 0.7,
    score_threshold: float = 0.0,
    min_size: float = 1e-3,
    rank_by_logits: bool = False,
    weights: Weights = RPN_WEIGHTS,
) -> Proposals:
    """Selects the best boxes of all levels with non-maximum suppression per level, without gradient.

    - `image_size`: `(height, width)` of the image on its canvas. Boxes are clipped to it, and those without area or
      with a side below `min_size` pixels are dropped.
    - `pre_nms_top_n`: number of candidates per level. Those with a score below `score_threshold` are dropped.
    - `post_nms_top_n`: number of boxes over all levels, the capacity of the result.
    - `rank_by_logits`: whether boxes are ranked by their logits rather than their scores, which are equal from a logit
      of 17 on.
    - `weights`: of the box coder.

    Rule and defaults are torchvision's, which uses 2000 and 2000 during training. Detectron2 ranks by logits, has a
    `min_size` of 0, and uses 2000 and 1000 during training.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 20.0]])
    >>> output = RPNOutput((jnp.array([2.0, -1.0]),), (jnp.zeros((2, 4)),), (boxes,))
    >>> propose(output, jnp.array([16.0, 16.0])).boxes.tolist()
    [[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 16.0, 16.0]]
    """
    if not 0 <= nms_threshold <= 1:
        raise ValueError(f"nms_threshold must be in 0..1, got {nms_threshold}.")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}.")
    if pre_nms_top_n < 1 or post_nms_top_n < 1:
        raise ValueError(
            f"pre_nms_top_n and post_nms_top_n must be at least 1, got {pre_nms_top_n} and {post_nms_top_n}."
        )
    boxes, scores, ranks, valid = [], [], [], []
    for logits, deltas, anchors in zip(output.logits, output.deltas, output.anchors, strict=True):
        # (t,), t = min(pre_nms_top_n, a)
        top_logits, top = lax.top_k(lax.stop_gradient(logits), min(pre_nms_top_n, logits.shape[0]))
        level_boxes = decode_boxes(lax.stop_gradient(deltas)[top], anchors[top], weights=weights)  # (t, 4)
        level_boxes = clip_boxes(level_boxes, image_size)
        level_scores = jax.nn.sigmoid(top_logits)
        level_ranks = top_logits if rank_by_logits else level_scores
        keep, keep_valid = nms_indices(
            level_boxes,
            level_ranks,
            has_area(level_boxes) & has_size(level_boxes, min_size) & (level_scores >= score_threshold),
            iou_threshold=nms_threshold,
            max_outputs=top.shape[0],
        )
        boxes.append(level_boxes[keep])
        scores.append(level_scores[keep])
        ranks.append(level_ranks[keep])
        valid.append(keep_valid)
    boxes, scores, ranks, valid = map(jnp.concatenate, (boxes, scores, ranks, valid))
    _, best = lax.top_k(jnp.where(valid, ranks, -jnp.inf), min(post_nms_top_n, scores.shape[0]))
    return Proposals(boxes[best], jnp.where(valid[best], scores[best], 0.0), valid[best])


def sample_anchors(
    anchors: Sequence[Float[Array, "_ 4"]],
    targets: Targets,
    *,
    key: PRNGKeyArray,
    num_samples: int = 256,
    positive_fraction: float = 0.5,
    positive_iou: float = 0.7,
    negative_iou: float = 0.3,
) -> SampledAnchors:
    """Draws a balanced sample of the anchors of all levels.

    An anchor is positive if its IoU with an object is at least `positive_iou`, or the highest of all anchors with that
    object. It is negative if its IoU with all objects is below `negative_iou`.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 20.0]])
    >>> targets = Targets(boxes[:1], jnp.array([2]), jnp.array([True]))
    >>> sampled = sample_anchors([boxes], targets, key=jr.key(0))
    >>> sampled.indices.tolist(), sampled.positive.tolist()
    ([0, 1], [True, False])
    """
    if not negative_iou <= positive_iou:
        raise ValueError(f"negative_iou must be at most positive_iou, got {negative_iou} and {positive_iou}.")
    boxes = jnp.concatenate(anchors)
    matches = match_boxes(
        pairwise_iou(targets.boxes, boxes),
        targets.valid,
        low_threshold=negative_iou,
        high_threshold=positive_iou,
        allow_low_quality=True,
    )
    sampled, valid = sample_balanced(
        matches.positive, matches.negative, num_samples=num_samples, positive_fraction=positive_fraction, key=key
    )
    return SampledAnchors(sampled, boxes[sampled], valid, matches.positive[sampled] & valid, matches.indices[sampled])


def rpn_loss(
    logits: Float[Array, " s"],
    deltas: Float[Array, "s 4"],
    sampled: SampledAnchors,
    targets: Targets,
    *,
    weights: Weights = RPN_WEIGHTS,
    beta: float = SMOOTH_L1_BETA,
    normalizer: float | None = None,
) -> dict[str, WeightedSum]:
    """Computes the objectness and box losses of the sampled anchors: `loss_objectness`, `loss_rpn_box_reg`.

    Only positives contribute to the box loss.

    - `weights`: of the box coder. `beta`: of the smooth L1 loss.
    - `normalizer`: the number per image by which both are divided. By default, the number of sampled anchors, as in
      torchvision. Detectron2 divides by the number that it tries to sample, 256.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 20.0]])
    >>> targets = Targets(boxes[:1], jnp.array([2]), jnp.array([True]))
    >>> sampled = sample_anchors([boxes], targets, key=jr.key(0))
    >>> losses = rpn_loss(jnp.array([2.0, -1.0]), jnp.zeros((2, 4)), sampled, targets)
    >>> {name: round(float(loss.mean()), 3) for name, loss in losses.items()}
    {'loss_objectness': 0.22, 'loss_rpn_box_reg': 0.0}
    """
    target_deltas = encode_boxes(targets.boxes[sampled.matched], sampled.boxes, weights=weights)  # (s, 4)
    box_losses = smooth_l1_loss(deltas, target_deltas, beta=beta).sum(axis=1)  # (s,)
    logit_losses = binary_cross_entropy(logits, sampled.positive.astype(jnp.float32))  # (s,)
    count = sampled.valid.sum().astype(jnp.float32) if normalizer is None else jnp.asarray(normalizer, jnp.float32)
    return {
        "loss_objectness": WeightedSum(jnp.where(sampled.valid, logit_losses, 0.0).sum(), count),
        "loss_rpn_box_reg": WeightedSum(jnp.where(sampled.positive, box_losses, 0.0).sum(), count),
    }


def binary_cross_entropy(logits: Float[Array, "*s"], targets: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Computes the elementwise cross entropy of sigmoid logits with targets in 0..1."""
    return jax.nn.softplus(logits) - targets * logits  # log(1 + eˣ) - t x = -t log σ(x) - (1 - t) log(1 - σ(x))


def has_size(boxes: Float[Array, "*n 4"], min_size: float) -> Bool[Array, "*n"]:
    """Whether both sides of each box are at least `min_size` pixels."""
    return (boxes[..., 2] - boxes[..., 0] >= min_size) & (boxes[..., 3] - boxes[..., 1] >= min_size)


def has_area(boxes: Float[Array, "*n 4"]) -> Bool[Array, "*n"]:
    """Whether both sides of each box are longer than 0."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
