"""VGG (arXiv:1409.1556) as a feature extractor, as in torchvision."""

from functools import partial

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import rematerialise
from ._conv import Conv2d, max_pool2d, relu


# Widths of the stages as multiples of the first.
WIDTHS = (1, 2, 4, 8, 8)


class VGG(eqx.Module):
    """A VGG without its classifier: five stages of 3×3 convolutions with ReLUs, and 2×2 max pooling between them.

    Maps an image `(i, h, w)`, usually RGB, to the last map of each stage before its pooling. Their strides are 1, 2, 4,
    8 and 16; `channels` holds their widths.
    """

    convs: tuple[Conv2d, ...]
    depths: tuple[int, ...] = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    rounded_up: tuple[int, ...] = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        *,
        key: PRNGKeyArray,
        width: int = 64,
        rounded_up: tuple[int, ...] = (),
        checkpoint: bool = False,
        in_channels: int = 3,
    ):
        """Builds the stages.

        - `depths`: number of convolutions per stage. `width`: number of channels of the first stage, 64 in the paper.
        - `rounded_up`: the poolings, counted from 0, that keep the last row or column of a map of odd size, see
          `max_pool2d`.
        - `checkpoint`: whether to use rematerialisation, see `ResNet`. `in_channels`: number of channels of the image.
        """
        self.channels = tuple(width * factor for factor in WIDTHS)
        convs = []
        for out, count, stage_key in zip(self.channels, depths, jr.split(key, len(depths)), strict=True):
            for conv_key in jr.split(stage_key, count):
                convs.append(Conv2d(in_channels, out, 3, key=conv_key))
                in_channels = out
        self.convs = tuple(convs)
        self.depths = depths
        self.rounded_up = rounded_up
        self.checkpoint = checkpoint

    @property
    def stages(self) -> tuple[tuple[Conv2d, ...], ...]:
        """The convolutions of the five stages."""
        convs = iter(self.convs)
        return tuple(tuple(next(convs) for _ in range(depth)) for depth in self.depths)

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c fh fw"], ...]:
        x, features = image.astype(self.convs[0].weight.dtype), []
        for position, convs in enumerate(self.stages):
            if position > 0:
                x = max_pool2d(x, kernel_size=2, stride=2, round_up=position - 1 in self.rounded_up)
            for conv in convs:
                layer = eqx.Partial(_conv_relu, conv)
                x = rematerialise(layer, x) if self.checkpoint else layer(x)
            features.append(x)
        return tuple(features)


def _conv_relu(conv, x):
    return relu(conv(x))


# 2, 2, 3, 3 and 3 convolutions.
VGG16_DEPTHS = (2, 2, 3, 3, 3)


def vgg16(
    *,
    key: PRNGKeyArray,
    width: int = 64,
    rounded_up: tuple[int, ...] = (),
    checkpoint: bool = False,
    in_channels: int = 3,
) -> VGG:
    """VGG-16: 14.7 million parameters without its classifier. The arguments are those of `VGG`.

    >>> body = eqx.filter_eval_shape(lambda: vgg16(key=jr.key(0)))  # shapes only
    >>> body.channels
    (64, 128, 256, 512, 512)
    """
    build = partial(VGG, VGG16_DEPTHS, key=key, width=width, rounded_up=rounded_up)
    return build(checkpoint=checkpoint, in_channels=in_channels)
