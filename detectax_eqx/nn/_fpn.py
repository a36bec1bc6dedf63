"""Feature pyramid network (arXiv:1612.03144) on a bottom-up backbone."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import named_call
from ._conv import Conv2d, lecun_uniform, relu
from ._norm import Norm
from ._resnet import ResNet
from ._swin import Swin


@runtime_checkable
class Backbone(Protocol):
    """The interface of a detector's backbone: maps an image to pyramid levels, finest first.

    - `channels`: number of channels, the same at all levels. `strides`: stride of each level in pixels.
    - `stages`: the modules of each stage from the stem up, for freezing and for learning rates by layer. Modules
      outside the stages, such as a pyramid, are always trained.
    - `divisor`: height and width of an image must be multiples of this.
    - `key`: for what is random in training, such as a drop path. `None` for inference.
    """

    @property
    def channels(self) -> int: ...

    @property
    def strides(self) -> tuple[int, ...]: ...

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]: ...

    @property
    def divisor(self) -> int: ...

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]: ...


class SubsampledTop(eqx.Module):
    """Adds one level: every second pixel of the coarsest one. For anchors only, as in footnote 2 of the FPN paper."""

    levels = 1

    def __call__(
        self, features: tuple[Float[Array, "_ _ _"], ...], outputs: tuple[Float[Array, "c _ _"], ...]
    ) -> tuple[Float[Array, "c _ _"], ...]:
        return (outputs[-1][:, ::2, ::2],)  # (c, h, w) -> (c, h / 2, w / 2)


SUBSAMPLED_TOP = SubsampledTop()


class ConvolvedTop(eqx.Module):
    """Adds two levels, each a strided 3×3 convolution of the previous one: P6 and P7 of RetinaNet and FCOS.

    - `from_features`: whether P6 is computed from the backbone's last map (C5) rather than the pyramid's (P5).
    """

    p6: Conv2d
    p7: Conv2d
    from_features: bool = eqx.field(static=True)
    levels = 2

    def __init__(self, in_channels: int, channels: int, *, key: PRNGKeyArray, from_features: bool = False):
        """Initialises the layers. `in_channels`: number of channels of C5, used only with `from_features`."""
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
    """Maps features of increasing width, such as C2..C5, to levels of one width with the semantics of the coarsest.

    Each input map has the size of the previous one or half of it.

    `top` adds coarser levels: a module that takes the input maps and the output maps and returns a tuple of
    `top.levels` maps. With `norm`, each convolution is followed by a norm and has no bias.
    """

    lateral: tuple[Conv2d, ...]
    output: tuple[Conv2d, ...]
    top: SubsampledTop | ConvolvedTop
    lateral_norms: tuple[Callable, ...] | None
    output_norms: tuple[Callable, ...] | None

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        *,
        key: PRNGKeyArray,
        top: SubsampledTop | ConvolvedTop = SUBSAMPLED_TOP,
        norm: Norm | None = None,
    ):
        keys = jr.split(key, 2 * len(in_channels))
        conv = partial(Conv2d, use_bias=norm is None, init=lecun_uniform)
        self.lateral = tuple(conv(c, channels, 1, key=k) for c, k in zip(in_channels, keys[::2], strict=True))
        self.output = tuple(conv(channels, channels, 3, key=k) for k in keys[1::2])
        self.top = top
        self.lateral_norms = None if norm is None else tuple(norm(channels) for _ in in_channels)
        self.output_norms = None if norm is None else tuple(norm(channels) for _ in in_channels)

    def __call__(self, features: tuple[Float[Array, "_ _ _"], ...]) -> tuple[Float[Array, "c _ _"], ...]:
        coarser, outputs = None, []
        for level in reversed(range(len(features))):
            x = self.lateral[level](features[level])  # (i, h, w) -> (c, h, w)
            x = x if self.lateral_norms is None else self.lateral_norms[level](x)
            if coarser is not None and coarser.shape != x.shape:  # equal if the input maps have the same stride
                coarser = named_call(_upsample_nearest, coarser)
            coarser = x if coarser is None else x + coarser
            y = self.output[level](coarser)
            outputs.insert(0, y if self.output_norms is None else self.output_norms[level](y))
        return (*outputs, *self.top(features, tuple(outputs)))


def _upsample_nearest(x: Float[Array, "c h w"]) -> Float[Array, "c 2*h 2*w"]:
    c, h, w = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (c, h, 2, w, 2)).reshape(c, 2 * h, 2 * w)


def check_canvas(image: Float[Array, "i h w"], divisor: int) -> None:
    """Raises a `ValueError` if a side of the image is not a multiple of `divisor`."""
    height, width = image.shape[1:]
    if height % divisor or width % divisor:
        raise ValueError(
            f"The canvas must be a multiple of {divisor} in height and width, got {height}×{width}. Pad the image."
        )


class BackboneWithFPN(eqx.Module):
    """A ResNet or a Swin Transformer with a feature pyramid, torchvision's `BackboneWithFPN`.

    By default, maps an image to P2..P6 with strides 4, 8, 16, 32 and 64.

    Height and width must be multiples of 32, the `divisor`. Other sizes raise a `ValueError` when the call is traced.
    """

    body: ResNet | Swin
    fpn: FPN
    channels: int = eqx.field(static=True)
    finest: int = eqx.field(static=True)
    divisor = 32

    def __init__(
        self,
        body: ResNet | Swin,
        *,
        key: PRNGKeyArray,
        channels: int = 256,
        finest: int = 2,
        top: SubsampledTop | ConvolvedTop = SUBSAMPLED_TOP,
        norm: Norm | None = None,
    ):
        """Builds the pyramid. `finest`: its first level, 2 for P2. `top`: the levels above P5. `norm`: see `FPN`."""
        if not 2 <= finest <= 5:
            raise ValueError(f"finest must be in 2..5, got {finest}.")
        self.body = body
        self.fpn = FPN(body.channels[finest - 2 :], channels, key=key, top=top, norm=norm)
        self.channels = channels
        self.finest = finest

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels."""
        return tuple(2**level for level in range(self.finest, 6 + self.fpn.top.levels))

    @property
    def stages(self) -> tuple[tuple[Any, ...], ...]:
        """The stages of the body, from the stem up."""
        return self.body.stages

    def __call__(
        self, image: Float[Array, "i h w"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "c _ _"], ...]:
        """Returns the levels. `key`: for the body."""
        check_canvas(image, self.divisor)
        return self.fpn(self.body(image, key=key)[self.finest - 2 :])
