"""Backbones of SSD (arXiv:1512.02325): a body, and extra layers that reduce its last map to a few cells."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.nn.initializers import normal
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import rematerialise
from ..ops import upcast
from ._conv import Conv2d, Initializer, max_pool2d, relu, xavier_uniform
from ._mobilenet import ConvNorm, MobileNet, relu6
from ._norm import FrozenBatchNorm, Norm
from ._vgg import VGG


# That of SSDlite's layers in torchvision; SSD's have Glorot's.
narrow_normal: Initializer = normal(0.03)

# Channels, stride and padding of the 3×3 convolution of each extra layer of SSD300: 10, 5, 3 and 1 cells per side.
VGG_EXTRAS = ((512, 2, 1), (256, 2, 1), (256, 1, 0), (256, 1, 0))
# Widths of the fully connected layers of VGG, which are convolutions here; the first is dilated.
FC_CHANNELS, FC_DILATION = 1024, 6
# Initial value of the factors that scale the finest map after its normalisation (arXiv:1506.04579).
NORM_SCALE = 20.0
# Below this, a vector is not normalised further.
NORM_EPSILON = 1e-12
# Channels of each extra layer of SSDlite.
MOBILENET_EXTRAS = (512, 256, 256, 128)
# The stage of a MobileNet in whose first block the finest map is taken, of stride 16.
EXPANDED_STAGE = 4


@runtime_checkable
class SSDBackbone(Protocol):
    """The interface of the backbone of an `SSD`: that of `Backbone`, with a number of channels per level."""

    @property
    def channels(self) -> tuple[int, ...]: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]: ...

    @property
    def divisor(self) -> int: ...

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "_ _ _"], ...]: ...


class SSDExtra(eqx.Module):
    """A 1×1 convolution to half of the output's channels, and a 3×3 convolution, each with a ReLU."""

    reduce: Conv2d
    conv: Conv2d

    def __init__(self, in_channels: int, channels: int, *, stride: int, padding: int, key: PRNGKeyArray):
        keys = jr.split(key)
        self.reduce = Conv2d(in_channels, channels // 2, 1, init=xavier_uniform, key=keys[0])
        self.conv = Conv2d(channels // 2, channels, 3, stride=stride, padding=padding, init=xavier_uniform, key=keys[1])

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        return relu(self.conv(relu(self.reduce(x))))


class SSDVGG(eqx.Module):
    """A VGG with the extra layers of SSD300. Maps an image to six levels, of 38, 19, 10, 5, 3 and 1 cells per side.

    The first is the body's fourth map, with each cell's vector divided by its norm and multiplied by `scale`. The
    second is the fifth after a max pooling that keeps its size and the layers `fc6` and `fc7`, the third and so on the
    outputs of the `extras`. The body should round up its third pooling (`rounded_up=(2,)`) to have torchvision's sizes.
    """

    body: VGG
    scale: Float[Array, " c"]
    fc6: Conv2d
    fc7: Conv2d
    extras: tuple[SSDExtra, ...]
    channels: tuple[int, ...] = eqx.field(static=True)
    divisor = 1

    def __init__(
        self,
        body: VGG,
        *,
        key: PRNGKeyArray,
        fc_channels: int = FC_CHANNELS,
        extras: Sequence[tuple[int, int, int]] = VGG_EXTRAS,
    ):
        """Initialises the layers above the body.

        - `fc_channels`: width of `fc6` and `fc7`.
        - `extras`: channels, stride and padding of each extra layer's 3×3 convolution.
        """
        keys = jr.split(key, 2 + len(extras))
        self.body = body
        self.scale = jnp.full(body.channels[3], NORM_SCALE)
        options = {"padding": FC_DILATION, "dilation": FC_DILATION, "init": xavier_uniform}
        self.fc6 = Conv2d(body.channels[4], fc_channels, 3, key=keys[0], **options)
        self.fc7 = Conv2d(fc_channels, fc_channels, 1, init=xavier_uniform, key=keys[1])
        self.channels = (body.channels[3], fc_channels, *(channels for channels, _, _ in extras))
        self.extras = tuple(
            SSDExtra(i, o, stride=stride, padding=padding, key=k)
            for i, (o, stride, padding), k in zip(self.channels[1:-1], extras, keys[2:], strict=True)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Nominal stride of each level in pixels; the coarsest levels of SSD300 are not on a regular grid."""
        return tuple(8 * 2**level for level in range(len(self.channels)))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The convolutions of the body's five stages."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "_ _ _"], ...]:
        """Returns the levels. `key` is not used."""
        *_, fine, x = self.body(image)
        x = max_pool2d(x, kernel_size=3, stride=1, padding=1)
        x = relu(self.fc7(relu(self.fc6(x))))
        outputs = [_normalized(fine) * self.scale[:, None, None].astype(fine.dtype), x]
        for extra in self.extras:
            x = extra(x)
            outputs.append(x)
        return tuple(outputs)


def _normalized(x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
    """Divides the vector of each cell by its Euclidean norm, or by 1e-12 if that is larger."""
    wide = upcast(x)
    squares = (wide * wide).sum(axis=0, keepdims=True)  # (1, h, w)
    return (wide * lax.rsqrt(jnp.maximum(squares, NORM_EPSILON**2))).astype(x.dtype)


class SSDMobileNet(eqx.Module):
    """A MobileNetV3 with the extra layers of SSDlite (arXiv:1801.04381, section 6.2). Maps an image to six levels.

    The first, of stride 16, is the expansion in the body's last block with a stride (arXiv:1905.02244, section 6.3),
    the second the body's output. Each extra layer is a 1×1 convolution to half of its output's channels, a depthwise
    3×3 convolution with stride 2, and a 1×1 convolution.
    """

    body: MobileNet
    extras: tuple[tuple[ConvNorm, ...], ...]
    channels: tuple[int, ...] = eqx.field(static=True)
    divisor = 1

    def __init__(
        self,
        body: MobileNet,
        *,
        key: PRNGKeyArray,
        norm: Norm = FrozenBatchNorm,
        extras: Sequence[int] = MOBILENET_EXTRAS,
    ):
        """Initialises the extra layers. `extras`: number of channels of each. `norm`: their norm."""
        expansion = body.layers[body.taps[EXPANDED_STAGE]].layers[0]  # type: ignore[attr-defined]
        self.body = body
        self.channels = (expansion.conv.weight.shape[0], body.channels[-1], *extras)
        self.extras = tuple(
            _extra(i, o, norm=norm, key=k)
            for i, o, k in zip(self.channels[1:-1], extras, jr.split(key, len(extras)), strict=True)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels."""
        return tuple(16 * 2**level for level in range(len(self.channels)))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The six stages of the body."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "_ _ _"], ...]:
        """Returns the levels. `key` is not used."""
        position, layers = self.body.taps[EXPANDED_STAGE], self.body.layers
        expand, *rest = layers[position].layers  # type: ignore[attr-defined]
        x = self._in_turn((*layers[:position], expand), image.astype(expand.conv.weight.dtype))
        outputs = [x]
        for part in ((*rest, *layers[position + 1 :]), *self.extras):
            x = self._in_turn(part, x)
            outputs.append(x)
        return tuple(outputs)

    def _in_turn(self, layers: Sequence[Callable], x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        for layer in layers:
            x = rematerialise(layer, x) if self.body.checkpoint else layer(x)
        return x


def _extra(in_channels: int, channels: int, *, norm: Norm, key: PRNGKeyArray) -> tuple[ConvNorm, ...]:
    keys, half = jr.split(key, 3), channels // 2
    options: dict[str, Any] = {"norm": norm, "activation": relu6, "init": narrow_normal}
    return (
        ConvNorm(in_channels, half, 1, key=keys[0], **options),
        ConvNorm(half, half, 3, stride=2, groups=half, key=keys[1], **options),
        ConvNorm(half, channels, 1, key=keys[2], **options),
    )


class SeparableConv2d(eqx.Module):
    """A depthwise 3×3 convolution with a norm and ReLU6, and a 1×1 convolution: the predictors of SSDlite."""

    depthwise: ConvNorm
    pointwise: Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        key: PRNGKeyArray,
        norm: Norm = FrozenBatchNorm,
        init: Initializer = narrow_normal,
    ):
        keys = jr.split(key)
        options: dict[str, Any] = {"groups": in_channels, "norm": norm, "init": init}
        self.depthwise = ConvNorm(in_channels, in_channels, 3, key=keys[0], **options)
        self.pointwise = Conv2d(in_channels, out_channels, 1, init=init, key=keys[1])

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h w"]:
        return self.pointwise(self.depthwise(x))
