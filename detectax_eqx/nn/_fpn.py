"""Feature pyramid network (arXiv:1612.03144) over a bottom-up backbone."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import named_call
from ._conv import Conv2d, lecun_uniform, relu
from ._resnet import ResNet


@runtime_checkable
class Backbone(Protocol):
    """What a detector is built on: a map from an image to pyramid levels, finest first.

    - `channels`: the width of all levels. `strides`: theirs in pixels.
    - `stages`: the modules of its parts from the stem up, for freezing and for learning rates by layer. Modules that no
      stage has (a pyramid) are always trained.
    - `divisor`: what height and width of an image must be multiples of.
    """

    @property
    def channels(self) -> int: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]: ...

    @property
    def divisor(self) -> int: ...

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c _ _"], ...]: ...


class SubsampledTop(eqx.Module):
    """One level more: every second pixel of the coarsest. For anchors only, as in the FPN paper's footnote 2."""

    levels = 1

    def __call__(
        self, features: tuple[Float[Array, "_ _ _"], ...], outputs: tuple[Float[Array, "c _ _"], ...]
    ) -> tuple[Float[Array, "c _ _"], ...]:
        return (outputs[-1][:, ::2, ::2],)  # (c, h, w) -> (c, h / 2, w / 2)


SUBSAMPLED_TOP = SubsampledTop()


class ConvolvedTop(eqx.Module):
    """Two levels more, each a strided 3×3 convolution of the one before: P6 and P7 of RetinaNet and FCOS.

    - `from_features`: whether P6 is made from the backbone's last map (C5) or from the pyramid's (P5).
    """

    p6: Conv2d
    p7: Conv2d
    from_features: bool = eqx.field(static=True)
    levels = 2

    def __init__(self, in_channels: int, channels: int, *, key: PRNGKeyArray, from_features: bool = False):
        """`in_channels`: of C5, which matter only with `from_features`."""
        keys = jr.split(key)
        width = in_channels if from_features else channels
        self.p6 = Conv2d(width, channels, 3, stride=2, init=lecun_uniform, key=keys[0])
        self.p7 = Conv2d(channels, channels, 3, stride=2, init=lecun_uniform, key=keys[1])
        self.from_features = from_features

    def __call__(
        self, features: tuple[Float[Array, "_ _ _"], ...], outputs: tuple[Float[Array, "c _ _"], ...]
    ) -> tuple[Float[Array, "c _ _"], ...]:
        p6 = self.p6(features[-1] if self.from_features else outputs[-1])
        return p6, self.p7(relu(p6))


class FPN(eqx.Module):
    """Maps of growing width (C2..C5, say) to maps of one width, each with the semantics of the coarsest.

    `top` adds levels above: a module from the maps in and the maps out to a tuple of maps, whose length is its
    `levels`.
    """

    lateral: tuple[Conv2d, ...]
    output: tuple[Conv2d, ...]
    top: SubsampledTop | ConvolvedTop

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        *,
        key: PRNGKeyArray,
        top: SubsampledTop | ConvolvedTop = SUBSAMPLED_TOP,
    ):
        keys = jr.split(key, 2 * len(in_channels))
        self.lateral = tuple(
            Conv2d(c, channels, 1, init=lecun_uniform, key=k) for c, k in zip(in_channels, keys[::2], strict=True)
        )
        self.output = tuple(Conv2d(channels, channels, 3, init=lecun_uniform, key=k) for k in keys[1::2])
        self.top = top

    def __call__(self, features: tuple[Float[Array, "_ _ _"], ...]) -> tuple[Float[Array, "c _ _"], ...]:
        coarser, outputs = None, []
        for x, lateral, output in reversed(list(zip(features, self.lateral, self.output, strict=True))):
            x = lateral(x)  # (i, h, w) -> (c, h, w)
            coarser = x if coarser is None else x + named_call(_upsample_nearest, coarser)
            outputs.insert(0, output(coarser))
        return (*outputs, *self.top(features, tuple(outputs)))


def _upsample_nearest(x: Float[Array, "c h w"]) -> Float[Array, "c 2*h 2*w"]:
    c, h, w = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (c, h, 2, w, 2)).reshape(c, 2 * h, 2 * w)


class ResNetFPN(eqx.Module):
    """A ResNet and the pyramid on it: by default an image to P2..P6, of strides 4, 8, 16, 32 and 64.

    Height and width must be multiples of 32, the `divisor`; anything else is a `ValueError` when the call is traced.
    """

    body: ResNet
    fpn: FPN
    channels: int = eqx.field(static=True)
    finest: int = eqx.field(static=True)
    divisor = 32

    def __init__(
        self,
        body: ResNet,
        *,
        key: PRNGKeyArray,
        channels: int = 256,
        finest: int = 2,
        top: SubsampledTop | ConvolvedTop = SUBSAMPLED_TOP,
    ):
        """`finest`: the first level of the pyramid, 2 for P2; `top`: the levels above P5, see `FPN`."""
        if not 2 <= finest <= 5:
            raise ValueError(f"finest must be in 2..5, got {finest}.")
        self.body = body
        self.fpn = FPN(body.channels[finest - 2 :], channels, key=key, top=top)
        self.channels = channels
        self.finest = finest

    @property
    def strides(self) -> tuple[int, ...]:
        """Of each level, in pixels."""
        return tuple(2**level for level in range(self.finest, 6 + self.fpn.top.levels))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The stem, and the blocks of the four stages."""
        return self.body.stages

    def __call__(self, image: Float[Array, "i h w"]) -> tuple[Float[Array, "c _ _"], ...]:
        if image.shape[1] % self.divisor or image.shape[2] % self.divisor:
            raise ValueError(
                f"The canvas must be a multiple of {self.divisor} in height and width, got "
                f"{image.shape[1]}×{image.shape[2]}. Pad the image."
            )
        return self.fpn(self.body(image)[self.finest - 2 :])
