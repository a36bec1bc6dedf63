"""MobileNetV2 (arXiv:1801.04381) and MobileNetV3-Large (arXiv:1905.02244) as feature extractors, as in torchvision."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import rematerialise
from ._conv import Conv2d, Initializer, he_fan_out, relu
from ._fpn import FPN, SUBSAMPLED_TOP, ConvolvedTop, SubsampledTop, check_canvas
from ._norm import FrozenBatchNorm, Norm


Activation = Callable[[Float[Array, "*s"]], Float[Array, "*s"]]

# Widths are multiples of this, as in both papers' code.
MULTIPLE = 8
# Strides of the maps that a `MobileNet` returns.
STRIDES = (2, 4, 8, 16, 32, 32)

# Table 2 of the MobileNetV2 paper: expansion, channels, number of blocks and stride of each sequence of blocks.
V2_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_STEM, V2_LAST = 32, 1280
# Table 1 of the MobileNetV3 paper: kernel size, expanded channels, channels, whether there is squeeze-and-excitation,
# whether the activation is hard-swish, stride.
V3_LARGE_BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
V3_STEM, V3_LAST_EXPANSION = 16, 6
# Position of the first block of stride 32, with which the reduced tail begins: half of its and later blocks' channels.
V3_TAIL = 12


def relu6(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`min(max(x, 0), 6)`, with gradient 0 outside of `0..6`.

    >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
    [0.0, 2.0, 6.0]
    """
    return jnp.where(x < 6, relu(x), 6)


