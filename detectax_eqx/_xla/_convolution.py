"""Batched convolution whose gradients are also fast on CPU.

XLA's convolution has five shortcomings on CPU; README.md gives the figures.

- Inside a loop or a condition, only channels-last operands reach its fast kernels.
- Weight gradients of large maps run at a fraction of the forward pass's rate.
- A 1×1 convolution as a single product over the batch transposes its operands in memory, back and forth.
- 3×3 kernels with many channels are applied directly instead of by Winograd's algorithm.
- Gradients of kernels and biases are scheduled after the gradients of all images, and their operands are kept until
  then.

`convolve` is therefore a primitive, bilinear in image and weight. It has its own implementations on CPU; elsewhere it
is XLA's convolution with XLA's gradients. It is not a `custom_vjp`: under `vmap` that would compute one weight gradient
per example and sum them afterwards, whereas here the sum is part of the products.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from ._plain import by_platform, is_plain
from ._undivided import undivided
from ._varying import varying_like
from ._winograd import convolve_3x3, weight_gradient_3x3


# Pixels per step of the weight gradient. With 256 channels they take 1 MB, which fits a core's cache. Values from 1,000
# to 2,000 are equally fast.
BLOCK_PIXELS = 1000
# Up to this many images, the gradient of a 1×1 kernel is one product per image. With more, programs become too long.
MAX_SEPARATE_IMAGES = 8
# Minimum number of input and output channels for Winograd's algorithm. With 128 it is as fast as the direct form, with
# 64 slower.
WINOGRAD_CHANNELS = 256


def convolve(
    x: Float[Array, "n i h w"],
    weight: Float[Array, "o i kh kw"],
    bias: Float[Array, " o"] | None = None,
    *,
    stride: int,
    padding: int,
) -> Float[Array, "n o h2 w2"]:
    """Cross-correlates `n` maps, zero-padded on all sides, with a kernel and adds the bias."""
    parameters = (weight,) if bias is None else (weight, bias.astype(weight.dtype))
    x, *parameters = varying_like((x, *parameters))  # so that gradients are summed over devices where needed
    run = _convolve_and_add if is_plain("convolution") else _convolve_p.bind
    return run(x, *parameters, stride=stride, padding=padding)


# The functions below are jitted so that both forms are traced once for all convolutions of the same shapes.
@partial(jax.jit, static_argnames=("stride", "padding"))
def _convolve(x, weight, *, stride, padding):
    def cpu(x, weight):
        if _is_pointwise(weight, stride, padding):
            return _products("noi,nip->nop", weight[:, :, 0, 0], x)
        pads = ((padding, padding),) * 2
        y = _channels_last(x.transpose(0, 2, 3, 1), weight.transpose(2, 3, 1, 0), pads, stride=stride)
        return y.transpose(0, 3, 1, 2)

    default = partial(_by_xla, stride=stride, padding=padding)
    return by_platform(x, weight, cpu=cpu, default=default, trick="convolution")


def _image_gradient(cotangent, x, weight, *, stride, padding):
    return _gradient_in_image(cotangent, weight, x.aval, stride=stride, padding=padding)


@partial(jax.jit, static_argnames=("image", "stride", "padding"))
def _gradient_in_image(cotangent, weight, image, *, stride, padding):
    """Convolves the cotangent, dilated by the stride, with the kernel rotated by 180 degrees."""

    def cpu(cotangent, weight):
        if _is_pointwise(weight, stride, padding):
            return _products("noi,nop->nip", weight[:, :, 0, 0], cotangent)
        pads = [
            (k - 1 - padding, size + padding - (stride * (out - 1) + 1))
            for k, size, out in zip(weight.shape[2:], image.shape[2:], cotangent.shape[2:], strict=True)
        ]
        rotated = weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)  # (kh, kw, o, i)
        return _channels_last(cotangent.transpose(0, 2, 3, 1), rotated, pads, spread=stride).transpose(0, 3, 1, 2)

    def default(cotangent, weight):
        forward = partial(_by_xla, weight=weight, stride=stride, padding=padding)
        return jax.linear_transpose(forward, image)(cotangent)[0]

    return by_platform(cotangent, weight, cpu=cpu, default=default, trick="convolution")


def _weight_gradient(cotangent, x, weight, *, stride, padding):
    return _gradient_in_weight(cotangent, x, weight.aval, stride=stride, padding=padding)


@partial(jax.jit, static_argnames=("weight", "stride", "padding"))
def _gradient_in_weight(cotangent, x, weight, *, stride, padding):
    """Convolves the image with the cotangent dilated by the stride. The batch takes the role of the channels."""
    kernel = weight.shape[2:]

    def cpu(cotangent, x):
        if _is_pointwise(weight, stride, padding):
            return _sum_of_products(cotangent, x)[:, :, None, None]
        if stride == 1 and _by_winograd(kernel, weight.shape[:2], ((padding, padding),) * 2, x.dtype):
            return weight_gradient_3x3(cotangent.transpose(0, 2, 3, 1), x.transpose(0, 2, 3, 1))
        if stride == 1:
            return _weight_gradient_by_blocks(cotangent, x, kernel, padding)
        pads = [
            (padding, stride * (out - 1) + k - size - padding)
            for k, size, out in zip(kernel, x.shape[2:], cotangent.shape[2:], strict=True)
        ]
        y = _channels_last(x.transpose(1, 2, 3, 0), cotangent.transpose(2, 3, 0, 1), pads, dilation=stride)
        return y.transpose(3, 0, 1, 2)

    def default(cotangent, x):
        forward = partial(_by_xla, x, stride=stride, padding=padding)
        return jax.linear_transpose(forward, weight)(cotangent)[0]

    return by_platform(cotangent, x, cpu=cpu, default=default, trick="convolution")


def _weight_gradient_by_blocks(cotangent, x, kernel, padding):
    """Computes one product per kernel row: the cotangent times the concatenated pixels that the row's taps read.

    Works on one block of rows at a time, so that all taps read it from the cache.
    """
    n, channels, height, width = cotangent.shape
    rows = min(height, -(-BLOCK_PIXELS // (n * width)))
    steps = -(-height // rows)
    extra = steps * rows - height
    image = jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (padding, padding + extra), (padding, padding), (0, 0)))
    cotangent = jnp.pad(cotangent.transpose(0, 2, 3, 1), ((0, 0), (0, extra), (0, 0), (0, 0)))

    def add(totals, step):
        block = lax.dynamic_slice_in_dim(image, step * rows, rows + kernel[0] - 1, 1)
        transposed = lax.dynamic_slice_in_dim(cotangent, step * rows, rows, 1).reshape(-1, channels).T
        transposed = lax.optimization_barrier(transposed)  # transposed once, not in each product
        inputs = [  # one per kernel row, (n, rows, width, kw i)
            jnp.concatenate([block[:, i : i + rows, j : j + width] for j in range(kernel[1])], axis=-1)
            for i in range(kernel[0])
        ]
        product = partial(jnp.matmul, transposed, preferred_element_type=zeros.dtype)
        return [total + product(s.reshape(-1, s.shape[-1])) for total, s in zip(totals, inputs, strict=True)], None

    # Sums over many steps are accumulated in at least float32.
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    zeros = varying_like(jnp.zeros((channels, kernel[1] * x.shape[1]), dtype), cotangent, x)
    totals, _ = lax.scan(add, [zeros] * kernel[0], jnp.arange(steps, dtype=jnp.int32))
    by_tap = jnp.stack(totals).reshape(kernel[0], channels, kernel[1], -1)  # (kh, o, kw, i)
    return by_tap.transpose(1, 3, 0, 2).astype(x.dtype)  # (kh, o, kw, i) -> (o, i, kh, kw)


def _by_xla(x, weight, *, stride, padding):
    return lax.conv_general_dilated(
        x, weight, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def _channels_last(x, weight, pads, *, stride=1, spread=1, dilation=1):
    """Convolves in NHWC and HWIO, the only layout that is fast on CPU everywhere in a program."""
    if stride == spread == dilation == 1 and _by_winograd(weight.shape[:2], weight.shape[2:], pads, x.dtype):
        return convolve_3x3(x, weight)
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        pads,
        lhs_dilation=(spread, spread),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _by_winograd(kernel, channels, pads, dtype):
    """Whether to use Winograd's algorithm. Its transforms are too inexact for half precision."""
    if is_plain("winograd"):
        return False
    same = tuple(kernel) == (3, 3) and tuple(pads) == ((1, 1), (1, 1))
    return same and min(channels) >= WINOGRAD_CHANNELS and jnp.finfo(dtype).bits >= 32


