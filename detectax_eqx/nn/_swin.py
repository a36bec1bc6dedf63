"""Swin Transformer (arXiv:2103.14030) as a backbone."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from ._attention import PositionBias, TransformerBlock, linear, new_linear, new_patches, run_blocks
from ._conv import Conv2d
from ._norm import LayerNorm
from ._windows import Windows


# Swin's norms have torch's epsilon, not that of ViT.
EPSILON = 1e-5


class PatchMerging(eqx.Module):
    """Halves the sides of a grid of tokens: joins each 2×2 block to one token, then a norm and a linear layer.

    An odd side is padded with a row or column of zeros.
    """

    norm: LayerNorm
    reduction: eqx.nn.Linear

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        self.norm = LayerNorm(4 * channels, eps=EPSILON)
        self.reduction = new_linear(4 * channels, 2 * channels, key=key, use_bias=False)

    def __call__(self, x: Float[Array, "n c"], grid: tuple[int, int]) -> Float[Array, "m 2*c"]:
        """Returns the tokens of the smaller grid."""
        x = jnp.pad(x.reshape(*grid, -1), ((0, grid[0] % 2), (0, grid[1] % 2), (0, 0)))  # (h, w, c)
        x = rearrange(x, "(h i) (w j) c -> (h w) (j i c)", i=2, j=2)  # down the first column, then the second
        return linear(self.reduction, self.norm(x))


class SwinStage(eqx.Module):
    """Blocks on a grid of one size. Every second block has its windows shifted by half their side."""

    blocks: tuple[TransformerBlock, ...]
    window: int = eqx.field(static=True)
    shift_single: bool = eqx.field(static=True)

    def windows(self, grid: tuple[int, int]) -> tuple[Windows, ...]:
        """The windows of each block."""
        shift = [self.window // 2 if side > self.window or self.shift_single else 0 for side in grid]
        return tuple(
            Windows(grid, self.window, (shift[0], shift[1]) if i % 2 else (0, 0)) for i in range(len(self.blocks))
        )


class Swin(eqx.Module):
    """A Swin Transformer without its classifier. Maps an image `(i, h, w)` to the maps of its four stages.

    Their strides are 4, 8, 16 and 32; `channels` holds their widths. A stage's map is normalised by its own norm.

    - `merges`: what halves the grid between two stages.
    - `checkpoint`: whether to use rematerialisation, see `ResNet`.
    """

    patches: Conv2d
    patch_norm: LayerNorm
    layers: tuple[SwinStage, ...]
    merges: tuple[PatchMerging, ...]
    norms: tuple[LayerNorm, ...]
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        *,
        key: PRNGKeyArray,
        patch_size: int = 4,
        window: int = 7,
        shift_single: bool = True,
        drop_path: float = 0.2,
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Initialises the transformer.

        - `channels`: of the first stage; each stage has twice as many as the one before. `depths`, `heads`: number of
          blocks and of heads in each stage.
        - `window`: side of windows in tokens.
        - `shift_single`: whether windows are shifted even along an axis on which there is only one, as in the official
          detectors and Detectron2; torchvision does not shift it.
        - `drop_path`: that of the last block; it rises linearly from 0 in the first.
        """
        if len(depths) != len(heads):
            raise ValueError(f"depths and heads must be equally long, got {depths} and {heads}.")
        keys = jr.split(key, len(depths) + 1)
        self.patches = new_patches(in_channels, channels, patch_size, key=keys[0])
        self.patch_norm = LayerNorm(channels, eps=EPSILON)
        layers, merges, norms, before = [], [], [], 0
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            width = channels * 2**stage
            merge_key, *block_keys = jr.split(keys[stage + 1], 2 * depth + 1)
            blocks = []
            for i in range(depth):
                positions = PositionBias(window, count, key=block_keys[2 * i])
                rate = drop_path * (before + i) / max(sum(depths) - 1, 1)
                options = {"positions": positions, "drop_path": rate, "epsilon": EPSILON}
                blocks.append(TransformerBlock(width, count, key=block_keys[2 * i + 1], **options))
            layers.append(SwinStage(tuple(blocks), window, shift_single))
            norms.append(LayerNorm(width, eps=EPSILON))
            merges.append(PatchMerging(width, key=merge_key))
            before += depth
        self.layers, self.merges, self.norms = tuple(layers), tuple(merges[:-1]), tuple(norms)
        self.checkpoint = checkpoint

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels of each stage."""
        return tuple(len(norm.weight) for norm in self.norms)

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The patches with their norm, and each block, with what halves the grid before it.

        Norms of the maps are part of none.
        """
        stages: list[tuple[Any, ...]] = [(self.patches, self.patch_norm)]
        for i, layer in enumerate(self.layers):
            first = (self.merges[i - 1],) if i else ()
            stages += [(*first, layer.blocks[0]), *((block,) for block in layer.blocks[1:])]
        return tuple(stages)

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c fh fw"], ...]:
        """Returns the maps of the stages. `key`: for the drop path; without one, no branch is left out."""
        x = self.patches(image.astype(self.patches.weight.dtype))  # (c, h / 4, w / 4)
        grid, maps = (x.shape[1], x.shape[2]), []
        x = self.patch_norm(rearrange(x, "c h w -> (h w) c"))
        keys = [None] * len(self.layers) if key is None else jr.split(key, len(self.layers))
        for i, (layer, norm, layer_key) in enumerate(zip(self.layers, self.norms, keys, strict=True)):
            if i:
                x = self.merges[i - 1](x, grid)
                grid = -(-grid[0] // 2), -(-grid[1] // 2)
            x = run_blocks(layer.blocks, layer.windows(grid), x, key=layer_key, checkpoint=self.checkpoint)
            maps.append(rearrange(norm(x), "(h w) c -> c h w", h=grid[0]))
        return tuple(maps)


def swin_t(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> Swin:
    """Swin-T: 27.5 million parameters. `options`: those of `Swin`.

    >>> body = eqx.filter_eval_shape(lambda: swin_t(key=jr.key(0)))  # shapes only
    >>> body.channels, len(body.layers[2].blocks)
    ((96, 192, 384, 768), 6)
    """
    return Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), key=key, checkpoint=checkpoint, **options)


def swin_s(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> Swin:
    """Swin-S: 48.8 million parameters. `options`: those of `Swin`.

    >>> body = eqx.filter_eval_shape(lambda: swin_s(key=jr.key(0)))  # shapes only
    >>> body.channels, len(body.layers[2].blocks)
    ((96, 192, 384, 768), 18)
    """
    return Swin(96, (2, 2, 18, 2), (3, 6, 12, 24), key=key, checkpoint=checkpoint, **options)


def swin_b(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> Swin:
    """Swin-B: 86.7 million parameters. `options`: those of `Swin`.

    >>> body = eqx.filter_eval_shape(lambda: swin_b(key=jr.key(0)))  # shapes only
    >>> body.channels, len(body.layers[2].blocks)
    ((128, 256, 512, 1024), 18)
    """
    return Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), key=key, checkpoint=checkpoint, **options)


def swin_l(*, key: PRNGKeyArray, checkpoint: bool = False, **options: Any) -> Swin:
    """Swin-L: 195 million parameters. `options`: those of `Swin`.

    >>> body = eqx.filter_eval_shape(lambda: swin_l(key=jr.key(0)))  # shapes only
    >>> body.channels, len(body.layers[2].blocks)
    ((192, 384, 768, 1536), 18)
    """
    return Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), key=key, checkpoint=checkpoint, **options)
