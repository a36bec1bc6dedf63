"""ResNet (arXiv:1512.03385) as a feature extractor: torchvision's architecture, stride in the 3×3 convolution.

ResNeXt (arXiv:1611.05431) and Wide ResNet (arXiv:1605.07146) differ in the 3×3 convolution of their blocks alone.
"""

from collections.abc import Callable

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import rematerialise, rematerialise_stem
from ._conv import Conv2d, max_pool2d, relu
from ._norm import FrozenBatchNorm, Norm


# Channels of the stem, and of each group in a block of the first stage: the unit of `width_per_group`.
WIDTH = 64


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

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        norm: Norm,
        key: PRNGKeyArray,
        groups: int = 1,
        width_per_group: int = WIDTH,
        stride_in_1x1: bool = False,
    ):
        if (groups, width_per_group, stride_in_1x1) != (1, WIDTH, False):
            raise ValueError(
                f"A BasicBlock has neither groups nor another width nor 1×1 convolutions, got groups={groups}, "
                f"width_per_group={width_per_group} and stride_in_1x1={stride_in_1x1}. Use Bottleneck."
            )
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
    """1×1, 3×3, 1×1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The 3×3 convolution has `groups` groups of `channels * width_per_group / 64` channels. It has the stride, as in
    torchvision, unless `stride_in_1x1`: then the first 1×1 convolution has it, as in the paper and in Caffe's weights.
    """

    conv1: Conv2d
    norm1: Callable
    conv2: Conv2d
    norm2: Callable
    conv3: Conv2d
    norm3: Callable
    downsample: Downsample | None
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        norm: Norm,
        key: PRNGKeyArray,
        groups: int = 1,
        width_per_group: int = WIDTH,
        stride_in_1x1: bool = False,
    ):
        keys = jr.split(key, 4)
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = self.expansion * channels
        width = groups * (channels * width_per_group // WIDTH)
        self.conv1 = Conv2d(in_channels, width, 1, stride=strides[0], use_bias=False, key=keys[0])
        self.norm1 = norm(width)
        self.conv2 = Conv2d(width, width, 3, stride=strides[1], groups=groups, use_bias=False, key=keys[1])
        self.norm2 = norm(width)
        self.conv3 = Conv2d(width, out_channels, 1, use_bias=False, key=keys[2])
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
        width: int = WIDTH,
        groups: int = 1,
        width_per_group: int = WIDTH,
        stride_in_1x1: bool = False,
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Builds the stem and the stages.

        - `depths`: number of blocks per stage. `width`: base width, 64 in the paper: the channels of the stem and of
          the blocks of the first stage, before their expansion.
        - `groups`, `width_per_group`: of the 3×3 convolutions, see `Bottleneck`.
        - `stride_in_1x1`: whether a bottleneck's first convolution has its stride, see `Bottleneck`.
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
                options = {"norm": norm, "groups": groups, "width_per_group": width_per_group}
                options |= {"stride": stride, "stride_in_1x1": stride_in_1x1}
                blocks.append(block(in_channels, width * 2**stage, key=block_key, **options))
                in_channels = block.expansion * width * 2**stage
            layers.append(tuple(blocks))
        self.layers = tuple(layers)
        self.channels = tuple(block.expansion * width * 2**stage for stage in range(4))
        self.checkpoint = checkpoint

    @property
    def stages(self) -> tuple[tuple[Callable, ...], ...]:
        """The modules of the stem, and the blocks of the four stages."""
        return ((self.conv1, self.norm1), *self.layers)

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c fh fw"], ...]:
        """Returns the maps of the stages. `key` is not used."""
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
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-18: 11.2 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet18(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    2
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(BasicBlock, (2, 2, 2, 2), key=key, norm=norm, **options)


def resnet34(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-34: 21.3 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet34(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(BasicBlock, (3, 4, 6, 3), key=key, norm=norm, **options)


def resnet50(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
    stride_in_1x1: bool = False,
) -> ResNet:
    """ResNet-50: 23.5 million parameters. `stride_in_1x1`: see `Bottleneck`.

    >>> body = eqx.filter_eval_shape(lambda: resnet50(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    options["stride_in_1x1"] = stride_in_1x1
    return ResNet(Bottleneck, (3, 4, 6, 3), key=key, norm=norm, **options)


def resnet101(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
    stride_in_1x1: bool = False,
) -> ResNet:
    """ResNet-101: 42.4 million parameters. `stride_in_1x1`: see `Bottleneck`.

    >>> body = eqx.filter_eval_shape(lambda: resnet101(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    23
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    options["stride_in_1x1"] = stride_in_1x1
    return ResNet(Bottleneck, (3, 4, 23, 3), key=key, norm=norm, **options)


def resnet152(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-152: 58.0 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnet152(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    36
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 8, 36, 3), key=key, norm=norm, **options)


def resnext50_32x4d(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNeXt-50 32x4d, with 32 groups of 4 channels in the first stage: 22.9 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnext50_32x4d(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 4, 6, 3), key=key, norm=norm, groups=32, width_per_group=4, **options)


def resnext101_32x8d(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNeXt-101 32x8d, with 32 groups of 8 channels in the first stage: 86.5 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnext101_32x8d(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    23
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 4, 23, 3), key=key, norm=norm, groups=32, width_per_group=8, **options)


def resnext101_64x4d(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """ResNeXt-101 64x4d, with 64 groups of 4 channels in the first stage: 81.2 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: resnext101_64x4d(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    23
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 4, 23, 3), key=key, norm=norm, groups=64, width_per_group=4, **options)


def wide_resnet50_2(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """Wide ResNet-50-2, with 3×3 convolutions of twice the width: 66.8 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: wide_resnet50_2(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    6
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 4, 6, 3), key=key, norm=norm, width_per_group=128, **options)


def wide_resnet101_2(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width: int = WIDTH,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> ResNet:
    """Wide ResNet-101-2, with 3×3 convolutions of twice the width: 124.7 million parameters.

    >>> body = eqx.filter_eval_shape(lambda: wide_resnet101_2(key=jr.key(0)))  # shapes only
    >>> len(body.layers[2])  # blocks of the third stage
    23
    """
    options = {"width": width, "checkpoint": checkpoint, "in_channels": in_channels}
    return ResNet(Bottleneck, (3, 4, 23, 3), key=key, norm=norm, width_per_group=128, **options)
