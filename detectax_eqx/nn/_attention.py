"""Attention over tokens, and the block of vision transformers."""

import math
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from einops import rearrange
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import attend, erf, rematerialise
from ..ops import upcast
from ._conv import Conv2d, lecun_uniform
from ._norm import LayerNorm
from ._tensor import is_piece, split_from, sum_parts
from ._windows import Grouping


# Standard deviation of initial weights, biases and positions (ViT, arXiv:2010.11929, and BERT before it).
INITIAL_SCALE = 0.02

# Terms that are added to the logits of pairs of tokens: axes are windows, heads, queries, and the rows and columns of
# the keys. An axis of length 1 stands for equal values.
Biases = tuple[Float[Array, "_ _ _ _ _"], ...]


def linear(layer: eqx.nn.Linear, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Applies a linear layer to the last axis. If its inputs are cut over devices, sums over them.

    >>> layer = eqx.nn.Linear(2, 3, key=jr.key(0))
    >>> linear(layer, jnp.zeros((5, 4, 2))).shape
    (5, 4, 3)
    """
    y = jnp.einsum("...i,oi->...o", x, layer.weight)
    y = sum_parts(y) if is_piece(layer) else y
    return y if layer.bias is None else y + layer.bias.reshape((1,) * (x.ndim - 1) + (-1,))


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x Φ(x)` with the normal distribution function, not its approximation by `tanh` (arXiv:1606.08415).

    >>> round(float(gelu(jnp.array(1.0))), 4)
    0.8413
    """
    return x * (0.5 + 0.5 * erf(x * math.sqrt(0.5)))


def drop_path(x: Float[Array, "*s"], rate: float, *, key: PRNGKeyArray | None) -> Float[Array, "*s"]:
    """Sets the branch `x` of a residual block to 0 with probability `rate`, and scales it otherwise to keep the mean.

    Stochastic depth (arXiv:1603.09382), of one example as a whole. Without a key, returns `x`.

    Raises a `ValueError` for a rate outside 0..1, 1 excluded.

    >>> drop_path(jnp.ones(2), 0.5, key=None).tolist()
    [1.0, 1.0]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in 0..1, 1 excluded, got {rate}.")
    if key is None or rate == 0:
        return x
    kept = jr.bernoulli(key, jnp.asarray(1 - rate, jnp.float32))  # the same with x64
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def attention(
    q: Float[Array, "g a n d"], k: Float[Array, "g a m d"], v: Float[Array, "g a m d"], biases: Biases = ()
) -> Float[Array, "g a n d"]:
    """Computes `softmax(q kᵀ / √d + biases) v` for `g` windows and `a` heads, with the softmax in float32 or higher.

    >>> q, v = jnp.zeros((1, 1, 1, 4)), jnp.arange(8.0).reshape(1, 1, 2, 4)
    >>> attention(q, q[:, :, [0, 0]], v)[0, 0].tolist()
    [[2.0, 3.0, 4.0, 5.0]]
    """
    return attend(_attention, q * q.shape[3] ** -0.5, k, v, biases)


def _attention(q, k, v, biases: Biases):
    logits = upcast(jnp.einsum("gand,gamd->ganm", q, k))
    if biases:
        height, width = np.broadcast_shapes(*(bias.shape[3:] for bias in biases))
        separate = logits.reshape(*logits.shape[:3], height, width)
        logits = sum((bias.astype(logits.dtype) for bias in biases), separate).reshape(logits.shape)
    return jnp.einsum("ganm,gamd->gand", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


class RelativeOffsets(eqx.Module):
    """Relative positions, separate for rows and columns: the logit of a pair has `q · (vertical + horizontal)` added.

    The decomposed relative positions of MViTv2 (arXiv:2112.01526, section 4.1) and ViTDet. Their vectors belong to the
    offsets `-(side - 1)..side - 1`, and are interpolated for windows of another size.
    """

    vertical: Float[Array, "l d"]
    horizontal: Float[Array, "m d"]

    def __init__(self, shape: tuple[int, int], size: int):
        """Initialises with zeros. `shape`: `(height, width)` of a window in tokens. `size`: that of a head."""
        self.vertical, self.horizontal = (jnp.zeros((2 * side - 1, size)) for side in shape)

    def __call__(self, q: Float[Array, "g a n d"], shape: tuple[int, int]) -> Biases:
        height, width = shape
        q = rearrange(q, "g a (h w) d -> g a h w d", h=height, w=width)
        rows = jnp.einsum("gahwd,hkd->gahwk", q, _by_offset(self.vertical, height))
        columns = jnp.einsum("gahwd,wkd->gahwk", q, _by_offset(self.horizontal, width))
        rows = rearrange(rows, "g a h w k -> g a (h w) k 1")
        return rows, rearrange(columns, "g a h w k -> g a (h w) 1 k")


def _by_offset(vectors: Float[Array, "l d"], side: int) -> Float[Array, "{side} {side} d"]:
    """The vector of each query and key along an axis."""
    count = 2 * side - 1
    if len(vectors) != count:
        vectors = jax.image.resize(vectors, (count, vectors.shape[1]), "linear", antialias=False)
    offset = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
    return vectors[offset]


class PositionBias(eqx.Module):
    """Relative positions in a square window: a table of what is added to the logit of a pair, by offset and head.

    Swin Transformer's (arXiv:2103.14030, section 3.2). Row `(dy + side - 1) * (2 * side - 1) + dx + side - 1` belongs
    to a query `dy` rows below and `dx` columns right of its key.
    """

    table: Float[Array, "l a"]

    def __init__(self, side: int, heads: int, *, key: PRNGKeyArray):
        """Initialises the table. `side`: that of a window in tokens."""
        self.table = truncated_normal(INITIAL_SCALE)(key, ((2 * side - 1) ** 2, heads))

    def __call__(self, q: Float[Array, "g a n d"], shape: tuple[int, int]) -> Biases:
        side = shape[0]
        y, x = (axis.ravel() for axis in np.indices(shape))
        offset = (y[:, None] - y[None, :] + side - 1) * (2 * side - 1) + x[:, None] - x[None, :] + side - 1  # (n, n)
        return (rearrange(self.table[offset], "n (h w) a -> 1 a n h w", h=side),)


Positions = RelativeOffsets | PositionBias


class Projections(eqx.Module):
    """Linear layers to the queries, the keys and the values of all heads, in this order."""

    weight: Float[Array, "3 o i"]
    bias: Float[Array, "3 o"]

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        self.weight = truncated_normal(INITIAL_SCALE)(key, (3, channels, channels))
        self.bias = jnp.zeros((3, channels))

    def __call__(self, x: Float[Array, "g m i"], head_size: int) -> tuple[Float[Array, "g a m d"], ...]:
        y = jnp.einsum("gmi,toi->gmto", x, self.weight) + self.bias[None, None]
        return tuple(rearrange(y, "g m t (a d) -> t g a m d", d=head_size))


class SelfAttention(eqx.Module):
    """Multi-head self-attention within windows (arXiv:1706.03762). Its heads may be cut over devices."""

    qkv: Projections
    projection: eqx.nn.Linear
    positions: Positions | None
    heads: int = eqx.field(static=True)

    def __init__(self, channels: int, heads: int, *, key: PRNGKeyArray, positions: Positions | None = None):
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels, got {channels} channels and {heads} heads.")
        keys = jr.split(key)
        self.qkv = Projections(channels, key=keys[0])
        self.projection = new_linear(channels, channels, key=keys[1])
        self.positions = positions
        self.heads = heads

    def __call__(
        self, x: Float[Array, "g m c"], shape: tuple[int, int], mask: Float[Array, "g 1 m _ _"] | None = None
    ) -> Float[Array, "g m c"]:
        """Attends within each window of `shape` tokens. `mask`: what is added to the logits of all heads."""
        positions = self.positions
        if is_piece(self.projection):
            x = split_from(x)
            positions = split_from(positions) if isinstance(positions, RelativeOffsets) else positions
        q, k, v = self.qkv(x, head_size=x.shape[2] // self.heads)
        biases = () if positions is None else positions(q, shape)
        biases = biases if mask is None else (*biases, mask)
        return linear(self.projection, rearrange(attention(q, k, v, biases), "g a m d -> g m (a d)"))

    def tensor_axes(self, count: int) -> dict[str, int]:
        """The axes along which arrays may be cut over `count` devices, by their names: none if heads do not divide."""
        axes = {"qkv.weight": 1, "qkv.bias": 1, "projection.weight": 1, "positions.table": 1}
        return {} if self.heads % count else axes


class MLP(eqx.Module):
    """Two linear layers with a GELU between them, applied to each token. Its hidden values may be cut over devices."""

    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear

    def __init__(self, channels: int, hidden_size: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.fc1 = new_linear(channels, hidden_size, key=keys[0])
        self.fc2 = new_linear(hidden_size, channels, key=keys[1])

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        x = split_from(x) if is_piece(self.fc2) else x
        return linear(self.fc2, gelu(linear(self.fc1, x)))

    def tensor_axes(self, count: int) -> dict[str, int]:
        """As in `SelfAttention`."""
        return {} if self.fc2.in_features % count else {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}


class LayerScale(eqx.Module):
    """Multiplies each channel by a factor that is learnt (arXiv:2103.17239)."""

    scale: Float[Array, " c"]

    def __init__(self, channels: int, *, initial: float = 1e-5):
        self.scale = jnp.full(channels, initial)

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        return x * self.scale.reshape((1,) * (x.ndim - 1) + (-1,))


class TransformerBlock(eqx.Module):
    """Self-attention within windows and an MLP, each after a norm and beside a shortcut.

    The block of ViT, ViTDet, DINOv2 and Swin Transformer, which differ in their windows and positions, and in whether
    branches have a `LayerScale`.
    """

    norm1: LayerNorm
    attention: SelfAttention
    scale1: LayerScale | None
    norm2: LayerNorm
    mlp: MLP
    scale2: LayerScale | None
    drop_path: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        key: PRNGKeyArray,
        positions: Positions | None = None,
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        epsilon: float = 1e-6,
    ):
        """Initialises the block.

        - `positions`: of the attention. `mlp_ratio`: hidden size of the MLP by `channels`.
        - `drop_path`: probability with which a branch is left out in training. `layer_scale`: initial value of the
          branches' factors; `None` for no factors. `epsilon`: of the norms.
        """
        keys = jr.split(key)
        self.norm1, self.norm2 = (LayerNorm(channels, eps=epsilon) for _ in range(2))
        self.attention = SelfAttention(channels, heads, key=keys[0], positions=positions)
        self.mlp = MLP(channels, mlp_ratio * channels, key=keys[1])
        self.scale1, self.scale2 = (
            None if layer_scale is None else LayerScale(channels, initial=layer_scale) for _ in range(2)
        )
        self.drop_path = drop_path

    def __call__(
        self, x: Float[Array, "n c"], windows: Grouping, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "n c"]:
        """Returns the next tokens of a grid. `key`: for the drop path; without one, no branch is left out."""
        keys = (None, None) if key is None else jr.split(key)
        y = self.attention(windows.split(self.norm1(x)), windows.shape, windows.mask)
        y = windows.merge(y)
        x = x + drop_path(y if self.scale1 is None else self.scale1(y), self.drop_path, key=keys[0])
        y = self.mlp(self.norm2(x))
        return x + drop_path(y if self.scale2 is None else self.scale2(y), self.drop_path, key=keys[1])


def run_blocks(
    blocks: Sequence[TransformerBlock],
    windows: Sequence[Grouping],
    x: Float[Array, "n c"],
    *,
    key: PRNGKeyArray | None,
    checkpoint: bool,
) -> Float[Array, "n c"]:
    """Runs blocks one after another, each with its windows. `checkpoint`: whether to use rematerialisation."""
    keys = [None] * len(blocks) if key is None else jr.split(key, len(blocks))
    for block, own, block_key in zip(blocks, windows, keys, strict=True):
        run = eqx.Partial(_run_block, block, own, block_key)
        x = rematerialise(run, x) if checkpoint else run(x)
    return x


def _run_block(
    block: TransformerBlock, windows: Grouping, key: PRNGKeyArray | None, x: Float[Array, "n c"]
) -> Float[Array, "n c"]:
    return block(x, windows, key=key)


def new_patches(in_channels: int, channels: int, size: int, *, key: PRNGKeyArray) -> Conv2d:
    """A linear layer on each patch of `size × size` pixels, as a convolution."""
    return Conv2d(in_channels, channels, size, stride=size, padding=0, init=lecun_uniform, key=key)


def new_linear(in_size: int, out_size: int, *, key: PRNGKeyArray, use_bias: bool = True) -> eqx.nn.Linear:
    """A linear layer with small normal weights and no bias at first, as in vision transformers."""
    layer = eqx.filter_eval_shape(partial(eqx.nn.Linear, in_size, out_size, use_bias=use_bias), key=key)
    weight = truncated_normal(INITIAL_SCALE)(key, (out_size, in_size))
    layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    return eqx.tree_at(lambda layer: layer.bias, layer, jnp.zeros(out_size)) if use_bias else layer
