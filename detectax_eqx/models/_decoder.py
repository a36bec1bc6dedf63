"""Encoder and decoder of detection transformers: cells and queries that attend to each other and to maps."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import DeformableAttention, LayerNorm, QueryAttention, ReLUMLP, linear, relu, sine_embedding, xavier_linear
from ..ops import upcast


Layer = TypeVar("Layer")

# That of torch's `LayerNorm`.
EPSILON = 1e-5


class EncoderLayer(eqx.Module):
    """Attention of the cells of maps to each other and two linear layers, with a norm after each.

    The layer of DETR (arXiv:2005.12872) and, with deformable attention, of Deformable DETR (arXiv:2010.04159).
    """

    attention: QueryAttention | DeformableAttention
    norm1: LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    norm2: LayerNorm

    def __init__(
        self,
        channels: int,
        attention: QueryAttention | DeformableAttention,
        *,
        key: PRNGKeyArray,
        hidden_size: int,
    ):
        """Initialises the layer. `hidden_size`: between the linear layers."""
        keys = jr.split(key)
        self.attention = attention
        self.linear1 = xavier_linear(channels, hidden_size, key=keys[0])
        self.linear2 = xavier_linear(hidden_size, channels, key=keys[1])
        self.norm1, self.norm2 = (LayerNorm(channels, eps=EPSILON) for _ in range(2))

    def __call__(self, x: Float[Array, "n c"], positions: Float[Array, "n c"], *attended: Any) -> Float[Array, "n c"]:
        """Returns the next cells. `attended`: the arguments of the attention after the queries."""
        x = self.norm1(x + self.attention(x + positions, *attended))
        return self.norm2(x + linear(self.linear2, relu(linear(self.linear1, x))))


class DecoderLayer(eqx.Module):
    """Attention among queries, attention of queries to maps, and two linear layers, with a norm after each.

    The layer of DETR (arXiv:2005.12872) and, with deformable attention to the maps, of Deformable DETR
    (arXiv:2010.04159).
    """

    self_attention: QueryAttention
    norm1: LayerNorm
    cross_attention: QueryAttention | DeformableAttention
    norm2: LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    norm3: LayerNorm

    def __init__(
        self,
        channels: int,
        cross_attention: QueryAttention | DeformableAttention,
        *,
        key: PRNGKeyArray,
        heads: int,
        hidden_size: int,
    ):
        """Initialises the layer. `heads`: of the attention among queries. `hidden_size`: between the linear layers."""
        keys = jr.split(key, 3)
        self.self_attention = QueryAttention(channels, heads, key=keys[0])
        self.cross_attention = cross_attention
        self.linear1 = xavier_linear(channels, hidden_size, key=keys[1])
        self.linear2 = xavier_linear(hidden_size, channels, key=keys[2])
        self.norm1, self.norm2, self.norm3 = (LayerNorm(channels, eps=EPSILON) for _ in range(3))

    def __call__(self, x: Float[Array, "q c"], positions: Float[Array, "q c"], *attended: Any) -> Float[Array, "q c"]:
        """Returns the next queries. `attended`: the arguments of the attention to maps after the queries."""
        placed = x + positions
        x = self.norm1(x + self.self_attention(placed, placed, x))
        x = self.norm2(x + self.cross_attention(x + positions, *attended))
        return self.norm3(x + linear(self.linear2, relu(linear(self.linear1, x))))


class Decoder(eqx.Module):
    """Layers whose queries keep their boxes: those of LW-DETR (arXiv:2406.03459), which embeds the boxes once.

    - `positions`: computes what is added to the queries from sines and cosines of their boxes.
    - `norm`: of the output of every layer.
    """

    layers: tuple[DecoderLayer, ...]
    positions: ReLUMLP
    norm: LayerNorm

    def __init__(self, layers: Sequence[DecoderLayer], channels: int, *, key: PRNGKeyArray):
        self.layers = tuple(layers)
        self.positions = ReLUMLP(2 * channels, channels, channels, depth=2, key=key)
        self.norm = LayerNorm(channels, eps=EPSILON)

    def __call__(
        self,
        x: Float[Array, "q c"],
        boxes_cxcywh: Float[Array, "q 4"],
        features: Sequence[Float[Array, "c _ _"]],
    ) -> Float[Array, "l q c"]:
        """Returns the queries after each of `l` layers. `boxes_cxcywh`: relative to the image, in 0..1."""
        columns = [boxes_cxcywh[:, i] for i in (1, 0, 2, 3)]  # y, x, w, h
        sines = [sine_embedding(column, x.shape[1] // 2) for column in columns]
        positions = self.positions(jnp.concatenate(sines, axis=1).astype(x.dtype))  # (q, 2 c) -> (q, c)
        outputs = []
        for layer in self.layers:
            x = layer(x, positions, boxes_cxcywh[:, None], features)
            outputs.append(self.norm(x))
        return jnp.stack(outputs)


def new_layers(
    count: int, layer: Callable[..., Layer], attention: Callable[..., Any], *, key: PRNGKeyArray
) -> tuple[Layer, ...]:
    """Builds `count` layers, each with an attention of its own. `layer` takes it and a key; `attention` takes a key."""

    def build(key: PRNGKeyArray) -> Layer:
        own, inner = jr.split(key)
        return layer(attention(key=inner), key=own)

    return tuple(build(k) for k in jr.split(key, count))


def refine_boxes(boxes_cxcywh: Float[Array, "*n 4"], deltas: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Moves each box by `deltas`: the centre by the first two in units of its sides, the sides by factors `exp(delta)`.

    Computes in float32 or higher. That of R-CNN without weights (arXiv:1311.2524, appendix C), which LW-DETR uses in
    place of DETR's sigmoids.

    >>> refine_boxes(jnp.array([0.5, 0.5, 0.2, 0.4]), jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.699999988079071, 0.5, 0.20000000298023224, 0.4000000059604645]
    """
    (centres, sides), (shifts, logs) = (jnp.split(upcast(x), 2, axis=-1) for x in (boxes_cxcywh, deltas))
    return jnp.concatenate([centres + shifts * sides, sides * jnp.exp(logs)], axis=-1)
