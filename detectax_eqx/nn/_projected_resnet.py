"""The backbone of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159): maps of a ResNet, projected."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ._conv import Conv2d, lecun_uniform
from ._norm import Norm
from ._resnet import ResNet


# The last stage of a ResNet: C5, of stride 32.
LAST = 5


class ProjectedResNet(eqx.Module):
    """Maps of the last stages of a ResNet, each projected to `channels` by a 1×1 convolution and, with `norm`, a norm.

    By default, there is one of stride 32. Images have any size: the `divisor` is 1. Sides of a map are rounded up.
    """

    body: ResNet
    projections: tuple[Conv2d, ...]
    norms: tuple[Callable, ...] | None
    channels: int = eqx.field(static=True)
    finest: int = eqx.field(static=True)
    divisor = 1

    def __init__(
        self,
        body: ResNet,
        *,
        key: PRNGKeyArray,
        channels: int = 256,
        finest: int = LAST,
        extra: bool = False,
        norm: Norm | None = None,
    ):
        """Builds the projections.

        - `finest`: the first stage whose map is projected, 2 for C2.
        - `extra`: whether a map of stride 64 is added, by a 3×3 convolution of C5.
        """
        if not 2 <= finest <= LAST:
            raise ValueError(f"finest must be in 2..{LAST}, got {finest}.")
        keys = jr.split(key, LAST - finest + 2)
        widths = body.channels[finest - 2 :]
        projections = [Conv2d(c, channels, 1, init=lecun_uniform, key=k) for c, k in zip(widths, keys[1:], strict=True)]
        if extra:
            projections.append(Conv2d(widths[-1], channels, 3, stride=2, init=lecun_uniform, key=keys[0]))
        self.body = body
        self.projections = tuple(projections)
        self.norms = None if norm is None else tuple(norm(channels) for _ in projections)
        self.channels = channels
        self.finest = finest

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels."""
        return tuple(2 ** (self.finest + i) for i in range(len(self.projections)))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """Those of the body."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        """Returns the levels. `key` is not used."""
        features = self.body(image)[self.finest - 2 :]
        features = (*features, features[-1])[: len(self.projections)]
        maps = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return tuple(maps if self.norms is None else (norm(x) for norm, x in zip(self.norms, maps, strict=True)))
