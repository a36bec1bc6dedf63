"""RF-DETR (arXiv:2511.09554) and LW-DETR (arXiv:2406.03459): detection transformers with two stages."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone, DeformableAttention, ReLUMLP, linear
from ..ops import upcast
from ._decoder import Decoder, DecoderLayer, new_layers, refine_boxes
from ._detector import AbstractDetector
from ._preprocessing import Preprocessing, Square
from ._queries import (
    Queries,
    QueryHead,
    QuerySelection,
    QueryTable,
    box_deltas,
    grid_proposals,
    query_detections,
    rare_classes,
)
from ._set_loss import SetWeights, focal_cost, iou_aware_loss, match_sets, matching_cost, set_losses


# Of the loss: the class counts half as much as in the cost of matching.
LOSS_WEIGHTS = SetWeights(classification=1.0)


@runtime_checkable
class QueryDetector(Protocol):
    """The parts that `RFDETR` and `RFDETRSeg` have in common; see there."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def first_stage(self) -> QueryHead: ...

    @property
    def queries(self) -> QueryTable: ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def class_logits(self) -> eqx.nn.Linear: ...

    @property
    def deltas(self) -> ReLUMLP: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def matching(self) -> SetWeights: ...

    @property
    def loss_weights(self) -> SetWeights: ...


class RFDETR(AbstractDetector[QuerySelection]):
    """A detection transformer: queries chosen on one map, a decoder, and a class and a box for each query.

    `rf_detr` builds one. For training there are `g` groups of `q` queries, each with a first stage of its own, which
    share the decoder but do not attend to each other (Group DETR, arXiv:2207.13085). Detection uses the first. LW-DETR
    is the same on another backbone.

    - `first_stage`: a `QueryHead` whose arrays have a leading axis of groups.
    - `queries`: what queries are at first.
    - `class_logits`, `deltas`: the predictions of each layer of the decoder, boxes again as deltas to the same.
    - `preprocessing`, `selection`, `matching`, `loss_weights`: static options.

    Boxes are relative to the canvas. The padding of an image that does not fill it is part of what the model sees.
    """

    backbone: Backbone
    first_stage: QueryHead
    queries: QueryTable
    decoder: Decoder
    class_logits: eqx.nn.Linear
    deltas: ReLUMLP
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing(Square(560)))
    selection: QuerySelection = eqx.field(static=True, kw_only=True, default=QuerySelection())
    matching: SetWeights = eqx.field(static=True, kw_only=True, default=SetWeights())
    loss_weights: SetWeights = eqx.field(static=True, kw_only=True, default=LOSS_WEIGHTS)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits.weight.shape[0]

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: QuerySelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels; see `AbstractDetector`. A query may be detected as several classes."""
        _, _, decoded = predict_queries(self, image, canvas_size)
        last = jax.tree.map(lambda x: x[-1, 0], decoded)
        canvas = (image.shape[0], image.shape[1])
        return query_detections(last, canvas, selection or self.selection, clip=canvas_size)[0]

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns `loss_class`, `loss_l1` and `loss_giou`, weighted and summed over the first stage and all layers.

        Divided by the number of objects × groups of the batch. `key` is for the backbone.
        """
        targets.check_labels(self.num_classes)
        groups, canvas = self.queries.groups, (image.shape[0], image.shape[1])
        sets = [flat(part) for part in predict_queries(self, image, canvas_size, groups=groups, key=key)[1:]]
        matched = match_sets([matching_costs(self, part, targets, canvas) for part in sets], targets)
        return query_losses(self, sets, matched, targets, canvas)


def predict_queries(
    model: QueryDetector,
    image: Real[Array, "h w i"],
    canvas_size: Int32[Array, " 2"],
    *,
    groups: int = 1,
    key: PRNGKeyArray | None = None,
) -> tuple[tuple[Float[Array, "c _ _"], ...], Queries, Queries]:
    """Returns the features, and the predictions of the first stage, `(g q …)`, and of all layers, `(l g q …)`.

    `groups`: how many of them to compute.
    """
    features = model.backbone(model.preprocessing.normalize(image, canvas_size), key=key)
    first, table = jax.tree.map(lambda x: x[:groups], (model.first_stage, model.queries))
    chosen = eqx.filter_vmap(partial(choose_queries, features, count=model.queries.count))(first)
    decoded = eqx.filter_vmap(partial(decode_queries, model, features))(
        table.features, table.boxes, chosen.boxes_cxcywh
    )
    return features, chosen, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), decoded)