def _is_pointwise(weight, stride, padding):
    return weight.shape[2:] == (1, 1) and stride == 1 and padding == 0


def _products(subscripts, matrix, maps):
    """Multiplies a matrix by the pixels `p` of each map `n`."""
    pixels = maps.reshape(*maps.shape[:2], -1)
    # Broadcast the matrix over the maps: a product per map would save its slice as a residual, in addition to the maps.
    matrices = jnp.broadcast_to(matrix, (maps.shape[0], *matrix.shape))
    return jnp.einsum(subscripts, matrices, pixels).reshape(maps.shape[0], -1, *maps.shape[2:])


def _sum_of_products(a, b):
    """Sums products over the pixels `p` of two maps, and over all pairs of maps `n`."""
    a, b = (maps.reshape(*maps.shape[:2], -1) for maps in (a, b))
    if len(a) > MAX_SEPARATE_IMAGES:
        return jnp.einsum("nop,nip->oi", a, b)
    return reduce(jnp.add, [jnp.einsum("op,ip->oi", *pair) for pair in zip(a, b, strict=True)])


def _convolve_and_add(x, weight, *bias, **options):
    return _add(_convolve(x, weight, **options), *bias)


def _add(y, *bias):
    return y + bias[0][None, :, None, None] if bias else y


