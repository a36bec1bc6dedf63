"""Deformable DETR (arXiv:2010.04159): a detection transformer that looks at a few points of maps of several sizes."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, DeformableAttention, ReLUMLP, linear
from ._decoder import DecoderLayer, EncoderLayer, new_layers
from ._deformable_queries import CellQueries, LearnedQueries, move_boxes
from ._detector import AbstractDetector
from ._detr import DETR_PREPROCESSING
from ._maps import place
from ._preprocessing import Preprocessing
from ._queries import Queries, QuerySelection, box_deltas, query_detections, rare_classes
from ._set_loss import SetWeights, binary_focal_loss, focal_cost, match_sets, matching_cost, set_losses


# The initial logits of the sides of boxes.
SIDE = -2.0


class DeformableDETR(AbstractDetector[QuerySelection]):
    """A detection transformer: an encoder of the cells of several maps, and a decoder of queries.

    `deformable_detr` builds one.

    - `levels`: what is added to the positions of the cells of each map.
    - `queries`: how they begin: as parameters, or at the best cells of the encoder (two stages).
    - `class_logits`, `deltas`: the predictions of the layers of the decoder: one of each for all layers, or one for
      each. In the latter case, a layer looks near the boxes of the layer before it ("iterative refinement").
    - `preprocessing`, `selection`, `matching`, `loss_weights`: static options.

    Boxes are relative to the image, and not clipped to it. Cells of the padding are not attended to. The canvas has any
    size, so that an image need not be padded. The dropout of the original's training is left out.
    """

    backbone: Backbone
    levels: Float[Array, "l c"]
    encoder: tuple[EncoderLayer, ...]
    queries: LearnedQueries | CellQueries
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
        last = jax.tree.map(lambda x: x[-1], self._predict(image, canvas_size)[0])
        return query_detections(last, canvas_size, selection or self.selection)[0]

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `loss_class`, `loss_l1` and `loss_giou`, weighted and summed over all layers of the decoder.

        With two stages, that of all cells is added, where every object is of the first class. Divided by the number of
        objects of the batch. `key` is for the backbone.
        """
        targets.check_labels(self.num_classes)
        layers, cells = self._predict(image, canvas_size, key=key)
        losses = self._losses(layers, targets, canvas_size)
        if cells is None:
            return losses
        objects = replace(targets, labels=jnp.zeros_like(jnp.asarray(targets.labels)))
        first = self._losses(jax.tree.map(lambda x: x[None], cells), objects, canvas_size)
        return {name: WeightedSum(term.total + first[name].total, term.count) for name, term in losses.items()}

    def _losses(self, sets: Queries, targets: Targets, canvas_size: Int32[Array, " 2"]) -> dict[str, WeightedSum]:
        """The losses of several sets of predictions, each matched to all targets."""
        cost = partial(matching_cost, weights=self.matching, class_cost=focal_cost)
        matched = match_sets([jax.vmap(lambda one: cost(one, targets, canvas_size))(sets)], targets)
        count = targets.valid.sum().astype(jnp.float32)
        return set_losses([sets], matched, targets, canvas_size, self.loss_weights, count, class_loss=binary_focal_loss)

    def _predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Queries, Queries | None]:
        """The predictions of all layers of the decoder, `(l q …)`, and those for all cells, with two stages."""
        levels = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
        maps = place(levels, (image.shape[0], image.shape[1]), canvas_size, self.levels)
        x = maps.cells
        for layer in self.encoder:
            x = layer(x, maps.positions, maps.references, maps.split(x), maps.valid)
        features = maps.split(x)
        positions, queries, boxes, cells = self.queries(maps, x)
        outputs = []
        for i, layer in enumerate(self.decoder):
            shares = jnp.tile(maps.shares, (1, boxes.shape[1] // 2))
            queries = layer(queries, positions, boxes[:, None] * shares[None], features, maps.valid)
            head = min(i, len(self.deltas) - 1)
            moved = move_boxes(boxes, self.deltas[head](queries))
            outputs.append(Queries(queries, linear(self.class_logits[head], queries), moved))
            if len(self.deltas) > 1:
                boxes = jax.lax.stop_gradient(moved)
        return jax.tree.map(lambda *layers: jnp.stack(layers), *outputs), cells


def deformable_detr(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    refine: bool = False,
    two_stage: bool = False,
    layers: int = 6,
    queries: int = 300,
    heads: int = 8,
    points: int = 4,
    hidden_size: int = 1024,
) -> DeformableDETR:
    """Builds a `DeformableDETR` on `backbone`, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `refine`: whether each layer of the decoder moves the boxes of the layer before it. `two_stage`: whether queries
      begin at the best cells of the encoder; needs `refine`. See `DeformableDETR`.
    - `layers`: of the encoder, and of the decoder. `queries`: their number. `heads`, `points`: of each attention, see
      `nn.DeformableAttention`. `hidden_size`: between the linear layers of encoder and decoder.

    >>> from detectax_eqx.nn import ProjectedLevels, resnet18
    >>> backbone = ProjectedLevels(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = deformable_detr(backbone, 3, key=jr.key(2), layers=1, queries=5, heads=2, hidden_size=8)
    >>> model.queries.table.weight.shape, model.levels.shape, model.num_classes
    ((5, 32), (4, 16), 3)
    """
    if two_stage and not refine:
        raise ValueError("two_stage needs refine=True: the boxes of the first stage are refined by each layer.")
    channels, keys = backbone.channels, jr.split(key, 6)
    predictions = layers if refine else 1
    attention = partial(DeformableAttention, channels, heads, levels=len(backbone.strides), points=points)
    encoder_layer = partial(EncoderLayer, channels, hidden_size=hidden_size)
    decoder_layer = partial(DecoderLayer, channels, heads=heads, hidden_size=hidden_size)
    deltas = [box_deltas(channels, key=k) for k in jr.split(keys[5], predictions)]
    if two_stage:
        start = CellQueries(channels, num_classes, queries, key=keys[2])
    else:
        start = LearnedQueries(channels, queries, key=keys[2])
        small = jnp.zeros(4).at[2:].set(SIDE)
        deltas[0] = eqx.tree_at(lambda mlp: mlp.layers[-1].bias, deltas[0], small)
    return DeformableDETR(
        backbone,
        jr.normal(keys[0], (len(backbone.strides), channels)),
        new_layers(layers, encoder_layer, attention, key=keys[1]),
        start,
        new_layers(layers, decoder_layer, attention, key=keys[3]),
        tuple(rare_classes(channels, num_classes, key=k) for k in jr.split(keys[4], predictions)),
        tuple(deltas),
    )
