"""RF-DETR with masks: each query's features are compared with those of each pixel."""

from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from .._xla import map_chunks
from ..nn import Backbone, Conv2d, LayerNorm, ReLUMLP, gelu, linear
from ..ops import resize_masks, upcast
from ._decoder import EPSILON, Decoder
from ._detector import AbstractDetector, Paste
from ._mask_points import (
    PIXELS_PER_POINT,
    draw_points,
    mask_costs,
    num_points,
    point_losses,
    sample_inside,
    targets_at,
    uncertain_points,
)
from ._preprocessing import Preprocessing, Square
from ._queries import QueryHead, QuerySelection, QueryTable, query_detections
from ._rf_detr import (
    LOSS_WEIGHTS,
    matching_costs,
    predict_queries,
    query_losses,
    rf_detr,
)
from ._set_loss import SetWeights, match_sets


# Masks have a pixel for this number of pixels of the image along each side.
STRIDE = 4
# Targets per chunk of the loss of masks.
CHUNK = 10


class PixelBlock(eqx.Module):
    """A depthwise 3×3 convolution, a norm, a linear layer and a GELU, beside a shortcut."""

    conv: Conv2d
    norm: LayerNorm
    linear: eqx.nn.Linear

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.conv = Conv2d(channels, channels, 3, groups=channels, key=keys[0])
        self.norm = LayerNorm(channels)
        self.linear = eqx.nn.Linear(channels, channels, key=keys[1])

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        y = self.norm(rearrange(self.conv(x), "c h w -> h w c"))
        return x + rearrange(gelu(linear(self.linear, y)), "h w c -> c h w")


class QueryBlock(eqx.Module):
    """A norm and two linear layers with a GELU between them, beside a shortcut."""

    norm: LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.norm = LayerNorm(channels, eps=EPSILON)
        self.linear1 = eqx.nn.Linear(channels, 4 * channels, key=keys[0])
        self.linear2 = eqx.nn.Linear(4 * channels, channels, key=keys[1])

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        return x + linear(self.linear2, gelu(linear(self.linear1, self.norm(x))))


