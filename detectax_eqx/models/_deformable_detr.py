"""Deformable DETR (arXiv:2010.04159): a detection transformer that looks at a few points of maps of several sizes."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, DeformableAttention, ReLUMLP, linear, sine_positions, xavier_linear
from ..ops import upcast
from ._decoder import DecoderLayer, EncoderLayer, new_layers
from ._detector import AbstractDetector
from ._detr import DETR_PREPROCESSING, cells_of
from ._preprocessing import Preprocessing
from ._queries import Queries, QuerySelection, box_deltas, query_detections, rare_classes
from ._set_loss import SetWeights, binary_focal_loss, focal_cost, match_sets, matching_cost, set_losses


# The nearest that coordinates come to 0 and 1 before their logits are taken.
MARGIN = 1e-5
# The initial logits of the sides of boxes.
SIDE = -2.0


class Maps(eqx.Module):
    """Cells of `l` maps, one after another, and where they are.

    - `references`: the middle of each cell, `xy` in each of the maps. `positions`: embeddings of it and of the level.
    - `valid`: the cells of each map that the image fills. `shares`: the parts of the maps' sides that it fills, `xy`.
    """

    cells: Float[Array, "n c"]
    positions: Float[Array, "n c"]
    references: Float[Array, "n l 2"]
    valid: tuple[Bool[Array, "_ _"], ...]
    shares: Float[Array, "l 2"]

    def split(self, cells: Float[Array, "n c"]) -> list[Float[Array, "c _ _"]]:
        """The maps that consist of `cells`."""
        ends = list(accumulate(mask.size for mask in self.valid))
        parts = jnp.split(cells, ends[:-1])
        return [rearrange(x, "(h w) c -> c h w", h=len(mask)) for x, mask in zip(parts, self.valid, strict=True)]


class DeformableDETR(AbstractDetector[QuerySelection]):
    """A detection transformer: an encoder of the cells of several maps, and a decoder of queries.

    `deformable_detr` builds one.

    - `levels`: what is added to the positions of the cells of each map.
    - `queries`: the positions of the queries, followed by what they are at first. `references`: the point at which a
      query looks, by its position.
    - `class_logits`, `deltas`: the predictions of the layers of the decoder: one of each for all layers, or one for
      each. In the latter case, a layer looks near the boxes of the layer before it ("iterative refinement").
    - `preprocessing`, `selection`, `matching`, `loss_weights`: static options.

    Boxes are relative to the image, and not clipped to it. Cells of the padding are not attended to. The canvas has any
    size, so that an image need not be padded. The dropout of the original's training is left out.
    """

    backbone: Backbone
    levels: Float[Array, "l c"]
    encoder: tuple[EncoderLayer, ...]
    queries: eqx.nn.Embedding
    references: eqx.nn.Linear
    decoder: tuple[DecoderLayer, ...]
    class_logits: tuple[eqx.nn.Linear, ...]
    deltas: tuple[ReLUMLP, ...]
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=DETR_PREPROCESSING)
    selection: QuerySelection = eqx.field(static=True, kw_only=True, default=QuerySelection(max_detections=100))
    matching: SetWeights = eqx.field(static=True, kw_only=True, default=SetWeights())
    loss_weights: SetWeights = eqx.field(static=True, kw_only=True, default=SetWeights())

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits[0].weight.shape[0]

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: QuerySelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`. A query may be detected as several classes."""
        last = jax.tree.map(lambda x: x[-1], self._predict(image, canvas_size))
        return query_detections(last, canvas_size, selection or self.selection)[0]

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `loss_class`, `loss_l1` and `loss_giou`, weighted and summed over all layers of the decoder.

        Divided by the number of objects of the batch. `key` is for the backbone.
        """
        targets.check_labels(self.num_classes)
        predicted = self._predict(image, canvas_size, key=key)
        cost = partial(matching_cost, weights=self.matching, class_cost=focal_cost)
        matched = match_sets([jax.vmap(lambda one: cost(one, targets, canvas_size))(predicted)], targets)
        count = targets.valid.sum().astype(jnp.float32)
        return set_losses(
            [predicted], matched, targets, canvas_size, self.loss_weights, count, class_loss=binary_focal_loss
        )

    def _predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> Queries:
        """The predictions of all layers of the decoder, `(l q …)`."""
        levels = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
        maps = place(levels, (image.shape[0], image.shape[1]), canvas_size, self.levels)
        x = maps.cells
        for layer in self.encoder:
            x = layer(x, maps.positions, maps.references, maps.split(x), maps.valid)
        features = maps.split(x)
        positions, queries = jnp.split(self.queries.weight, 2, axis=1)
        boxes = jax.nn.sigmoid(upcast(linear(self.references, positions)))  # points at first
        outputs = []
        for i, layer in enumerate(self.decoder):
            shares = jnp.tile(maps.shares, (1, boxes.shape[1] // 2))
            queries = layer(queries, positions, boxes[:, None] * shares[None], features, maps.valid)
            head = min(i, len(self.deltas) - 1)
            moved = move_boxes(boxes, self.deltas[head](queries))
            outputs.append(Queries(queries, linear(self.class_logits[head], queries), moved))
            if len(self.deltas) > 1:
                boxes = jax.lax.stop_gradient(moved)
        return jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


def place(
    levels: Sequence[Float[Array, "c _ _"]],
    canvas: tuple[int, int],
    canvas_size: Int32[Array, " 2"],
    embeddings: Float[Array, "l c"],
) -> Maps:
    """Flattens the maps of an image on a canvas. `embeddings`: of the levels."""
    dtype, channels = upcast(levels[0]).dtype, embeddings.shape[1]
    valid, shares, positions, middles = [], [], [], []
    for x, embedding in zip(levels, embeddings, strict=True):
        grid = (x.shape[1], x.shape[2])
        mask, size = cells_of(canvas, canvas_size, grid)
        at = sine_positions(grid, channels, size=size, centred=True, dtype=dtype).astype(x.dtype)
        sides = size.astype(dtype)
        rows, columns = ((jnp.arange(side, dtype=dtype) + 0.5) / sides[i] for i, side in enumerate(grid))
        valid.append(mask)
        shares.append(sides[::-1] / jnp.array(grid[::-1], dtype))
        positions.append(rearrange(at, "c h w -> (h w) c") + embedding[None])
        middles.append(jnp.stack([jnp.tile(columns, grid[0]), jnp.repeat(rows, grid[1])], axis=1))
    parts = jnp.stack(shares)
    return Maps(
        jnp.concatenate([rearrange(x, "c h w -> (h w) c") for x in levels]),
        jnp.concatenate(positions),
        jnp.concatenate(middles)[:, None] * parts[None],
        tuple(valid),
        parts,
    )


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


def deformable_detr(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    refine: bool = False,
    layers: int = 6,
    queries: int = 300,
    heads: int = 8,
    points: int = 4,
    hidden_size: int = 1024,
) -> DeformableDETR:
    """Builds a `DeformableDETR` on `backbone`, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `refine`: whether each layer of the decoder moves the boxes of the layer before it, see `DeformableDETR`.
    - `layers`: of the encoder, and of the decoder. `queries`: their number. `heads`, `points`: of each attention, see
      `nn.DeformableAttention`. `hidden_size`: between the linear layers of encoder and decoder.

    >>> from detectax_eqx.nn import ProjectedLevels, resnet18
    >>> backbone = ProjectedLevels(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = deformable_detr(backbone, 3, key=jr.key(2), layers=1, queries=5, heads=2, hidden_size=8)
    >>> model.queries.weight.shape, model.levels.shape, model.num_classes
    ((5, 32), (4, 16), 3)
    """
    channels, keys = backbone.channels, jr.split(key, 7)
    predictions = layers if refine else 1
    attention = partial(DeformableAttention, channels, heads, levels=len(backbone.strides), points=points)
    encoder_layer = partial(EncoderLayer, channels, hidden_size=hidden_size)
    decoder_layer = partial(DecoderLayer, channels, heads=heads, hidden_size=hidden_size)
    deltas = [box_deltas(channels, key=k) for k in jr.split(keys[6], predictions)]
    small = jnp.zeros(4).at[2:].set(SIDE)
    deltas[0] = eqx.tree_at(lambda mlp: mlp.layers[-1].bias, deltas[0], small)
    return DeformableDETR(
        backbone,
        jr.normal(keys[0], (len(backbone.strides), channels)),
        new_layers(layers, encoder_layer, attention, key=keys[1]),
        eqx.nn.Embedding(queries, 2 * channels, key=keys[2]),
        xavier_linear(channels, 2, key=keys[3]),
        new_layers(layers, decoder_layer, attention, key=keys[4]),
        tuple(rare_classes(channels, num_classes, key=k) for k in jr.split(keys[5], predictions)),
        tuple(deltas),
    )
