"""Plain vision transformers (arXiv:2010.11929) as backbones, and the pyramid of ViTDet (arXiv:2203.16527)."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jax import lax
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float, PRNGKeyArray

from ..ops import resize_bicubic
from ._attention import INITIAL_SCALE, RelativeOffsets, TransformerBlock, gelu, new_patches, run_blocks
from ._conv import Conv2d, Upsample2x2, lecun_uniform, max_pool2d
from ._fpn import SUBSAMPLED_TOP, SubsampledTop, check_canvas
from ._norm import LayerNorm, LayerNorm2d
from ._windows import Windows


# Side in patches of the images on which published weights were trained: 224 / 16.
PRETRAINED_SIDE = 14


class PatchPositions(eqx.Module):
    """A vector per patch of a square image, interpolated for other sizes: the positions of ViT.

    - `antialias`: whether the interpolation is that of DINOv2, bicubic with antialiasing, rather than `resize_bicubic`.
      torch's kernels of both differ even where the grid grows.
    """

    table: Float[Array, "n c"]
    antialias: bool = eqx.field(static=True)

    def __init__(self, side: int, channels: int, *, key: PRNGKeyArray, antialias: bool = False):
        """Initialises the table. `side`: that of the image in patches."""
        self.table = truncated_normal(INITIAL_SCALE)(key, (side**2, channels))
        self.antialias = antialias

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "m c"]:
        """Returns the vectors of a grid of `(h, w)` patches, in row-major order."""
        side = math.isqrt(len(self.table))
        if grid == (side, side):
            return self.table
        square = rearrange(self.table, "(h w) c -> c h w", h=side)
        if self.antialias:
            resized = jax.image.resize(square, (len(square), *grid), "cubic", precision=lax.Precision.HIGHEST)
        else:
            resized = resize_bicubic(square, grid)
        return rearrange(resized, "c h w -> (h w) c")


class ViT(eqx.Module):
    """A vision transformer without its classifier. Maps an image `(i, h, w)` to one map of tokens, `(c, h/p, w/p)`.

    - `positions`: added to the patches.
    - `class_token`: a token beside those of the patches, with its position added, which is not part of the map; `None`
      in ViTDet.
    - `windows`: for each block, the side in tokens of the windows in which its attention stays; 0 for all tokens.
    - `norm`: of the last tokens; `None` in ViTDet.
    - `checkpoint`: whether to use rematerialisation, see `ResNet`.
    """

    patches: Conv2d
    positions: PatchPositions
    class_token: Float[Array, "1 c"] | None
    blocks: tuple[TransformerBlock, ...]
    norm: LayerNorm | None
    windows: tuple[int, ...] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        *,
        key: PRNGKeyArray,
        patch_size: int = 16,
        side: int = PRETRAINED_SIDE,
        window: int = 0,
        global_blocks: tuple[int, ...] = (),
        relative_side: int | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm: Callable[[int], LayerNorm] | None = None,
        class_token: bool = False,
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Initialises the transformer.

        - `side`: that of the square images of `positions`, in patches.
        - `window`: side of windows in tokens; 0 for global attention in all blocks. `global_blocks`: positions of the
          blocks that attend to all tokens all the same.
        - `relative_side`: side in tokens of the square images for which blocks with global attention have relative
          positions; those of windows are for their size. `None` for no relative positions.
        - `drop_path`: that of the last block; it rises linearly from 0 in the first. `layer_scale`: initial value of
          the branches' factors, see `TransformerBlock`.
        - `class_token`: whether there is one. It has no place in windows or among relative positions.
        """
        if class_token and (window or relative_side is not None):
            raise ValueError("A class token has no place in windows or among relative positions. Leave it out.")
        keys = jr.split(key, depth + 3)
        self.class_token = truncated_normal(INITIAL_SCALE)(keys[2], (1, channels)) if class_token else None
        self.patches = new_patches(in_channels, channels, patch_size, key=keys[0])
        self.positions = PatchPositions(side, channels, key=keys[1])
        self.windows = tuple(0 if i in global_blocks else window for i in range(depth))
        blocks = []
        for i, size in enumerate(self.windows):
            positions = None
            if relative_side is not None:
                extent = size or relative_side
                positions = RelativeOffsets((extent, extent), channels // heads)
            rate = drop_path * i / max(depth - 1, 1)
            options = {"positions": positions, "drop_path": rate, "layer_scale": layer_scale}
            blocks.append(TransformerBlock(channels, heads, key=keys[i + 3], **options))
        self.blocks = tuple(blocks)
        self.norm = None if norm is None else norm(channels)
        self.checkpoint = checkpoint

    @property
    def channels(self) -> int:
        """Number of channels of a token."""
        return self.positions.table.shape[1]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels: the stride of the map."""
        return self.patches.stride

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The patches with their positions, and each block. The class token and the last norm are part of none."""
        return ((self.patches, self.positions), *((block,) for block in self.blocks))

    def __call__(self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None) -> Float[Array, "c gh gw"]:
        """Returns the map of the last block. `key`: for the drop path; without one, no branch is left out."""
        x = self.patches(image.astype(self.patches.weight.dtype))  # (c, h / p, w / p)
        grid = (x.shape[1], x.shape[2])
        x = rearrange(x, "c h w -> (h w) c") + self.positions(grid).astype(x.dtype)
        tokens = 0
        if self.class_token is not None:
            x, tokens = jnp.concatenate([self.class_token.astype(x.dtype), x]), 1
        windows = [Windows(grid, size) for size in self.windows]
        x = run_blocks(self.blocks, windows, x, key=key, checkpoint=self.checkpoint)
        x = x if self.norm is None else self.norm(x)
        return rearrange(x[tokens:], "(h w) c -> c h w", h=grid[0])


class SimpleLevel(eqx.Module):
    """One level of `ViTFPN`: the map at another size, then a 1×1 and a 3×3 convolution, each with a norm.

    `upsample` are transposed convolutions that double the sides, with a norm and a GELU between two of them. `pool`:
    whether the sides are halved by max pooling.
    """

    upsample: tuple[Upsample2x2, ...]
    norm: LayerNorm2d | None
    lateral: Conv2d
    lateral_norm: LayerNorm2d
    output: Conv2d
    output_norm: LayerNorm2d
    pool: bool = eqx.field(static=True)

    def __init__(self, in_channels: int, channels: int, *, doublings: int, key: PRNGKeyArray):
        """Initialises the level. `doublings`: how often the sides are doubled, 0..2, or -1 for half the sides."""
        keys = jr.split(key, 4)
        widths = [in_channels // 2**i for i in range(max(doublings, 0) + 1)]
        self.upsample = tuple(Upsample2x2(widths[i], widths[i + 1], key=keys[i]) for i in range(len(widths) - 1))
        self.norm = LayerNorm2d(widths[1]) if len(self.upsample) == 2 else None
        self.lateral = Conv2d(widths[-1], channels, 1, use_bias=False, init=lecun_uniform, key=keys[2])
        self.lateral_norm = LayerNorm2d(channels)
        self.output = Conv2d(channels, channels, 3, use_bias=False, init=lecun_uniform, key=keys[3])
        self.output_norm = LayerNorm2d(channels)
        self.pool = doublings < 0

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "c h2 w2"]:
        if self.pool:
            x = max_pool2d(x, kernel_size=2, stride=2)
        for i, upsample in enumerate(self.upsample):
            x = upsample(x)
            if i == 0 and self.norm is not None:
                x = gelu(self.norm(x))
        return self.output_norm(self.output(self.lateral_norm(self.lateral(x))))


class ViTFPN(eqx.Module):
    """A vision transformer with the simple feature pyramid of ViTDet (arXiv:2203.16527, section 3).

    Each level is computed from the transformer's one map. With patches of 16 pixels, an image is mapped to P2..P6 with
    strides 4, 8, 16, 32 and 64. Height and width must be multiples of 32, the `divisor`. Other sizes raise a
    `ValueError` when the call is traced.
    """

    body: ViT
    levels: tuple[SimpleLevel, ...]
    top: SubsampledTop
    channels: int = eqx.field(static=True)

    def __init__(self, body: ViT, *, key: PRNGKeyArray, channels: int = 256, top: SubsampledTop = SUBSAMPLED_TOP):
        """Builds the pyramid. `channels`: of each level. `top`: the coarser levels above it, see `FPN`."""
        keys = jr.split(key, 4)
        self.body = body
        self.levels = tuple(
            SimpleLevel(body.channels, channels, doublings=doublings, key=k)
            for doublings, k in zip((2, 1, 0, -1), keys, strict=True)
        )
        self.top = top
        self.channels = channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels."""
        return tuple(self.body.patch_size * 2**i // 4 for i in range(len(self.levels) + self.top.levels))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The patches with their positions, and each block of the transformer."""
        return self.body.stages

    @property
    def divisor(self) -> int:
        """Sides of an image must be multiples of this, which is two patches."""
        return 2 * self.body.patch_size

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        check_canvas(image, self.divisor)
        x = self.body(image, key=key)
        outputs = tuple(level(x) for level in self.levels)
        return (*outputs, *self.top((x,), outputs))


def vit_b(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> ViT:
    """ViT-B: 12 blocks of 768 channels and 12 heads, 85.6 million parameters. `options`: those of `ViT`.

    >>> body = eqx.filter_eval_shape(lambda: vit_b(key=jr.key(0)))  # shapes only
    >>> len(body.blocks), body.patches.weight.shape
    (12, (768, 3, 16, 16))
    """
    return ViT(768, 12, 12, key=key, checkpoint=checkpoint, **options)


def vit_l(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> ViT:
    """ViT-L: 24 blocks of 1024 channels and 16 heads, 303 million parameters. `options`: those of `ViT`.

    >>> body = eqx.filter_eval_shape(lambda: vit_l(key=jr.key(0)))  # shapes only
    >>> len(body.blocks)
    24
    """
    return ViT(1024, 24, 16, key=key, checkpoint=checkpoint, **options)


def vit_h(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> ViT:
    """ViT-H: 32 blocks of 1280 channels and 16 heads, 631 million parameters. `options`: those of `ViT`.

    >>> body = eqx.filter_eval_shape(lambda: vit_h(key=jr.key(0)))  # shapes only
    >>> len(body.blocks)
    32
    """
    return ViT(1280, 32, 16, key=key, checkpoint=checkpoint, **options)
