"""The backbone of DETR (arXiv:2005.12872): the last map of a ResNet, projected."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from ._conv import Conv2d, lecun_uniform
from ._resnet import ResNet


class ProjectedResNet(eqx.Module):
    """A ResNet whose last map, of stride 32, is projected to `channels` by a 1×1 convolution.

    Images have any size: the `divisor` is 1. Sides of the map are rounded up.
    """

    body: ResNet
    projection: Conv2d
    channels: int = eqx.field(static=True)
    strides = (32,)
    divisor = 1

    def __init__(self, body: ResNet, *, key: PRNGKeyArray, channels: int = 256):
        self.body = body
        self.projection = Conv2d(body.channels[-1], channels, 1, init=lecun_uniform, key=key)
        self.channels = channels

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """Those of the body."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        """Returns the one map. `key` is not used."""
        return (self.projection(self.body(image)[-1]),)