def hard_sigmoid(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`relu6(x + 3) / 6`, which approximates a sigmoid.

    >>> hard_sigmoid(jnp.array([-4.0, 0.0, 4.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return relu6(x + 3) / 6


def hard_swish(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x * hard_sigmoid(x)` (MobileNetV3, section 5.2).

    >>> hard_swish(jnp.array([-4.0, 0.0, 4.0])).tolist()
    [-0.0, 0.0, 4.0]
    """
    return x * hard_sigmoid(x)


class ConvNorm(eqx.Module):
    """A convolution without a bias, a norm and, unless it is `None`, an activation."""

    conv: Conv2d
    norm: Callable
    activation: Activation | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        key: PRNGKeyArray,
        norm: Norm,
        activation: Activation | None = relu6,
        stride: int = 1,
        groups: int = 1,
        init: Initializer = he_fan_out,
    ):
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, groups=groups, use_bias=False, init=init, key=key
        )
        self.norm = norm(out_channels)
        self.activation = activation

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        x = self.norm(self.conv(x))
        return x if self.activation is None else self.activation(x)


class SqueezeExcitation(eqx.Module):
    """Scales each channel by a function of the means of all channels (arXiv:1709.01507), with a hard sigmoid.

    - `fc1`, `fc2`: 1×1 convolutions that narrow the means and widen them again.
    """

    fc1: Conv2d
    fc2: Conv2d

    def __init__(self, channels: int, squeezed: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.fc1 = Conv2d(channels, squeezed, 1, key=keys[0])
        self.fc2 = Conv2d(squeezed, channels, 1, key=keys[1])

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        means = x.mean(axis=(1, 2), keepdims=True)  # (c, 1, 1)
        return hard_sigmoid(self.fc2(relu(self.fc1(means)))) * x


class LinearBottleneck(eqx.Module):
    """The block of MobileNetV2: expansion, depthwise convolution, linear projection, and a shortcut if sizes allow it.

    `layers` has no expansion where `expansion` is 1.
    """

    layers: tuple[Callable, ...]
    shortcut: bool = eqx.field(static=True)

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, stride: int, norm: Norm, key: PRNGKeyArray
    ):
        keys = jr.split(key, 3)
        width = expansion * in_channels
        expand = (ConvNorm(in_channels, width, 1, norm=norm, key=keys[0]),) if expansion > 1 else ()
        depthwise = ConvNorm(width, width, 3, stride=stride, groups=width, norm=norm, key=keys[1])
        project = Conv2d(width, out_channels, 1, use_bias=False, key=keys[2])
        self.layers = (*expand, depthwise, project, norm(out_channels))
        self.shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        y = _in_turn(self.layers, x)
        return x + y if self.shortcut else y


class InvertedResidual(eqx.Module):
    """The block of MobileNetV3: a `LinearBottleneck` with squeeze-and-excitation and another activation.

    `layers` are the expansion, unless `expanded` equals `in_channels`, the depthwise convolution, the squeeze and
    excitation, if `squeeze`, and the projection.
    """

    layers: tuple[Callable, ...]
    shortcut: bool = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expanded: int,
        kernel_size: int,
        stride: int,
        squeeze: bool,
        activation: Activation,
        norm: Norm,
        key: PRNGKeyArray,
    ):
        keys = jr.split(key, 4)
        conv = partial(ConvNorm, norm=norm, activation=activation)
        layers: list[Callable] = []
        if expanded != in_channels:
            layers.append(conv(in_channels, expanded, 1, key=keys[0]))
        layers.append(conv(expanded, expanded, kernel_size, stride=stride, groups=expanded, key=keys[1]))
        if squeeze:
            layers.append(SqueezeExcitation(expanded, divisible(expanded // 4), key=keys[2]))
        layers.append(ConvNorm(expanded, out_channels, 1, norm=norm, activation=None, key=keys[3]))
        self.layers = tuple(layers)
        self.shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        y = _in_turn(self.layers, x)
        return x + y if self.shortcut else y


def _in_turn(layers: Sequence[Callable], x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
    for layer in layers:
        x = layer(x)
    return x


def divisible(width: float) -> int:
    """Rounds a width to a multiple of 8 that is at least 90 % of it, as in both papers' code.

    >>> divisible(18), divisible(11)
    (24, 16)
    """
    rounded = max(MULTIPLE, int(width + MULTIPLE / 2) // MULTIPLE * MULTIPLE)
    return rounded + MULTIPLE if rounded < 0.9 * width else rounded


class MobileNet(eqx.Module):
    """A MobileNet without its classifier: a stem, blocks and a 1×1 convolution.

    Maps an image `(i, h, w)`, usually RGB, to the outputs of the stem, of the four blocks with stride 2, and of the
    last convolution. Their strides are `strides`, and their widths `channels`. `taps`: their positions in `layers`.
    """

    layers: tuple[Callable, ...]
    channels: tuple[int, ...] = eqx.field(static=True)
    taps: tuple[int, ...] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)
    strides = STRIDES

    def __init__(self, layers: Sequence[tuple[Callable, int, int]], *, checkpoint: bool = False):
        """Builds the network from its layers, each with its number of output channels and its stride.

        `checkpoint`: whether to use rematerialisation, see `ResNet`.
        """
        self.layers = tuple(layer for layer, _, _ in layers)
        last = len(layers) - 1
        self.taps = tuple(i for i, (_, _, stride) in enumerate(layers) if stride > 1 or i == last)
        self.channels = tuple(layers[i][1] for i in self.taps)
        self.checkpoint = checkpoint

    @property
    def stages(self) -> tuple[tuple[Callable, ...], ...]:
        """The layers in six stages, each beginning with one of the `taps`: what torchvision freezes as a unit."""
        ends = (*self.taps[1:], len(self.layers))
        return tuple(self.layers[start:end] for start, end in zip(self.taps, ends, strict=True))

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c fh fw"], ...]:
        x, features = image.astype(self.layers[0].conv.weight.dtype), []  # type: ignore[attr-defined]
        for i, layer in enumerate(self.layers):
            x = rematerialise(layer, x) if self.checkpoint else layer(x)
            if i in self.taps:
                features.append(x)
        return tuple(features)


def mobilenet_v2(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width_multiplier: float = 1.0,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> MobileNet:
    """MobileNetV2: 2.2 million parameters. `width_multiplier`: a factor of all widths, 1 in the paper's main model.

    >>> body = eqx.filter_eval_shape(lambda: mobilenet_v2(key=jr.key(0)))  # shapes only
    >>> body.channels
    (32, 24, 32, 64, 160, 1280)
    """
    keys = iter(jr.split(key, 2 + sum(count for *_, count, _ in V2_BLOCKS)))
    width = divisible(V2_STEM * width_multiplier)
    layers: list[tuple[Any, int, int]] = [(ConvNorm(in_channels, width, stride=2, norm=norm, key=next(keys)), width, 2)]
    for expansion, channels, count, first_stride in V2_BLOCKS:
        out = divisible(channels * width_multiplier)
        for position in range(count):
            stride = first_stride if position == 0 else 1
            block = LinearBottleneck(width, out, expansion=expansion, stride=stride, norm=norm, key=next(keys))
            layers.append((block, out, stride))
            width = out
    last = divisible(V2_LAST * max(1.0, width_multiplier))
    layers.append((ConvNorm(width, last, 1, norm=norm, key=next(keys)), last, 1))
    return MobileNet(layers, checkpoint=checkpoint)


def mobilenet_v3_large(
    *,
    key: PRNGKeyArray,
    norm: Norm = FrozenBatchNorm,
    width_multiplier: float = 1.0,
    reduced_tail: bool = False,
    checkpoint: bool = False,
    in_channels: int = 3,
) -> MobileNet:
    """MobileNetV3-Large: 2.9 million parameters.

    - `width_multiplier`: a factor of all widths, 1 in the paper's main model.
    - `reduced_tail`: whether the blocks from the last stride on have half as many channels, as in the paper's detector
      (section 6.3) and in torchvision's SSDlite.

    >>> body = eqx.filter_eval_shape(lambda: mobilenet_v3_large(key=jr.key(0)))  # shapes only
    >>> body.channels
    (16, 24, 40, 80, 160, 960)
    """
    keys = iter(jr.split(key, 2 + len(V3_LARGE_BLOCKS)))
    width = divisible(V3_STEM * width_multiplier)
    stem = ConvNorm(in_channels, width, stride=2, norm=norm, activation=hard_swish, key=next(keys))
    layers: list[tuple[Any, int, int]] = [(stem, width, 2)]
    for position, (kernel_size, expanded, channels, squeeze, hard, stride) in enumerate(V3_LARGE_BLOCKS):
        if reduced_tail and position >= V3_TAIL:
            channels, expanded = channels // 2, expanded // (2 if position > V3_TAIL else 1)
        out = divisible(channels * width_multiplier)
        block = InvertedResidual(
            width,
            out,
            expanded=divisible(expanded * width_multiplier),
            kernel_size=kernel_size,
            stride=stride,
            squeeze=squeeze,
            activation=hard_swish if hard else relu,
            norm=norm,
            key=next(keys),
        )
        layers.append((block, out, stride))
        width = out
    last = V3_LAST_EXPANSION * width
    layers.append((ConvNorm(width, last, 1, norm=norm, activation=hard_swish, key=next(keys)), last, 1))
    return MobileNet(layers, checkpoint=checkpoint)


class MobileNetFPN(eqx.Module):
    """A MobileNet with a feature pyramid. By default, maps an image to levels with strides 32, 32 and 64.

    These are torchvision's: its pyramid has the body's last two maps, which have the same size. Height and width must
    be multiples of 32, the `divisor`. Other sizes raise a `ValueError` when the call is traced.
    """

    body: MobileNet
    fpn: FPN
    channels: int = eqx.field(static=True)
    levels: tuple[int, ...] = eqx.field(static=True)
    divisor = 32

    def __init__(
        self,
        body: MobileNet,
        *,
        key: PRNGKeyArray,
        channels: int = 256,
        levels: tuple[int, ...] = (4, 5),
        top: SubsampledTop | ConvolvedTop = SUBSAMPLED_TOP,
        norm: Norm | None = None,
    ):
        """Builds the pyramid. `levels`: which of the body's maps it has, in 0..5. `top`, `norm`: see `FPN`."""
        if (
            not levels
            or not all(0 <= level < len(body.channels) for level in levels)
            or tuple(sorted(levels)) != levels
        ):
            raise ValueError(f"levels must be ascending numbers in 0..{len(body.channels) - 1}, got {levels}.")
        self.body = body
        self.fpn = FPN(tuple(body.channels[level] for level in levels), channels, key=key, top=top, norm=norm)
        self.channels = channels
        self.levels = levels

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels."""
        strides = tuple(self.body.strides[level] for level in self.levels)
        return strides + tuple(strides[-1] * 2 ** (k + 1) for k in range(self.fpn.top.levels))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The six stages of the body."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        """Returns the levels. `key` is not used."""
        check_canvas(image, self.divisor)
        features = self.body(image)
        return self.fpn(tuple(features[level] for level in self.levels))
