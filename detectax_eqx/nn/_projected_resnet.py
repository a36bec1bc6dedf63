"""The backbones of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159): maps of a ResNet, projected."""

from functools import partial
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ._conv import Conv2d, lecun_uniform, xavier_uniform
from ._norm import GroupNorm
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


class ProjectedLevels(eqx.Module):
    """The last three maps of a ResNet, projected to `channels` by 1×1 convolutions, and maps of half the size each.

    The first of the latter is a 3×3 convolution of the ResNet's last map, each other one of that before it. A group
    norm follows each convolution. Images have any size: the `divisor` is 1. Sides of maps are rounded up.
    """

    body: ResNet
    projections: tuple[Conv2d, ...]
    norms: tuple[GroupNorm, ...]
    channels: int = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)
    divisor = 1

    def __init__(self, body: ResNet, *, key: PRNGKeyArray, channels: int = 256, levels: int = 4):
        """Initialises the projections. `levels`: number of maps. Raises a `ValueError` unless it is 3 or more."""
        if levels < 3:
            raise ValueError(f"levels must be 3 or more, got {levels}.")
        keys = jr.split(key, levels)
        conv = partial(Conv2d, out_channels=channels, init=xavier_uniform)
        lateral = [conv(i, kernel_size=1, key=k) for i, k in zip(body.channels[1:], keys[:3], strict=True)]
        inputs = [body.channels[-1], *[channels] * levels][: levels - 3]
        further = [conv(i, kernel_size=3, stride=2, key=k) for i, k in zip(inputs, keys[3:], strict=True)]
        self.body = body
        self.projections = (*lateral, *further)
        self.norms = tuple(GroupNorm(channels) for _ in range(levels))
        self.channels = channels
        self.strides = tuple(8 * 2**i for i in range(levels))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """Those of the body."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        """Returns the maps, from large to small. `key` is not used."""
        maps = self.body(image)[1:]
        sources, levels = (*maps, maps[-1]), []
        for i, (project, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            levels.append(norm(project(sources[i] if i < len(sources) else levels[-1])))
        return tuple(levels)
