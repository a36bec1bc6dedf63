"""Feature pyramid network (arXiv:1612.03144) over a bottom-up backbone."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ..ops._substitute import replaceable
from ._conv import Conv2d, lecun_uniform
from ._resnet import ResNet


@runtime_checkable
class Backbone(Protocol):
    """What a detector is built on: a map from an image to pyramid levels, the coarsest for anchors only.

    `channels` is the width of all levels, `strides` are theirs in pixels.
    """

    @property
    def channels(self) -> int: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c _ _"], ...]: ...


class FPN(eqx.Module):
    """Maps C2..C5 of growing width to P2..P6 of one width, each with the semantics of the coarsest.

    P6 is every second pixel of P5, for anchors only, as in the paper's footnote 2.
    """

    lateral: tuple[Conv2d, ...]
    output: tuple[Conv2d, ...]

    def __init__(self, in_channels: tuple[int, ...], channels: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 2 * len(in_channels))
        self.lateral = tuple(
            Conv2d(c, channels, 1, init=lecun_uniform, key=k) for c, k in zip(in_channels, keys[::2], strict=True)
        )
        self.output = tuple(Conv2d(channels, channels, 3, init=lecun_uniform, key=k) for k in keys[1::2])

    def __call__(self, features: tuple[Float[Array, "_ _ _"], ...]) -> tuple[Float[Array, "c _ _"], ...]:
        coarser, outputs = None, []
        for x, lateral, output in reversed(list(zip(features, self.lateral, self.output, strict=True))):
            x = lateral(x)
            coarser = x if coarser is None else x + _upsample_nearest(coarser)
            outputs.insert(0, output(coarser))
        return (*outputs, outputs[-1][:, ::2, ::2])


@replaceable
def _upsample_nearest(x: Float[Array, "c h w"]) -> Float[Array, "c 2*h 2*w"]:
    c, h, w = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (c, h, 2, w, 2)).reshape(c, 2 * h, 2 * w)


class ResNetFPN(eqx.Module):
    """A ResNet and the pyramid on it: an image `(i, h, w)` to P2..P6, of strides 4, 8, 16, 32 and 64.

    `h` and `w` must be multiples of 32; anything else is a `ValueError` when the call is traced.
    """

    body: ResNet
    fpn: FPN
    channels: int = eqx.field(static=True)
    strides = (4, 8, 16, 32, 64)

    def __init__(self, body: ResNet, *, key: PRNGKeyArray, channels: int = 256):
        self.body = body
        self.fpn = FPN(body.channels, channels, key=key)
        self.channels = channels

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c _ _"], ...]:
        if image.shape[1] % 32 or image.shape[2] % 32:
            raise ValueError(
                f"The canvas must be a multiple of 32 in height and width, got {image.shape[1]}×{image.shape[2]}. "
                "Pad the image."
            )
        return self.fpn(self.body(image))
