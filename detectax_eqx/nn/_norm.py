"""Normalisation layers without running state, so that calling a model is a pure function of arrays."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._xla import named_call
from ..ops import upcast


class FrozenBatchNorm(eqx.Module):
    """Batch normalisation with fixed statistics and a fixed affine map: `(x - mean) / sqrt(var + eps) * weight + bias`.

    For imported ImageNet backbones, whose statistics would degrade with a detector's small batches. None of the four
    vectors should be trained: exclude them by partition (`detectax_eqx.models.trainable`), since `stop_gradient` does
    not prevent weight decay. torchvision's published COCO checkpoints were trained with `eps=0`.
    """

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    running_mean: Float[Array, " c"]
    running_var: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.running_mean, self.running_var = jnp.zeros(channels), jnp.ones(channels)
        self.eps = eps

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        scale = self.weight * lax.rsqrt(self.running_var + self.eps)  # y = (x - μ) / √(σ² + ε) w + b = x scale + shift
        shift = self.bias - self.running_mean * scale
        return (x.astype(scale.dtype) * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Group normalisation (arXiv:1803.08494): normalises each group of channels of an image to mean 0 and variance 1.

    Does not depend on the batch, which makes it suitable for training from scratch. Computes in float32 or higher.
    """

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-5):
        """Initialises the norm. `groups` is limited to the number of channels, and must divide it."""
        self.groups = min(groups, channels)
        if channels % self.groups:
            raise ValueError(f"groups must divide channels, got {channels} channels in {self.groups} groups.")
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.eps = eps

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        wide = upcast(x)
        grouped = wide.reshape(self.groups, -1)  # (groups, c / groups h w)
        mean = jnp.mean(grouped, axis=1)
        variance = jnp.maximum(jnp.mean(grouped * grouped, axis=1) - mean * mean, 0.0)  # E x² - (E x)²
        # Fold the statistics of each group into the affine map of its channels: one multiply-add over the map.
        repeats = x.shape[0] // self.groups
        scale = self.weight.astype(wide.dtype) * jnp.repeat(lax.rsqrt(variance + self.eps), repeats)
        shift = self.bias.astype(wide.dtype) - jnp.repeat(mean, repeats) * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


class LayerNorm(eqx.Module):
    """Layer normalisation (arXiv:1607.06450): normalises the channels of each token to mean 0 and variance 1.

    Computes in float32 or higher. The default `eps` is that of vision transformers; torch's is 1e-5.
    """

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, *, eps: float = 1e-6):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.eps = eps

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        return named_call(_layer_norm, x, self.weight, self.bias, epsilon=self.eps, axis=-1)


class LayerNorm2d(eqx.Module):
    """Layer normalisation of a map: normalises the channels of each pixel to mean 0 and variance 1.

    Computes in float32 or higher.
    """

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, channels: int, *, eps: float = 1e-6):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.eps = eps

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        return named_call(_layer_norm, x, self.weight, self.bias, epsilon=self.eps, axis=-3)


def _layer_norm(
    x: Float[Array, "*n"], weight: Float[Array, " c"], bias: Float[Array, " c"], *, epsilon: float, axis: int
) -> Float[Array, "*n"]:
    """`(x - mean) / sqrt(var + epsilon) * weight + bias`, with mean and variance along `axis`, which is negative."""
    wide = upcast(x)
    centred = wide - wide.mean(axis=axis, keepdims=True)
    variance = (centred * centred).mean(axis=axis, keepdims=True)
    shape = (1,) * (x.ndim + axis) + (-1,) + (1,) * (-1 - axis)
    scale, shift = (v.astype(wide.dtype).reshape(shape) for v in (weight, bias))
    return (centred * lax.rsqrt(variance + epsilon) * scale + shift).astype(x.dtype)


# Builds a norm for a backbone: takes the number of channels and returns a module over `(c, h, w)`.
Norm = Callable[[int], Callable[[Float[Array, "c h w"]], Float[Array, "c h w"]]]
