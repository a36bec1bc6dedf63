"""The vision transformer of LW-DETR (arXiv:2406.03459) and RF-DETR (arXiv:2511.09554), and its projection."""

from functools import partial, reduce
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange, repeat
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float, PRNGKeyArray

from ._attention import INITIAL_SCALE, TransformerBlock, new_patches, run_blocks
from ._conv import Conv2d, Upsample2x2, lecun_uniform, relu, silu
from ._fpn import check_canvas
from ._mobilenet import ConvNorm
from ._norm import LayerNorm, LayerNorm2d, Norm
from ._vit import PatchPositions
from ._windows import Groups


# Maps with more channels are narrowed before their sides are doubled.
WIDEST = 512


class ClassToken(eqx.Module):
    """A token that belongs to no patch, and its position, which is added to it."""

    token: Float[Array, "1 c"]
    position: Float[Array, "1 c"]

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.token, self.position = (truncated_normal(INITIAL_SCALE)(k, (1, channels)) for k in keys)

    def __call__(self) -> Float[Array, "1 c"]:
        return self.token + self.position


class WindowedViT(eqx.Module):
    """A vision transformer whose image is cut into `windows × windows` windows.

    The blocks at the positions `global_blocks` attend to all tokens of all windows, the others to those of a window.
    Returns the tokens of several blocks as maps `(c, h/p, w/p)`. RF-DETR's DINOv2 (arXiv:2304.07193) has a class token
    and a norm, LW-DETR's transformer has neither.

    - `class_token`: copied into each window, and not part of the maps; or `None`.
    - `taps`: the number of blocks before each map. `norm`: that of all maps, or `None`.
    - `checkpoint`: whether to use rematerialisation, see `ResNet`.
    """

    patches: Conv2d
    positions: PatchPositions
    class_token: ClassToken | None
    blocks: tuple[TransformerBlock, ...]
    norm: LayerNorm | None
    windows: int = eqx.field(static=True)
    global_blocks: tuple[int, ...] = eqx.field(static=True)
    taps: tuple[int, ...] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        key: PRNGKeyArray,
        patch_size: int,
        side: int,
        windows: int,
        taps: tuple[int, ...],
        global_blocks: tuple[int, ...] | None = None,
        class_token: bool = True,
        norm: bool = True,
        antialias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float = 1.0,
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Initialises the transformer.

        - `side`: that of the square images of `positions`, in patches.
        - `windows`: along each side of an image. `taps`: see the class. There are as many blocks as the last map needs.
        - `global_blocks`: see the class; default the block after each map but the last.
        - `class_token`, `norm`: whether there are any. `antialias`: of the positions, see `PatchPositions`.
        - `drop_path`: that of the last block; it rises linearly from 0 in the first. `layer_scale`: initial value of
          the branches' factors.
        """
        if not taps or sorted(set(taps)) != list(taps) or taps[0] < 1:
            raise ValueError(f"taps must be increasing numbers of blocks, got {taps}.")
        depth = taps[-1]
        keys = jr.split(key, depth + 3)
        self.patches = new_patches(in_channels, channels, patch_size, key=keys[0])
        self.positions = PatchPositions(side, channels, key=keys[1], antialias=antialias)
        self.class_token = ClassToken(channels, key=keys[2]) if class_token else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = tuple(
            TransformerBlock(channels, heads, key=k, drop_path=rate, layer_scale=layer_scale)
            for k, rate in zip(keys[3:], rates, strict=True)
        )
        self.norm = LayerNorm(channels) if norm else None
        self.windows = windows
        self.global_blocks = taps[:-1] if global_blocks is None else global_blocks
        self.taps = taps
        self.checkpoint = checkpoint

    @property
    def channels(self) -> int:
        """Number of channels of a token."""
        return self.positions.table.shape[1]

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The patches with their positions and the class token, and each block. The norm is part of none."""
        token = () if self.class_token is None else (self.class_token,)
        return ((self.patches, self.positions, *token), *((block,) for block in self.blocks))

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c gh gw"], ...]:
        """Returns the maps of `taps`. `key`: for the drop path; without one, no branch is left out."""
        x = self.patches(image.astype(self.patches.weight.dtype))  # (c, h / p, w / p)
        grid = (x.shape[1], x.shape[2])
        x = rearrange(x, "c h w -> (h w) c") + self.positions(grid).astype(x.dtype)
        x = rearrange(x, "(r i s j) c -> (r s) (i j) c", r=self.windows, s=self.windows, i=grid[0] // self.windows)
        if self.class_token is not None:
            token = repeat(self.class_token().astype(x.dtype), "1 c -> g 1 c", g=len(x))
            x = jnp.concatenate([token, x], axis=1)  # (g, 1 + i j, c)
        within, across = Groups(x.shape[0], x.shape[1]), Groups(1, x.shape[0] * x.shape[1])
        x = within.merge(x)
        windows = [across if i in self.global_blocks else within for i in range(len(self.blocks))]
        keys = [None] * len(self.taps) if key is None else jr.split(key, len(self.taps))
        maps, first = [], 0
        for tap, part_key in zip(self.taps, keys, strict=True):
            part = slice(first, tap)
            x = run_blocks(self.blocks[part], windows[part], x, key=part_key, checkpoint=self.checkpoint)
            tokens = within.split(x if self.norm is None else self.norm(x))
            tokens = tokens if self.class_token is None else tokens[:, 1:]  # (g, i j, c)
            sizes = {"r": self.windows, "i": grid[0] // self.windows}
            maps.append(rearrange(tokens, "(r s) (i j) c -> c (r i) (s j)", **sizes))
            first = tap
        return tuple(maps)


class C2f(eqx.Module):
    """Cross-stage partial convolutions: a map is halved by channels, one half runs through blocks, and all are joined.

    Each block is two 3×3 convolutions, on the output of the one before it; the join takes both halves and the outputs
    of all blocks. Every convolution has a norm and a SiLU. The projector of LW-DETR (arXiv:2406.03459).
    """

    split: ConvNorm
    blocks: tuple[tuple[ConvNorm, ConvNorm], ...]
    join: ConvNorm

    def __init__(self, in_channels: int, channels: int, *, depth: int, key: PRNGKeyArray, norm: Norm = LayerNorm2d):
        """Initialises the layer. `depth`: number of blocks."""
        keys = jr.split(key, 2 * depth + 2)
        half = channels // 2
        options = {"norm": norm, "activation": silu, "init": lecun_uniform}
        self.split = ConvNorm(in_channels, 2 * half, 1, key=keys[0], **options)
        self.blocks = tuple(
            (ConvNorm(half, half, key=keys[2 * i + 2], **options), ConvNorm(half, half, key=keys[2 * i + 3], **options))
            for i in range(depth)
        )
        self.join = ConvNorm((2 + depth) * half, channels, 1, key=keys[1], **options)

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "c h w"]:
        x = self.split(x)
        parts = [x[: len(x) // 2], x[len(x) // 2 :]]
        for first, second in self.blocks:
            parts.append(second(first(parts[-1])))
        return self.join(jnp.concatenate(parts))


class ProjectedViT(eqx.Module):
    """A `WindowedViT` whose maps are joined and projected to `channels` at one size or more: RF-DETR's and LW-DETR's.

    - `resizes`: for each level and each map of the body, the layers that change its sides; none if they are kept.

    Height and width must be multiples of patch size × windows, the `divisor`. Other sizes raise a `ValueError` when the
    call is traced. Halved sides are rounded up.
    """

    body: WindowedViT
    resizes: tuple[tuple[tuple[ConvNorm | Upsample2x2, ...], ...], ...]
    projectors: tuple[C2f, ...]
    norms: tuple[LayerNorm2d, ...]
    channels: int = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        body: WindowedViT,
        *,
        key: PRNGKeyArray,
        channels: int = 256,
        depth: int = 3,
        norm: Norm = LayerNorm2d,
        doublings: tuple[int, ...] = (0,),
    ):
        """Builds the projectors.

        - `depth`: number of blocks of each. `norm`: of convolutions.
        - `doublings`: for each level, how often the sides of the maps are doubled: 1, 0, or -1 for half the sides.
        """
        if not doublings or not set(doublings) <= {-1, 0, 1}:
            raise ValueError(f"doublings must be -1, 0 or 1 for each level, got {doublings}.")
        self.body = body
        resizes, projectors = [], []
        for count, level_key in zip(doublings, jr.split(key, len(doublings)), strict=True):
            first, *keys = jr.split(level_key, len(body.taps) + 1)
            made = [_resize(body.channels, count, norm=norm, key=k) for k in keys]
            resizes.append(tuple(layers for layers, _ in made))
            projectors.append(C2f(sum(width for _, width in made), channels, depth=depth, key=first, norm=norm))
        self.resizes, self.projectors = tuple(resizes), tuple(projectors)
        self.norms = tuple(LayerNorm2d(channels) for _ in doublings)
        self.channels = channels
        self.strides = tuple(int(body.patches.stride * 0.5**count) for count in doublings)

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """Those of the transformer."""
        return self.body.stages

    @property
    def divisor(self) -> int:
        """Sides of an image must be multiples of this."""
        return self.body.patches.stride * self.body.windows

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        check_canvas(image, self.divisor)
        maps = self.body(image, key=key)
        levels = []
        for resize, project, norm in zip(self.resizes, self.projectors, self.norms, strict=True):
            parts = [reduce(lambda x, layer: layer(x), layers, x) for layers, x in zip(resize, maps, strict=True)]
            levels.append(norm(project(jnp.concatenate(parts))))
        return tuple(levels)


def _resize(
    channels: int, doublings: int, *, norm: Norm, key: PRNGKeyArray
) -> tuple[tuple[ConvNorm | Upsample2x2, ...], int]:
    """The layers that double or halve the sides of a map, and the number of channels of their result."""
    conv = partial(ConvNorm, channels, norm=norm, activation=relu, init=lecun_uniform)
    if doublings == 0:
        return (), channels
    if doublings < 0:
        return (conv(channels, stride=2, key=key),), channels
    if channels <= WIDEST:
        return (Upsample2x2(channels, channels // 2, key=key),), channels // 2
    keys = jr.split(key)
    narrow = conv(channels // 2, 1, key=keys[0])
    return (narrow, Upsample2x2(channels // 2, channels // 4, key=keys[1])), channels // 4
