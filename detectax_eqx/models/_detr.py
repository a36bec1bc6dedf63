"""DETR (arXiv:2005.12872): a transformer on one map of a ResNet, whose queries are matched to the objects."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, LayerNorm, QueryAttention, ReLUMLP, linear, sine_positions
from ..ops import upcast
from ._decoder import EPSILON, DecoderLayer, EncoderLayer, new_layers
from ._detector import AbstractDetector
from ._maps import cells_of
from ._preprocessing import Preprocessing, ShortestEdge
from ._queries import Queries, QuerySelection, best_queries, query_detections
from ._set_loss import SetWeights, match_sets, matching_cost, no_object_loss, probability_cost, set_losses


DETR_PREPROCESSING = Preprocessing(ShortestEdge(rounded_short=True), pillow=True)
# Of the costs of matching and of the losses.
WEIGHTS = SetWeights(classification=1.0)


class DETR(AbstractDetector[QuerySelection]):
    """A detection transformer: an encoder of the cells of one map, and a decoder of queries, each a class and a box.

    `detr` builds one.

    - `queries`: the positions of the queries, which have no features at first.
    - `norm`: of the output of every layer of the decoder.
    - `class_logits`: the classes, and "no object" as the last. `boxes`: the logits of boxes `cxcywh`.
    - `preprocessing`, `selection`, `matching`, `loss_weights`: static options. `no_object`: the weight of queries
      without an object in the loss of classes.

    Boxes are relative to the image, and not clipped to it. Cells of the padding are not attended to. The canvas has any
    size, so that an image need not be padded. The dropout of the original's training is left out.
    """

    backbone: Backbone
    encoder: tuple[EncoderLayer, ...]
    queries: eqx.nn.Embedding
    decoder: tuple[DecoderLayer, ...]
    norm: LayerNorm
    class_logits: eqx.nn.Linear
    boxes: ReLUMLP
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=DETR_PREPROCESSING)
    selection: QuerySelection = eqx.field(static=True, kw_only=True, default=QuerySelection(max_detections=100))
    matching: SetWeights = eqx.field(static=True, kw_only=True, default=WEIGHTS)
    loss_weights: SetWeights = eqx.field(static=True, kw_only=True, default=WEIGHTS)
    no_object: float = eqx.field(static=True, kw_only=True, default=0.1)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits.weight.shape[0] - 1

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: QuerySelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`. Each query is detected once."""
        last = jax.tree.map(lambda x: x[-1], self._predict(image, canvas_size))
        return query_detections(last, canvas_size, selection or self.selection, best=best_queries)[0]

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `loss_class`, `loss_l1` and `loss_giou`, weighted and summed over all layers of the decoder.

        Those of boxes are divided by the number of objects of the batch, that of classes by the weights of all queries.
        `key` is for the backbone.
        """
        targets.check_labels(self.num_classes)
        predicted = self._predict(image, canvas_size, key=key)
        cost = partial(matching_cost, weights=self.matching, class_cost=probability_cost)
        matched = match_sets([jax.vmap(lambda one: cost(one, targets, canvas_size))(predicted)], targets)
        objects = (matched[0][-1] >= 0).sum().astype(jnp.float32)  # the same in all layers
        return set_losses(
            [predicted],
            matched,
            targets,
            canvas_size,
            self.loss_weights,
            targets.valid.sum().astype(jnp.float32),
            class_loss=partial(no_object_loss, no_object=self.no_object),
            class_count=objects + self.no_object * (self.queries.num_embeddings - objects),
        )

    def _predict(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, key: PRNGKeyArray | None = None
    ) -> Queries:
        """The predictions of all layers of the decoder, `(l q …)`."""
        (cells,) = self.backbone(self.preprocessing.normalize(image, canvas_size), key=key)
        grid = (cells.shape[1], cells.shape[2])
        valid, size = cells_of((image.shape[0], image.shape[1]), canvas_size, grid)
        positions = sine_positions(grid, len(cells), size=size, dtype=upcast(cells).dtype)
        x, positions = (rearrange(part, "c h w -> (h w) c") for part in (cells, positions.astype(cells.dtype)))
        for layer in self.encoder:
            x = layer(x, positions, x + positions, x, valid.ravel())
        queries, outputs = jnp.zeros_like(self.queries.weight), []
        for layer in self.decoder:
            queries = layer(queries, self.queries.weight, x + positions, x, valid.ravel())
            outputs.append(self.norm(queries))
        features = jnp.stack(outputs)
        boxes = jax.nn.sigmoid(upcast(self.boxes(features)))
        return Queries(features, linear(self.class_logits, features), boxes)


def detr(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    layers: int = 6,
    queries: int = 100,
    heads: int = 8,
    hidden_size: int = 2048,
) -> DETR:
    """Builds a `DETR` on `backbone`, which has one level, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `layers`: of the encoder, and of the decoder. `queries`: their number. `heads`: of each attention.
    - `hidden_size`: between the linear layers of encoder and decoder.

    Raises a `ValueError` for a backbone with more levels.

    >>> from detectax_eqx.nn import ProjectedResNet, resnet18
    >>> backbone = ProjectedResNet(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = detr(backbone, 3, key=jr.key(2), layers=1, queries=5, heads=2, hidden_size=8)
    >>> model.queries.weight.shape, model.num_classes
    ((5, 16), 3)
    """
    if len(backbone.strides) != 1:
        raise ValueError(f"backbone must have one level, got {len(backbone.strides)}. Use ProjectedResNet.")
    channels, keys = backbone.channels, jr.split(key, 5)

    attention = partial(QueryAttention, channels, heads)
    encoder_layer = partial(EncoderLayer, channels, hidden_size=hidden_size)
    decoder_layer = partial(DecoderLayer, channels, heads=heads, hidden_size=hidden_size)
    return DETR(
        backbone,
        new_layers(layers, encoder_layer, attention, key=keys[0]),
        eqx.nn.Embedding(queries, channels, key=keys[1]),
        new_layers(layers, decoder_layer, attention, key=keys[2]),
        LayerNorm(channels, eps=EPSILON),
        eqx.nn.Linear(channels, num_classes + 1, key=keys[3]),
        ReLUMLP(channels, channels, 4, depth=3, key=keys[4]),
        selection=QuerySelection(max_detections=queries),
    )