def _abstract(x, weight, *bias, **options):
    return jax.typeof(jax.eval_shape(partial(_by_xla, **options), x, weight))


def _batch(args, dims, **options):
    x, *parameters = args
    if any(dim is not None for dim in dims[1:]) or 0 in x.shape:
        return jax.vmap(lambda x, weight, *bias: _add(_by_xla(x, weight, **options), *bias), in_axes=dims)(*args), 0
    y = convolve(_flat(x, dims[0]), *parameters, **options)
    return y.reshape(x.shape[dims[0]], -1, *y.shape[1:]), 0


def _flat(x, dim):
    """Merges the batch axis `dim` into the axis of maps."""
    x = jnp.moveaxis(x, dim, 0)
    return x.reshape(-1, *x.shape[2:])


def _differentiate(primals, tangents, **options):
    (x, weight, *_), (dx, dweight, *dbias) = primals, tangents
    y = convolve(*primals, **options)
    dbias = [d for d in dbias if not isinstance(d, ad.Zero)]
    if not isinstance(dx, ad.Zero) and not isinstance(dweight, ad.Zero):
        return y, _derivative_p.bind(x, weight, dx, dweight, *dbias, **options)
    parts = [_add(jnp.zeros_like(y), *dbias)] if dbias else []
    if not isinstance(dx, ad.Zero):
        parts.append(convolve(dx, weight, **options))
    if not isinstance(dweight, ad.Zero):
        parts.append(convolve(x, dweight, **options))
    return y, reduce(jnp.add, parts)


# Bilinear without a bias. With one it is never transposed: its derivative has no bias, or is the primitive below.
_convolve_p = Primitive("convolve")
_convolve_p.def_impl(_convolve_and_add)
_convolve_p.def_abstract_eval(_abstract)
mlir.register_lowering(_convolve_p, mlir.lower_fun(_convolve_and_add, multiple_results=False))
batching.primitive_batchers[_convolve_p] = _batch
ad.defbilinear(_convolve_p, _image_gradient, _weight_gradient)
ad.primitive_jvps[_convolve_p] = _differentiate


# If image and kernel both have a tangent, the derivative is one primitive, so that all gradients form one scheduling
# unit.


def _derivative(x, weight, dx, dweight, *dbias, **options):
    return convolve(dx, weight, **options) + convolve(x, dweight, *dbias, **options)


def _transpose_derivative(cotangent, x, weight, dx, dweight, *dbias, **options):
    tangents = dx, dweight, *dbias
    gradients = _gradients(cotangent, x, weight, (dx.aval, dweight.aval), biased=bool(dbias), **options)
    return None, None, *(g if ad.is_undefined_primal(t) else None for g, t in zip(gradients, tangents, strict=True))


@partial(jax.jit, static_argnames=("shapes", "biased", "stride", "padding"))
def _gradients(cotangent, x, weight, shapes, *, biased, **options):
    def gradients(cotangent, x, weight):
        in_image = _gradient_in_image(cotangent, weight, shapes[0], **options)
        in_weight = _gradient_in_weight(cotangent, x, shapes[1], **options)
        return [in_image, in_weight] + [cotangent.sum(axis=(0, 2, 3))] * biased

    return undivided(gradients, cotangent, x, weight)


def _batch_derivative(args, dims, **options):
    parameters_dims = dims[1:2] + dims[3:]
    if any(dim is not None for dim in parameters_dims) or dims[0] is None or dims[2] is None or 0 in args[0].shape:
        return jax.vmap(partial(_derivative, **options), in_axes=dims)(*args), 0
    x, weight, dx, *tangents = args
    y = _derivative_p.bind(_flat(x, dims[0]), weight, _flat(dx, dims[2]), *tangents, **options)
    return y.reshape(x.shape[dims[0]], -1, *y.shape[1:]), 0


def _differentiate_derivative(primals, tangents, **options):
    return jax.jvp(partial(_derivative, **options), primals, tuple(map(ad.instantiate_zeros, tangents)))


_derivative_p = Primitive("convolve_derivative")
_derivative_p.def_impl(_derivative)
_derivative_p.def_abstract_eval(_abstract)
mlir.register_lowering(_derivative_p, mlir.lower_fun(_derivative, multiple_results=False))
batching.primitive_batchers[_derivative_p] = _batch_derivative
ad.primitive_transposes[_derivative_p] = _transpose_derivative
ad.primitive_jvps[_derivative_p] = _differentiate_derivative
