"""How the queries of Deformable DETR begin: as parameters, or at the best cells of its encoder."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import LayerNorm, ReLUMLP, linear, sine_embedding, xavier_linear
from ..ops import upcast
from ._decoder import EPSILON
from ._maps import Maps
from ._queries import Queries, box_deltas, rare_classes


# The nearest that coordinates come to 0 and 1 before their logits are taken.
MARGIN = 1e-5


class Start(NamedTuple):
    """Queries before the decoder.

    - `positions`: added to the queries in each attention. `features`: what they are at first.
    - `boxes`: where they look at first, points `xy` or boxes `cxcywh` relative to the image.
    - `cells`: the predictions for all cells among which they were chosen.
    """

    positions: Float[Array, "q c"]
    features: Float[Array, "q c"]
    boxes: Float[Array, "q _"]
    cells: Queries | None = None


class LearnedQueries(eqx.Module):
    """Queries that are the same for all images.

    - `table`: the positions of the queries, followed by what they are at first.
    - `references`: the point at which a query looks, by its position.
    """

    table: eqx.nn.Embedding
    references: eqx.nn.Linear

    def __init__(self, channels: int, count: int, *, key: PRNGKeyArray):
        """Initialises `count` queries."""
        keys = jr.split(key)
        self.table = eqx.nn.Embedding(count, 2 * channels, key=keys[0])
        self.references = xavier_linear(channels, 2, key=keys[1])

    def __call__(self, maps: Maps, cells: Float[Array, "n c"]) -> Start:
        """Returns the queries, whatever the cells are."""
        positions, features = jnp.split(self.table.weight, 2, axis=1)
        return Start(positions, features, jax.nn.sigmoid(upcast(linear(self.references, positions))))


class CellQueries(eqx.Module):
    """Queries at the `count` cells whose first logit is the highest: the first of two stages.

    - `projection`, `norm`: of the cells.
    - `class_logits`, `deltas`: predictions for each, boxes as deltas to the logits of a box around the cell. The first
      class stands for objects of all classes, the others are not used, as in the original.
    - `positions`, `positions_norm`: of sines and cosines of the boxes, to positions and what queries are at first.
    """

    projection: eqx.nn.Linear
    norm: LayerNorm
    class_logits: eqx.nn.Linear
    deltas: ReLUMLP
    positions: eqx.nn.Linear
    positions_norm: LayerNorm
    count: int = eqx.field(static=True)

    def __init__(self, channels: int, num_classes: int, count: int, *, key: PRNGKeyArray):
        """Initialises the stage. `count`: of queries."""
        keys = jr.split(key, 4)
        self.projection = xavier_linear(channels, channels, key=keys[0])
        self.norm = LayerNorm(channels, eps=EPSILON)
        self.class_logits = rare_classes(channels, num_classes, key=keys[1])
        self.deltas = box_deltas(channels, key=keys[2])
        self.positions = xavier_linear(2 * channels, 2 * channels, key=keys[3])
        self.positions_norm = LayerNorm(2 * channels, eps=EPSILON)
        self.count = count

    def __call__(self, maps: Maps, cells: Float[Array, "n c"]) -> Start:
        """Returns the queries, of which there are fewer than `count` if there are fewer cells."""
        predicted = self._predict(maps, cells)
        _, best = lax.top_k(lax.stop_gradient(predicted.logits[:, 0]), min(self.count, len(cells)))
        boxes = lax.stop_gradient(predicted.boxes_cxcywh[best])
        sines = sine_embedding(boxes, cells.shape[1] // 2).reshape(len(boxes), -1).astype(cells.dtype)  # (q, 2 c)
        placed = self.positions_norm(linear(self.positions, sines))
        positions, features = jnp.split(placed, 2, axis=1)
        return Start(positions, features, boxes, predicted)

    def _predict(self, maps: Maps, cells: Float[Array, "n c"]) -> Queries:
        """The predictions for all cells. Those without a proposal count as zeros, and their boxes as all ones."""
        proposals, used = maps.proposals()
        features = self.norm(linear(self.projection, jnp.where(used[:, None], cells, 0)))
        boxes = move_boxes(proposals, self.deltas(features))
        boxes = jnp.where(used[:, None], boxes, jnp.ones_like(boxes))
        return Queries(features, linear(self.class_logits, features), boxes)


def move_boxes(references: Float[Array, "q n"], deltas: Float[Array, "q 4"]) -> Float[Array, "q 4"]:
    """The boxes `cxcywh` whose logits are `deltas` more than those of `references`, which are boxes or points `xy`.

    Computes in float32 or higher.

    >>> move_boxes(jnp.array([[0.5, 0.5]]), jnp.zeros((1, 4))).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    references, deltas = upcast(references), upcast(deltas)
    logits = jnp.log(jnp.maximum(references, MARGIN)) - jnp.log(jnp.maximum(1 - references, MARGIN))
    missing = deltas.shape[1] - logits.shape[1]
    return jax.nn.sigmoid(deltas + jnp.pad(logits, ((0, 0), (0, missing))))
