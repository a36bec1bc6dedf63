"""Queries of detection transformers: their choice from grid proposals, and the detections among their predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float64, Int32, PRNGKeyArray

from .._types import Detections
from ..nn import LayerNorm, ReLUMLP, linear, xavier_linear
from ..ops import clip_boxes, cxcywh_to_xyxy, upcast
from ._decoder import EPSILON, refine_boxes
from ._dense import PRIOR


# Side of a proposal of the first level relative to the image; proposals nearer than the margin to the image's edge are
# not used (Deformable DETR, appendix A.4).
PROPOSAL_SIDE = 0.05
MARGIN = 0.01


@dataclass(frozen=True)
class QuerySelection:
    """Which predictions a detection transformer keeps: those with the highest scores.

    In DETR, each query is of its most probable class; in others, it may be detected as several.

    - `score_threshold`: score in 0..1 above which detections are kept.
    - `max_detections`: maximum number of detections per image.
    """

    score_threshold: float = 0.0
    max_detections: int = 300


# `(height, width)` to which boxes are relative: a canvas, or the image on it.
Frame = tuple[int, int] | Int32[Array, " 2"]


class Queries(NamedTuple):
    """Predictions of `q` queries: features, logits of `k` classes, and boxes relative to the image in 0..1."""

    features: Float[Array, "*b q c"]
    logits: Float[Array, "*b q k"]
    boxes_cxcywh: Float[Array, "*b q 4"]


class QueryTable(eqx.Module):
    """What the queries of `g` groups are at first: features, and boxes as deltas to those of the first stage."""

    features: Float[Array, "g q c"]
    boxes: Float[Array, "g q 4"]

    def __init__(self, groups: int, count: int, channels: int, *, key: PRNGKeyArray):
        self.features = jr.normal(key, (groups, count, channels))
        self.boxes = jnp.zeros((groups, count, 4))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.boxes.shape[0]

    @property
    def count(self) -> int:
        """Number of queries in a group."""
        return self.boxes.shape[1]


class QueryHead(eqx.Module):
    """Chooses queries among the cells of a map, by the highest logit of the class that each cell predicts.

    The first stage of a two-stage detection transformer (Deformable DETR, arXiv:2010.04159, section 4.2).
    """

    projection: eqx.nn.Linear
    norm: LayerNorm
    class_logits: eqx.nn.Linear
    deltas: ReLUMLP

    def __init__(self, channels: int, num_classes: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.projection = xavier_linear(channels, channels, key=keys[0])
        self.norm = LayerNorm(channels, eps=EPSILON)
        self.class_logits = rare_classes(channels, num_classes, key=keys[1])
        self.deltas = box_deltas(channels, key=keys[2])

    def __call__(
        self, cells: Float[Array, "n c"], proposals: Float[Array, "n 4"], used: Bool[Array, " n"], *, count: int
    ) -> Queries:
        """Returns the predictions of the `count` best cells, or of all if there are fewer.

        - `proposals`: `cxcywh` relative to the image. Those that are not `used` count as zeros, and so do their cells.
        """
        cells = jnp.where(used[:, None], cells, 0)
        proposals = jnp.where(used[:, None], proposals, 0)
        features = self.norm(linear(self.projection, cells))
        logits = linear(self.class_logits, features)
        _, best = lax.top_k(lax.stop_gradient(logits.max(axis=1)), min(count, len(cells)))
        features = features[best]
        boxes = refine_boxes(proposals[best], self.deltas(features))
        return Queries(features, logits[best], boxes)


def rare_classes(channels: int, num_classes: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A linear layer whose classes have a probability of `PRIOR` where the features contribute nothing."""
    layer = eqx.nn.Linear(channels, num_classes, key=key)
    bias = jnp.full(num_classes, np.log(PRIOR / (1 - PRIOR)), layer.weight.dtype)
    return eqx.tree_at(lambda tree: tree.bias, layer, bias)


def box_deltas(channels: int, *, key: PRNGKeyArray) -> ReLUMLP:
    """Three layers that leave boxes where they are at first."""
    mlp = ReLUMLP(channels, channels, 4, depth=3, key=key)
    last = jax.tree.map(jnp.zeros_like, mlp.layers[-1])
    return eqx.tree_at(lambda tree: tree.layers[-1], mlp, last)


