"""Layers of detection transformers: attention among queries, and of queries to maps of features."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..ops import deformable_attention, upcast
from ._attention import Projections, attention, linear
from ._conv import relu, xavier_uniform


# Added to the logits of keys that do not count: their weights are 0 after the softmax, also in float32.
PADDING = -1e30


class QueryAttention(eqx.Module):
    """Multi-head attention (arXiv:1706.03762) of queries to keys, that of DETR (arXiv:2005.12872).

    In DETR, positions are added to queries and keys, but not to values.
    """

    qkv: Projections
    projection: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, channels: int, heads: int, *, key: PRNGKeyArray):
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels, got {channels} channels and {heads} heads.")
        keys = jr.split(key)
        self.qkv = Projections(channels, key=keys[0])
        self.projection = xavier_linear(channels, channels, key=keys[1])
        self.heads = heads

    def __call__(
        self,
        queries: Float[Array, "q c"],
        keys: Float[Array, "m c"],
        values: Float[Array, "m c"],
        valid: Bool[Array, " m"] | None = None,
    ) -> Float[Array, "q c"]:
        """Returns a mixture of values for each query. `valid`: the keys that count; at least one does."""
        weight, bias = self.qkv.weight, self.qkv.bias
        inputs = (queries, keys, values)
        y = [jnp.einsum("ni,oi->no", x, weight[i]) + bias[i][None] for i, x in enumerate(inputs)]
        q, k, v = (rearrange(x, "n (a d) -> 1 a n d", a=self.heads) for x in y)
        biases = () if valid is None else (jnp.where(valid, 0.0, PADDING)[None, None, None, None],)  # (1, 1, 1, 1, m)
        return linear(self.projection, rearrange(attention(q, k, v, biases), "1 a q d -> q (a d)"))


class DeformableAttention(eqx.Module):
    """Attention of queries to a few points of each map, near the query's box (Deformable DETR, arXiv:2010.04159).

    - `offsets`: of the points from the centre of the box, for each head, level and point, in halves of the box's sides
      by the number of points; near a point without sides, in cells. `weights`: the logits of the points.
    """

    offsets: eqx.nn.Linear
    weights: eqx.nn.Linear
    values: eqx.nn.Linear
    projection: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    levels: int = eqx.field(static=True)
    points: int = eqx.field(static=True)

    def __init__(self, channels: int, heads: int, *, key: PRNGKeyArray, levels: int = 1, points: int = 4):
        """Initialises the layer: all weights of points are equal, and each head looks in a direction of its own."""
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels, got {channels} channels and {heads} heads.")
        keys = jr.split(key)
        count = heads * levels * points
        directions = _directions(heads, levels, points)
        self.offsets = _constant(eqx.nn.Linear(channels, 2 * count, key=keys[0]), directions)
        self.weights = _constant(eqx.nn.Linear(channels, count, key=keys[0]), jnp.zeros(count))
        self.values, self.projection = (xavier_linear(channels, channels, key=k) for k in keys)
        self.heads, self.levels, self.points = heads, levels, points

    def __call__(
        self,
        x: Float[Array, "q c"],
        references: Float[Array, "q _ n"],
        features: Sequence[Float[Array, "c _ _"]],
        valid: Sequence[Bool[Array, "_ _"]] | None = None,
    ) -> Float[Array, "q c"]:
        """Attends to `features`.

        - `references`: a box `cxcywh` or a point `xy` for each query on each level, or one for all levels. Relative to
          the maps, in 0..1.
        - `valid`: the cells of each map that count; the values of the others are 0. Default: all.
        """
        sizes = {"a": self.heads, "l": self.levels, "p": self.points}
        offsets = rearrange(linear(self.offsets, x), "q (a l p xy) -> q a l p xy", xy=2, **sizes)
        offsets, references = offsets.astype(references.dtype), rearrange(references, "q l n -> q 1 l 1 n")
        if references.shape[-1] == 4:
            centres, sides = jnp.split(references, 2, axis=-1)
            locations = centres + offsets / self.points * sides / 2
        else:
            cells = jnp.array([[level.shape[2], level.shape[1]] for level in features], offsets.dtype)
            locations = references + offsets / rearrange(cells, "l xy -> 1 1 l 1 xy")
        logits = rearrange(linear(self.weights, x), "q (a lp) -> q a lp", a=self.heads)
        weights = jax.nn.softmax(upcast(logits), axis=-1)
        weights = rearrange(weights, "q a (l p) -> q a l p", p=self.points)
        values = [self._values(level) for level in features]
        if valid is not None:
            values = [jnp.where(mask[None, None], v, 0) for v, mask in zip(values, valid, strict=True)]
        return linear(self.projection, rearrange(deformable_attention(values, locations, weights), "q a d -> q (a d)"))

    def _values(self, x: Float[Array, "c h w"]) -> Float[Array, "a d h w"]:
        y = linear(self.values, rearrange(x, "c h w -> h w c"))
        return rearrange(y, "h w (a d) -> a d h w", a=self.heads)


def _directions(heads: int, levels: int, points: int) -> Float[Array, " n"]:
    """Initial offsets: heads look in equally spaced directions, each point one step further than the one before it."""
    angles = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    direction /= np.abs(direction).max(axis=1, keepdims=True)  # onto a square
    steps = np.arange(1, points + 1)
    offsets = np.broadcast_to(direction[:, None, None] * steps[:, None], (heads, levels, points, 2))
    return jnp.asarray(offsets.reshape(-1), jnp.result_type(float))


def _constant(layer: eqx.nn.Linear, bias: Float[Array, " o"]) -> eqx.nn.Linear:
    """The layer with zero weights and a given bias."""
    return eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (jnp.zeros_like(layer.weight), bias))


def xavier_linear(in_size: int, out_size: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A linear layer with Glorot's uniform weights and no bias at first, as in DETR's transformer."""
    layer = eqx.nn.Linear(in_size, out_size, key=key)
    weight = xavier_uniform(key, (out_size, in_size))
    return eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (weight, jnp.zeros(out_size)))


class ReLUMLP(eqx.Module):
    """Linear layers with a ReLU after each but the last, applied to the last axis. DETR's `MLP`."""

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, in_size: int, hidden_size: int, out_size: int, *, depth: int, key: PRNGKeyArray):
        """Initialises the layers. `depth`: their number."""
        sizes = (in_size, *(hidden_size,) * (depth - 1), out_size)
        keys = jr.split(key, depth)
        self.layers = tuple(eqx.nn.Linear(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True))

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        for layer in self.layers[:-1]:
            x = relu(linear(layer, x))
        return linear(self.layers[-1], x)