def choose_queries(features: tuple[Float[Array, "c _ _"], ...], head: QueryHead, *, count: int) -> Queries:
    """The predictions of the first stage for one group."""
    levels = [grid_proposals((x.shape[1], x.shape[2]), level=i) for i, x in enumerate(features)]
    proposals, used = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    cells = jnp.concatenate([rearrange(x, "c h w -> (h w) c") for x in features])
    return head(cells, jnp.asarray(proposals, upcast(cells).dtype), jnp.asarray(used), count=count)


def decode_queries(
    model: QueryDetector,
    features: tuple[Float[Array, "c _ _"], ...],
    queries: Float[Array, "q c"],
    deltas: Float[Array, "q 4"],
    chosen: Float[Array, "n 4"],
) -> Queries:
    """The predictions of all layers for one group, `(l q …)`, from the boxes `chosen` in the first stage."""
    count = len(chosen)  # a small map has fewer cells than there are queries: the other boxes are the deltas
    boxes = refine_boxes(jax.lax.stop_gradient(chosen), deltas[:count])
    boxes = jnp.concatenate([boxes, deltas[count:].astype(boxes.dtype)])
    outputs = model.decoder(queries, boxes, features)
    moved = refine_boxes(jnp.broadcast_to(boxes[None], (*outputs.shape[:2], 4)), model.deltas(outputs))
    return Queries(outputs, linear(model.class_logits, outputs), moved)


def flat(part: Queries) -> Queries:
    """Predictions with one leading axis of sets."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), part)


def matching_costs(
    model: QueryDetector, sets: Queries, targets: Targets, canvas: tuple[int, int]
) -> Float[Array, "s t q"]:
    """The costs of classes and boxes for each of several sets."""
    return jax.vmap(lambda one: matching_cost(one, targets, canvas, model.matching, class_cost=focal_cost))(sets)


def query_losses(
    model: QueryDetector,
    sets: Sequence[Queries],
    matched: Sequence[Int32[Array, "_ t"]],
    targets: Targets,
    canvas: tuple[int, int],
) -> dict[str, WeightedSum]:
    """The weighted losses of classes and boxes, given the query of each target in each set."""
    count = targets.valid.sum().astype(jnp.float32) * float(model.queries.groups)
    return set_losses(sets, matched, targets, canvas, model.loss_weights, count, class_loss=iou_aware_loss)


def rf_detr(
    backbone: Backbone,
    num_classes: int,
    *,
    key: PRNGKeyArray,
    size: int = 560,
    layers: int = 3,
    queries: int = 300,
    groups: int = 13,
    self_heads: int = 8,
    cross_heads: int = 16,
    points: int = 2,
    hidden_size: int = 2048,
) -> RFDETR:
    """Builds an `RFDETR` on `backbone`, randomly initialised.

    Use `dataclasses.replace` to change its options.

    - `size`: side in pixels to which images are resized. `layers`: of the decoder. `queries`, `groups`: of queries, see
      `RFDETR`; 1 group suffices for detection.
    - `self_heads`, `hidden_size`: see `DecoderLayer`. `cross_heads`, `points`: see `nn.DeformableAttention`.

    >>> from detectax_eqx.nn import ProjectedViT, WindowedViT
    >>> body = WindowedViT(8, 2, key=jr.key(0), patch_size=4, side=4, windows=2, taps=(1, 2))
    >>> backbone = ProjectedViT(body, key=jr.key(1), channels=16)
    >>> options = {"size": 16, "layers": 1, "queries": 5, "self_heads": 2, "cross_heads": 2, "hidden_size": 8}
    >>> rf_detr(backbone, 3, key=jr.key(2), groups=2, **options).queries.boxes.shape
    (2, 5, 4)
    """
    keys = jr.split(key, 6)
    channels = backbone.channels
    attention = partial(DeformableAttention, channels, cross_heads, levels=len(backbone.strides), points=points)
    decoder_layer = partial(DecoderLayer, channels, heads=self_heads, hidden_size=hidden_size)
    decoder = new_layers(layers, decoder_layer, attention, key=keys[0])
    return RFDETR(
        backbone,
        eqx.filter_vmap(lambda k: QueryHead(channels, num_classes, key=k))(jr.split(keys[1], groups)),
        QueryTable(groups, queries, channels, key=keys[2]),
        Decoder(decoder, channels, key=keys[3]),
        rare_classes(channels, num_classes, key=keys[4]),
        box_deltas(channels, key=keys[5]),
        preprocessing=Preprocessing(Square(size)),
        selection=QuerySelection(max_detections=queries),
    )