def grid_proposals(
    grid: tuple[int, int], *, level: int = 0
) -> tuple[Float64[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Returns a box `cxcywh` for each cell of a grid `(h, w)` relative to the image, and which of them are used.

    Computed on the host, in double precision. Boxes are centred in their cells, in row-major order. Their sides double
    with each level.

    >>> boxes, used = grid_proposals((1, 2))
    >>> boxes[:, :2].tolist(), used.tolist()
    ([[0.25, 0.5], [0.75, 0.5]], [True, True])
    """
    y, x = np.meshgrid(*((np.arange(side) + 0.5) / side for side in grid), indexing="ij")
    side = np.full_like(x, PROPOSAL_SIDE * 2**level)
    boxes = np.stack([x, y, side, side], axis=-1).reshape(-1, 4)
    return boxes, np.all((boxes > MARGIN) & (boxes < 1 - MARGIN), axis=1)


def corners_of(boxes_cxcywh: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    """Returns the corners `xyxy` of boxes; negative sides, which queries without a proposal may have, count as 0.

    >>> corners_of(jnp.array([[2.0, 2.0, 2.0, -1.0]])).tolist()
    [[1.0, 2.0, 3.0, 2.0]]
    """
    centres, sides = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:]
    # As torch's `clamp`, and unlike `maximum`, this has a gradient of 1 at 0, where the boxes of new queries begin.
    return cxcywh_to_xyxy(jnp.concatenate([centres, jnp.where(sides < 0, jnp.zeros_like(sides), sides)], axis=1))


def best_pairs(
    logits: Float[Array, "q k"], count: int
) -> tuple[Float[Array, " n"], Int32[Array, " n"], Int32[Array, " n"]]:
    """Returns the scores, queries and classes of the `count` pairs with the highest logits; ties go to the first pair.

    >>> best_pairs(jnp.array([[0.0, 2.0], [1.0, -1.0]]), 2)[1:]
    (Array([0, 1], dtype=int32), Array([1, 0], dtype=int32))
    """
    scores = jax.nn.sigmoid(upcast(logits)).reshape(-1)
    best, pairs = lax.top_k(scores, min(count, len(scores)))
    return best, pairs // logits.shape[1], pairs % logits.shape[1]


def best_queries(
    logits: Float[Array, "q k"], count: int
) -> tuple[Float[Array, " n"], Int32[Array, " n"], Int32[Array, " n"]]:
    """Returns the scores, queries and classes of the `count` queries whose most probable class has the highest scores.

    The last class, "no object", is none of them, but has its share of the probability. Ties go to the first query.

    >>> best_queries(jnp.array([[0.0, 2.0, 5.0], [3.0, 1.0, 0.0]]), 2)[1:]
    (Array([1, 0], dtype=int32), Array([0, 1], dtype=int32))
    """
    scores = jax.nn.softmax(upcast(logits), axis=1)[:, :-1]
    best, queries = lax.top_k(scores.max(axis=1), min(count, len(scores)))
    return best, queries, jnp.argmax(scores[queries], axis=1).astype(jnp.int32)


def sides_of(frame: Frame, dtype: DTypeLike) -> Float[Array, " 4"]:
    """`(width, height, width, height)`, by which relative boxes are multiplied."""
    return jnp.array([frame[1], frame[0]] * 2, dtype)


def query_detections(
    predicted: Queries,
    frame: Frame,
    selection: QuerySelection,
    *,
    best: Callable[..., tuple[Float[Array, " n"], Int32[Array, " n"], Int32[Array, " n"]]] = best_pairs,
    clip: Int32[Array, " 2"] | None = None,
) -> tuple[Detections, Int32[Array, " n"]]:
    """Selects detections, in canvas pixels, and returns the query of each.

    - `frame`: `(height, width)` to which the boxes are relative. `best`: `best_pairs` or `best_queries`.
    - `clip`: `(height, width)` to which boxes are clipped; `None` for not at all.
    """
    scores, queries, labels = best(predicted.logits, selection.max_detections)
    scale = sides_of(frame, predicted.boxes_cxcywh.dtype)
    boxes = corners_of(predicted.boxes_cxcywh[queries]) * scale[None]
    boxes = boxes if clip is None else clip_boxes(boxes, clip.astype(scale.dtype))
    return Detections(boxes, scores, labels, scores > selection.score_threshold), queries