class QueryMaskHead(eqx.Module):
    """Masks of queries: products of their embeddings and those of the pixels, plus a common bias.

    The pixels run through one block for each layer of the decoder. The masks of a layer use those after its block.
    """

    blocks: tuple[PixelBlock, ...]
    pixels: Conv2d
    query_block: QueryBlock
    queries: eqx.nn.Linear
    bias: Float[Array, " 1"]

    def __init__(self, channels: int, layers: int, *, key: PRNGKeyArray):
        keys = jr.split(key, layers + 3)
        self.blocks = tuple(PixelBlock(channels, key=k) for k in keys[3:])
        self.pixels = Conv2d(channels, channels, 1, key=keys[0])
        self.query_block = QueryBlock(channels, key=keys[1])
        self.queries = eqx.nn.Linear(channels, channels, key=keys[2])
        self.bias = jnp.zeros(1)

    def maps(self, x: Float[Array, "c h w"], size: tuple[int, int]) -> list[Float[Array, "c _ _"]]:
        """Embeddings of the pixels of a map resized to `size`: before the first block, and after each."""
        x = jax.image.resize(x, (len(x), *size), "linear", antialias=False)
        maps = [self.pixels(x)]
        for block in self.blocks:
            x = block(x)
            maps.append(self.pixels(x))
        return maps

    def embed(self, queries: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Embeddings of queries."""
        return linear(self.queries, self.query_block(queries))

    def logits(self, embedded: Float[Array, "... c"], pixels: Float[Array, "c ..."]) -> Float[Array, "..."]:
        """The mask of each query."""
        return jnp.tensordot(embedded, pixels, 1) + self.bias.reshape((1,) * (embedded.ndim + pixels.ndim - 2))


class RFDETRSeg(AbstractDetector[QuerySelection]):
    """An `RFDETR` that also predicts a mask of the image for each query.

    `rf_detr_seg` builds one. Options are those of `RFDETR`.
    """

    backbone: Backbone
    first_stage: QueryHead
    queries: QueryTable
    decoder: Decoder
    class_logits: eqx.nn.Linear
    deltas: ReLUMLP
    mask_head: QueryMaskHead
    preprocessing: Preprocessing = eqx.field(static=True, kw_only=True, default=Preprocessing(Square(432)))
    selection: QuerySelection = eqx.field(static=True, kw_only=True, default=QuerySelection())
    matching: SetWeights = eqx.field(static=True, kw_only=True, default=SetWeights())
    loss_weights: SetWeights = eqx.field(static=True, kw_only=True, default=LOSS_WEIGHTS)
    paste: ClassVar[Paste] = staticmethod(resize_masks)
    needs: ClassVar[frozenset[str]] = frozenset({"boxes", "masks"})

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.class_logits.weight.shape[0]

    def __call__(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], *, selection: QuerySelection | None = None
    ) -> Detections:
        """Returns detections in canvas pixels, with masks of the whole canvas at a quarter of its resolution."""
        features, _, decoded = predict_queries(self, image, canvas_size)
        last = jax.tree.map(lambda x: x[-1, 0], decoded)
        canvas = (image.shape[0], image.shape[1])
        found, queries = query_detections(last, canvas, selection or self.selection, clip=canvas_size)
        pixels = self.mask_head.maps(features[0], mask_size(canvas))[-1]
        logits = self.mask_head.logits(self.mask_head.embed(last.features[queries]), pixels)
        frames = jnp.broadcast_to(jnp.array([[0, 0, canvas[1], canvas[0]]], found.boxes.dtype), found.boxes.shape)
        return replace(found, masks=jax.nn.sigmoid(upcast(logits)), mask_boxes=frames)

    def loss(
        self, image: Real[Array, "h w i"], canvas_size: Int32[Array, " 2"], targets: Targets, *, key: PRNGKeyArray
    ) -> dict[str, WeightedSum]:
        """Returns the losses of `RFDETR`, `loss_mask` and `loss_dice`. `key` also draws the points of the masks.

        Raises a `ValueError` if `targets` have no masks.
        """
        targets.check_labels(self.num_classes)
        groups, canvas, keys = self.queries.groups, (image.shape[0], image.shape[1]), jr.split(key, 3)
        features, chosen, decoded = predict_queries(self, image, canvas_size, groups=groups, key=keys[0])
        maps = self.mask_head.maps(features[0], mask_size(canvas))
        # The first stage and the layers of the decoder, each with the pixels before or after its block.
        stages = [chosen, *(jax.tree.map(lambda x, i=i: x[i], decoded) for i in range(len(maps) - 1))]
        embedded = [self.mask_head.embed(stage.features) for stage in stages]  # (g, q, c)
        costs = [
            matching_costs(self, stage, targets, canvas) + self._mask_costs(x, pixels, targets, canvas, k)
            for stage, x, pixels, k in zip(stages, embedded, maps, jr.split(keys[1], len(maps)), strict=True)
        ]
        matched = match_sets(costs, targets)
        losses = query_losses(self, stages, matched, targets, canvas)
        total = self._mask_losses(embedded, maps, jnp.stack(matched), targets, canvas, keys[2])
        count = losses["loss_class"].count
        weights = self.loss_weights
        return losses | {
            "loss_mask": WeightedSum((weights.mask * total[0]).astype(jnp.float32), count),
            "loss_dice": WeightedSum((weights.dice * total[1]).astype(jnp.float32), count),
        }

    def _mask_costs(
        self,
        embedded: Float[Array, "g q c"],
        pixels: Float[Array, "c h w"],
        targets: Targets,
        canvas: tuple[int, int],
        key: PRNGKeyArray,
    ) -> Float[Array, "g t q"]:
        points = draw_points(key, pixels.shape[1] * pixels.shape[2] // PIXELS_PER_POINT)
        logits = self.mask_head.logits(embedded, sample_inside(pixels, points).T)  # (g, q, p)
        wanted = targets_at(targets, jnp.broadcast_to(points[None], (len(targets.labels), *points.shape)), canvas)
        entropy, dice = jax.vmap(lambda x: mask_costs(x, wanted))(logits)
        return self.matching.mask * entropy + self.matching.dice * dice

    def _mask_losses(
        self,
        embedded: list[Float[Array, "g q c"]],
        maps: list[Float[Array, "c _ _"]],
        matched: Int32[Array, "l g t"],
        targets: Targets,
        canvas: tuple[int, int],
        key: PRNGKeyArray,
    ) -> Float[Array, " 2"]:
        """Sums the losses of all matched pairs: `(mask, dice)`."""
        count = num_points(mask_size(canvas))

        def of_target(row: Int32[Array, ""]) -> Float[Array, " 2"]:
            target = jax.tree.map(lambda x: jnp.asarray(x)[row][None], targets)
            total = jnp.zeros(2, upcast(self.mask_head.bias).dtype)
            for layer, (queries, pixels) in enumerate(zip(embedded, maps, strict=True)):
                rows = matched[layer, :, row]  # (g,)
                picked = queries[jnp.arange(len(rows), dtype=jnp.int32), jnp.maximum(rows, 0)]  # (g, c)
                logits = self.mask_head.logits(picked, pixels)  # (g, h, w)
                keys = jr.split(jr.fold_in(jr.fold_in(key, row), layer), len(rows))
                points = jax.vmap(lambda x, k: uncertain_points(x, count, key=k))(logits, keys)
                wanted = targets_at(target, points.reshape(1, -1, 2), canvas).reshape(len(rows), count)
                losses = jnp.stack(point_losses(logits, points, wanted), axis=1)  # (g, 2)
                total = total + jnp.where((rows >= 0)[:, None], losses, 0).sum(axis=0)
            return total

        # Valid targets first, so that the other chunks are skipped.
        order = jnp.argsort(~jnp.asarray(targets.valid), stable=True).astype(jnp.int32)
        number = targets.valid.sum().astype(jnp.int32)
        return map_chunks(jax.vmap(of_target), [order], number, chunk_size=CHUNK).sum(axis=0)


def mask_size(canvas: tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` of the masks of a canvas."""
    return canvas[0] // STRIDE, canvas[1] // STRIDE


def rf_detr_seg(
    backbone: Backbone, num_classes: int, *, key: PRNGKeyArray, layers: int = 4, **options: Any
) -> RFDETRSeg:
    """Builds an `RFDETRSeg` on `backbone`, randomly initialised. Arguments are those of `rf_detr`.

    >>> from detectax_eqx.nn import ProjectedViT, WindowedViT
    >>> body = WindowedViT(8, 2, key=jr.key(0), patch_size=4, side=4, windows=2, taps=(1, 2))
    >>> backbone = ProjectedViT(body, key=jr.key(1), channels=16)
    >>> options = {"size": 16, "queries": 5, "self_heads": 2, "cross_heads": 2, "hidden_size": 8}
    >>> len(rf_detr_seg(backbone, 3, key=jr.key(2), layers=1, groups=2, **options).mask_head.blocks)
    1
    """
    keys = jr.split(key)
    boxes = rf_detr(backbone, num_classes, key=keys[0], layers=layers, **options)
    return RFDETRSeg(
        backbone,
        boxes.first_stage,
        boxes.queries,
        boxes.decoder,
        boxes.class_logits,
        boxes.deltas,
        QueryMaskHead(backbone.channels, layers, key=keys[1]),
        preprocessing=boxes.preprocessing,
        selection=boxes.selection,
    )
