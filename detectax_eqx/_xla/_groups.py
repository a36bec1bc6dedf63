"""Convolution in groups of channels, or with gaps between the taps of its kernel.

On CPU, XLA computes a depthwise convolution, which has one channel per group, without vectors. `_depthwise` is a sum of
shifted maps instead, one for each tap of the kernel. It is a primitive for the reasons in `_convolution.py`.
"""

from functools import partial, reduce
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from ._plain import by_platform, is_plain
from ._varying import varying_like


def convolve_groups(
    x: Float[Array, "n i h w"],
    weight: Float[Array, "o i_g kh kw"],
    bias: Float[Array, " o"] | None = None,
    *,
    stride: int,
    padding: int,
    groups: int,
    dilation: int,
) -> Float[Array, "n o h2 w2"]:
    """Cross-correlates `n` maps, zero-padded on all sides, group by group, and adds the bias."""
    offset = jnp.zeros((1,), x.dtype) if bias is None else bias
    x, weight, offset = varying_like((x, weight, offset))
    pads = ((padding, padding),) * 2
    if x.shape[1] == weight.shape[0] == groups and dilation == 1 and not is_plain("depthwise"):
        y = _depthwise_p.bind(x, weight, pads=pads, stride=stride, spread=1)
    else:
        y = _by_xla(x, weight, pads=pads, stride=stride, groups=groups, dilation=dilation)
    return y if bias is None else y + offset.astype(y.dtype)[None, :, None, None]


def _by_xla(x, weight, *, pads, stride, groups, spread=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        pads,
        lhs_dilation=(spread, spread),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )


@partial(jax.jit, static_argnames=("pads", "stride", "spread"))
def _depthwise(x, weight, *, pads, stride, spread):
    """Convolves each channel of `x (n, c, h, w)`, with gaps of `spread - 1` between its pixels, by its own kernel."""

    def cpu(x, weight):
        maps = _shifted(x, weight.shape[2:], pads=pads, stride=stride, spread=spread)
        kernel = weight.reshape(weight.shape[0], -1).T[:, None, :, None, None]  # (taps, 1, c, 1, 1)
        return reduce(jnp.add, [shifted * tap for shifted, tap in zip(maps, kernel, strict=True)])

    default = partial(_by_xla, pads=pads, stride=stride, spread=spread, groups=x.shape[1])
    return by_platform(x, weight, cpu=cpu, default=default, trick="depthwise")


def _shifted(x, kernel, *, pads, stride, spread):
    """For each tap of a kernel in row-major order, the pixels that it reads: a map of the size of the result."""
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), (0, 0, 0), *((low, high, spread - 1) for low, high in pads)])
    ends = [(side - taps) // stride * stride + 1 for side, taps in zip(x.shape[2:], kernel, strict=True)]
    rows, columns = ([slice(i, i + end, stride) for i in range(taps)] for taps, end in zip(kernel, ends, strict=True))
    return [x[:, :, row, column] for row, column in product(rows, columns)]


def _image_gradient(cotangent, x, weight, *, pads, stride, spread):
    """Convolves the cotangent with the kernel rotated by 180 degrees. Stride and spread change places."""
    sides = zip(pads, weight.shape[2:], x.aval.shape[2:], cotangent.shape[2:], strict=True)
    pads = tuple((k - 1 - low, (size - 1) * spread + low - (out - 1) * stride) for (low, _), k, size, out in sides)
    return _depthwise_p.bind(cotangent, weight[:, :, ::-1, ::-1], pads=pads, stride=spread, spread=stride)


def _weight_gradient(cotangent, x, weight, **options):
    return _gradient_in_weight(cotangent, x, weight.aval, **options)


@partial(jax.jit, static_argnames=("weight", "pads", "stride", "spread"))
def _gradient_in_weight(cotangent, x, weight, **options):
    """Sums the product of the cotangent and the pixels that each tap reads."""

    def cpu(cotangent, x):
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32  # sums over many pixels, at least in float32
        maps = _shifted(x.astype(dtype), weight.shape[2:], **options)
        sums = [(shifted * cotangent.astype(dtype)).sum(axis=(0, 2, 3)) for shifted in maps]
        return jnp.stack(sums, axis=1).reshape(weight.shape).astype(x.dtype)

    def default(cotangent, x):
        forward = partial(_by_xla, x, groups=weight.shape[0], **options)
        return jax.linear_transpose(forward, weight)(cotangent)[0]

    return by_platform(cotangent, x, cpu=cpu, default=default, trick="depthwise")


def _abstract(x, weight, **options):
    return jax.typeof(jax.eval_shape(partial(_by_xla, groups=x.shape[1], **options), x, weight))


def _batch(args, dims, **options):
    x, weight = args
    if dims[1] is not None or 0 in x.shape:
        return jax.vmap(lambda x, weight: _by_xla(x, weight, groups=x.shape[1], **options), in_axes=dims)(*args), 0
    maps = jnp.moveaxis(x, dims[0], 0)  # (b, n, c, h, w)
    y = _depthwise_p.bind(maps.reshape(-1, *maps.shape[2:]), weight, **options)
    return y.reshape(maps.shape[0], -1, *y.shape[1:]), 0


_depthwise_p = Primitive("depthwise")
_depthwise_p.def_impl(_depthwise)
_depthwise_p.def_abstract_eval(_abstract)
mlir.register_lowering(_depthwise_p, mlir.lower_fun(_depthwise, multiple_results=False))
batching.primitive_batchers[_depthwise_p] = _batch
ad.defbilinear(_depthwise_p, _image_gradient, _weight_gradient)
