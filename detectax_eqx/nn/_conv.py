"""Convolutions over a single `(c, h, w)` map."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float, PRNGKeyArray

from .._xla import convolve, convolve_groups, max_pool, named_call


Initializer = Callable[[PRNGKeyArray, Sequence[int]], Array]

# Weights are OIHW. Fan-out He initialisation preserves the scale of gradients through ReLU (arXiv:1502.01852), as in
# ResNet.
he_fan_out: Initializer = variance_scaling(2.0, "fan_out", "normal", in_axis=1, out_axis=0)
# torch's `kaiming_uniform_(a=1)`, for layers that no activation follows, as in FPN.
lecun_uniform: Initializer = variance_scaling(1.0, "fan_in", "uniform", in_axis=1, out_axis=0)
# torch's `xavier_uniform_`, Glorot's (https://proceedings.mlr.press/v9/glorot10a.html).
xavier_uniform: Initializer = variance_scaling(1.0, "fan_avg", "uniform", in_axis=1, out_axis=0)


def conv2d(
    x: Float[Array, "i h w"],
    weight: Float[Array, "o _ kh kw"],
    bias: Float[Array, " o"] | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    dilation: int = 1,
) -> Float[Array, "o h2 w2"]:
    """Cross-correlates a map with a kernel, with zero padding, as in `torch.nn.functional.conv2d`.

    A 1×1 kernel without padding is a matrix product over the strided pixels.

    - `weight`: `(o, i / groups, kh, kw)`.
    - `groups`: number of groups of channels. Each group of outputs depends on its group of inputs only; with as many
      groups as channels, the convolution is depthwise.
    - `dilation`: distance in pixels between the taps of the kernel.

    Raises a `ValueError` if an option is less than 1, or if the channels do not fit the groups.

    >>> x = jnp.arange(4.0).reshape(1, 2, 2)
    >>> conv2d(x, jnp.full((1, 1, 1, 1), 2.0)).tolist()
    [[[0.0, 2.0], [4.0, 6.0]]]
    """
    if stride < 1 or groups < 1 or dilation < 1:
        raise ValueError(f"stride, groups and dilation must be at least 1, got {stride}, {groups} and {dilation}.")
    if x.shape[0] != groups * weight.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"x has {x.shape[0]} channels, but weight {weight.shape} in {groups} groups needs "
            f"{groups * weight.shape[1]}, and a multiple of {groups} outputs."
        )
    if groups > 1 or dilation > 1:
        options = {"stride": stride, "padding": padding, "groups": groups, "dilation": dilation}
        return convolve_groups(x[None], weight, bias, **options)[0]
    if weight.shape[2:] == (1, 1) and padding == 0:
        x, stride = x[:, ::stride, ::stride], 1  # (i, h, w) -> (i, h2, w2)
    return convolve(x[None], weight, bias, stride=stride, padding=padding)[0]


class Conv2d(eqx.Module):
    """A convolution with parameters `weight (o, i / groups, k, k)` and, unless `use_bias=False`, `bias (o)`."""

    weight: Float[Array, "o _ k k"]
    bias: Float[Array, " o"] | None
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    dilation: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        key: PRNGKeyArray,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        init: Initializer = he_fan_out,
    ):
        """Initialises the layer.

        `padding` defaults to `dilation * (kernel_size // 2)`, which keeps the size at stride 1. The other options are
        those of `conv2d`.
        """
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide the channels, got {in_channels} to {out_channels} in {groups} groups."
            )
        self.weight = init(key, (out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = jnp.zeros(out_channels) if use_bias else None
        self.stride = stride
        self.padding = dilation * (kernel_size // 2) if padding is None else padding
        self.groups = groups
        self.dilation = dilation

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o h2 w2"]:
        options = {"stride": self.stride, "padding": self.padding, "groups": self.groups, "dilation": self.dilation}
        return conv2d(x, self.weight, self.bias, **options)


class Upsample2x2(eqx.Module):
    """A transposed convolution with kernel size 2 and stride 2: each pixel becomes a 2×2 block.

    Blocks do not overlap, so that the layer is one matrix product and a rearrangement. `weight` is `(i, o, 2, 2)`, as
    in `torch.nn.ConvTranspose2d`.
    """

    weight: Float[Array, "i o 2 2"]
    bias: Float[Array, " o"]

    def __init__(self, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        # torch computes the fan-out of a transposed kernel from its first axis.
        self.weight = he_fan_out(key, (in_channels, out_channels, 2, 2))
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o 2*h 2*w"]:
        return rearrange(self.blocks(x), "h w a b o -> o (h a) (w b)")

    def blocks(self, x: Float[Array, "i h w"]) -> Float[Array, "h w 2 2 o"]:
        """Returns the block of each pixel before the rearrangement, for pixelwise operations that follow."""
        return jnp.einsum("ihw,ioab->hwabo", x, self.weight) + self.bias[None, None, None, None]


class Upsample4x4(eqx.Module):
    """A transposed convolution with kernel size 4, stride 2 and padding 1, which doubles the sides of a map.

    Along an axis, an output of even index is `kernel[3] * x[i - 1] + kernel[1] * x[i]`, and the next one is
    `kernel[2] * x[i] + kernel[0] * x[i + 1]`. The layer is therefore one 3×3 convolution with an output channel for
    each of the four positions in a 2×2 block, and a rearrangement. `weight` is `(i, o, 4, 4)`, as in
    `torch.nn.ConvTranspose2d`.
    """

    weight: Float[Array, "i o 4 4"]
    bias: Float[Array, " o"]

    def __init__(self, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        # torch computes the fan-out of a transposed kernel from its first axis.
        self.weight = he_fan_out(key, (in_channels, out_channels, 4, 4))
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: Float[Array, "i h w"]) -> Float[Array, "o 2*h 2*w"]:
        # With a zero on either side, the kernel's entries for position a of a block are a, a + 2 and a + 4, and belong
        # to the pixels i + 1, i and i - 1.
        kernel = jnp.pad(self.weight, [(0, 0), (0, 0), (1, 1), (1, 1)])  # (i, o, 6, 6)
        kernel = rearrange(kernel, "i o (h a) (w b) -> (o a b) i h w", a=2, b=2)[:, :, ::-1, ::-1]
        blocks = conv2d(x, kernel, jnp.repeat(self.bias, 4), padding=1)  # (4 o, h, w)
        return rearrange(blocks, "(o a b) h w -> o (h a) (w b)", a=2, b=2)


def max_pool2d(
    x: Float[Array, "c h w"], *, kernel_size: int, stride: int, padding: int = 0, round_up: bool = False
) -> Float[Array, "c h2 w2"]:
    """Takes the maximum of each window, where padding never wins. On ties, the gradient goes to the first value.

    Both rules are torch's. `round_up`: whether a last window that extends past the map counts, torch's `ceil_mode`.

    >>> max_pool2d(jnp.arange(16.0).reshape(1, 4, 4), kernel_size=2, stride=2).tolist()
    [[[5.0, 7.0], [13.0, 15.0]]]
    """
    if kernel_size < 1 or stride < 1:
        raise ValueError(f"kernel_size and stride must be at least 1, got {kernel_size} and {stride}.")
    if round_up:  # such a window must begin on the map or its first padding
        sides = [side + 2 * padding for side in x.shape[1:]]
        windows = [min(-(-(side - kernel_size) // stride), (side - padding - 1) // stride) for side in sides]
        more = [max(0, n * stride + kernel_size - side) for n, side in zip(windows, sides, strict=True)]
        x = jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])), constant_values=-jnp.inf)
    return max_pool(x, kernel_size=kernel_size, stride=stride, padding=padding)


def relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`max(x, 0)`, with gradient 0 at 0.

    >>> relu(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return jax.nn.relu(x)


def silu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x σ(x)` with the sigmoid function (arXiv:1702.03118).

    >>> round(float(silu(jnp.array(1.0))), 4)
    0.7311
    """
    return named_call(_silu, x)


def _silu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return x * jax.nn.sigmoid(x)
