"""ResNet (arXiv:1512.03385) as a feature extractor: torchvision's architecture, stride in the 3×3 convolution."""

from collections.abc import Callable

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import rematerialise, rematerialise_stem
from ._conv import Conv2d, max_pool2d, relu
from ._norm import FrozenBatchNorm, Norm


class Downsample(eqx.Module):
    """The shortcut of a block that changes the size or the width: a strided 1×1 convolution and a norm."""

    conv: Conv2d
    norm: Callable

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: Norm, key: PRNGKeyArray):
        self.conv = Conv2d(in_channels, out_channels, 1, stride=stride, use_bias=False, key=key)
        self.norm = norm(out_channels)

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        return self.norm(self.conv(x))


class BasicBlock(eqx.Module):
    """Two 3×3 convolutions and a shortcut: the block of ResNet-18 and 34."""

    conv1: Conv2d
    norm1: Callable
    conv2: Conv2d
    norm2: Callable
    downsample: Downsample | None
    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.conv1 = Conv2d(in_channels, channels, 3, stride=stride, use_bias=False, key=keys[0])
        self.norm1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, use_bias=False, key=keys[1])
        self.norm2 = norm(channels)
        changes = stride != 1 or in_channels != channels
        self.downsample = Downsample(in_channels, channels, stride=stride, norm=norm, key=keys[2]) if changes else None

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        y = relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(eqx.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut: the block of ResNet-50 and deeper."""

    conv1: Conv2d
    norm1: Callable
    conv2: Conv2d
    norm2: Callable
    conv3: Conv2d
    norm3: Callable
    downsample: Downsample | None
    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        out_channels = self.expansion * channels
        self.conv1 = Conv2d(in_channels, channels, 1, use_bias=False, key=keys[0])
        self.norm1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, stride=stride, use_bias=False, key=keys[1])
        self.norm2 = norm(channels)
        self.conv3 = Conv2d(channels, out_channels, 1, use_bias=False, key=keys[2])
        self.norm3 = norm(out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.downsample = (
            Downsample(in_channels, out_channels, stride=stride, norm=norm, key=keys[3]) if changes else None
        )

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        y = relu(self.norm1(self.conv1(x)))
        y = relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(eqx.Module):
    """A ResNet without its classifier. Maps an image `(i, h, w)`, usually RGB, to the maps C2..C5 of its four stages.

    Their strides are 4, 8, 16 and 32; `channels` holds their widths.
    """

    conv1: Conv2d
    norm1: Callable
    layers: tuple[tuple[Callable, ...], ...]
    channels: tuple[int, ...] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        key: PRNGKeyArray,
        norm: Norm = FrozenBatchNorm,
        width: int = 64,
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Builds the stem and the stages.

        - `depths`: number of blocks per stage. `width`: base width, 64 in the paper: the channels of the stem and of
          the blocks of the first stage, before their expansion.
        - `in_channels`: number of channels of the image.
        - `checkpoint`: whether to use rematerialisation: save only the input of each block for the backward pass and
          recompute everything else (arXiv:1604.06174).
        """
        stem_key, *stage_keys = jr.split(key, 5)
        self.conv1 = Conv2d(in_channels, width, 7, stride=2, use_bias=False, key=stem_key)
        self.norm1 = norm(width)
        in_channels, layers = width, []
        for stage, (depth, stage_key) in enumerate(zip(depths, stage_keys, strict=True)):
            blocks = []
            for position, block_key in enumerate(jr.split(stage_key, depth)):
                stride = 2 if stage > 0 and position == 0 else 1  # all stages but the first halve the resolution
                blocks.append(block(in_channels, width * 2**stage, stride=stride, norm=norm, key=block_key))
                in_channels = block.expansion * width * 2**stage
            layers.append(tuple(blocks))
        self.layers = tuple(layers)
        self.channels = tuple(block.expansion * width * 2**stage for stage in range(4))
        self.checkpoint = checkpoint

    @property
    def stages(self) -> tuple[tuple[Callable, ...], ...]:
        """The modules of the stem, and the blocks of the four stages."""
        return ((self.conv1, self.norm1), *self.layers)

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c fh fw"], ...]:
        x = image.astype(self.conv1.weight.dtype)
        stem = eqx.Partial(_stem, self.conv1, self.norm1)  # (i, h, w) -> (width, h / 4, w / 4)
        x = rematerialise_stem(stem, x) if self.checkpoint else stem(x)
        features = []
        for blocks in self.layers:
            for block in blocks:
                x = rematerialise(block, x) if self.checkpoint else block(x)
            features.append(x)
        return tuple(features)


def _stem(conv, norm, x):
    return max_pool2d(relu(norm(conv(x))), kernel_size=3, stride=2, padding=1)  # stride 2 * 2 = 4


def resnet18(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = 64,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-18: 11.2 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet18(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    2
    """
    return ResNet(
        BasicBlock, (2, 2, 2, 2), key=key, norm=norm, width=width, checkpoint=checkpoint, in_channels=in_channels
    )


def resnet34(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = 64,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-34: 21.3 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet34(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    return ResNet(
        BasicBlock, (3, 4, 6, 3), key=key, norm=norm, width=width, checkpoint=checkpoint, in_channels=in_channels
    )


def resnet50(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = 64,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-50: 23.5 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet50(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    return ResNet(
        Bottleneck, (3, 4, 6, 3), key=key, norm=norm, width=width, checkpoint=checkpoint, in_channels=in_channels
    )


def resnet101(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = 64,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-101: 42.5 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet101(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    23
    """
    return ResNet(
        Bottleneck, (3, 4, 23, 3), key=key, norm=norm, width=width, checkpoint=checkpoint, in_channels=in_channels
    )
