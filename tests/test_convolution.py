"""The convolution primitive, compared with XLA's convolution and its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from detectax_eqx import nn


def _by_xla(x, weight, bias=None, *, stride, padding, groups=1):
    y = lax.conv_general_dilated(
        x[None],
        weight,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )
    return y[0] if bias is None else y[0] + bias[:, None, None]


CASES = [
    # kernel, stride, padding, height, width
    (1, 1, 0, 7, 6),
    (1, 2, 0, 7, 6),
    (3, 1, 1, 11, 13),
    (3, 2, 1, 12, 14),
    (3, 2, 1, 11, 13),
    (7, 2, 3, 21, 16),
    (3, 1, 0, 9, 8),
    (2, 2, 0, 8, 9),
    (5, 3, 1, 17, 20),
    (3, 1, 1, 40, 300),  # more rows than one block of the weight gradient
]


def _compare(function, *arrays):
    """Compares `function` of our convolution with `function` of XLA's, relative to the largest value."""
    ours, theirs = function(nn.conv2d), function(_by_xla)
    for a, b in zip(jax.tree.leaves(ours(*arrays)), jax.tree.leaves(theirs(*arrays)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("kernel, stride, padding, height, width", CASES)
def test_gradients_of_a_batch(getkey, kernel, stride, padding, height, width, batch):
    x, weight = jr.normal(getkey(), (batch, 5, height, width)), jr.normal(getkey(), (6, 5, kernel, kernel))

    def gradients(convolution):
        def total(x, weight):
            return jnp.sin(jax.vmap(lambda x: convolution(x, weight, stride=stride, padding=padding))(x)).sum()

        def run(x, weight):
            return jax.vmap(lambda x: convolution(x, weight, stride=stride, padding=padding))(x), jax.grad(
                total, argnums=(0, 1)
            )(x, weight)

        return jax.jit(run)

    _compare(gradients, x, weight)


@pytest.mark.parametrize("kernel, channels, padding", [(1, 4, 0), (3, 4, 1), (3, 256, 1)])
def test_a_batch_of_no_image(getkey, kernel, channels, padding):
    x, weight = jnp.zeros((0, channels, 6, 7)), jr.normal(getkey(), (channels, channels, kernel, kernel))

    def run(x, weight):
        return jax.vmap(lambda x: nn.conv2d(x, weight, padding=padding))(x)

    def one(x):
        return nn.conv2d(x, weight, padding=padding).sum()

    assert run(x, weight).shape == jax.vmap(jax.grad(one))(x).shape == x.shape
    gradient = jax.jit(jax.grad(lambda weight: run(x, weight).sum()))(weight)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(weight))


@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_transformations(getkey, kernel, stride, padding):
    x, weights = jr.normal(getkey(), (3, 4, 9, 8)), jr.normal(getkey(), (3, 5, 4, kernel, kernel))

    def total(convolution, x, weight):
        return jnp.sin(convolution(x, weight, stride=stride, padding=padding)).sum()

    def gradient(convolution):
        return jax.grad(partial(total, convolution), argnums=(0, 1))

    _compare(lambda c: jax.vmap(gradient(c), in_axes=(0, None)), x, weights[0])  # one gradient per example
    _compare(lambda c: jax.vmap(gradient(c)), x, weights)  # different weights per example
    _compare(lambda c: jax.vmap(gradient(c), in_axes=(None, 0)), x[0], weights)
    _compare(lambda c: jax.vmap(jax.vmap(gradient(c), (0, None)), (None, 0)), x, weights)
    _compare(lambda c: lambda x, w: jax.jvp(partial(total, c), (x, w), (x, w))[1], x[0], weights[0])
    _compare(lambda c: jax.grad(lambda w: (gradient(c)(x[0], w)[1] ** 2).sum()), weights[0])  # second order
    _compare(lambda c: lambda x, w: jax.jvp(gradient(c), (x, w), (x, w))[1], x[0], weights[0])
    _compare(lambda c: jax.hessian(partial(total, c), argnums=(0, 1)), x[0, :, :4, :3], weights[0])


@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_bias(getkey, kernel, stride, padding):
    x, weight = jr.normal(getkey(), (3, 4, 9, 8)), jr.normal(getkey(), (5, 4, kernel, kernel))
    bias = jr.normal(getkey(), (5,))

    def total(convolution, x, weight, bias):
        return jnp.sin(convolution(x, weight, bias, stride=stride, padding=padding)).sum()

    def of_batch(convolution, *arrays):
        return jax.vmap(partial(total, convolution), in_axes=(0, None, None))(*arrays).sum()

    # Every combination of trained and frozen arguments.
    for argnums in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        _compare(lambda c, argnums=argnums: jax.jit(jax.grad(partial(of_batch, c), argnums)), x, weight, bias)
    gradient = partial(jax.grad, argnums=(0, 1, 2))
    _compare(lambda c: jax.vmap(gradient(partial(total, c)), in_axes=(0, None, None)), x, weight, bias)
    _compare(
        lambda c: jax.vmap(gradient(partial(total, c)), in_axes=(None, None, 0)),
        x[0],
        weight,
        jr.normal(getkey(), (2, 5)),
    )
    primals = (x[0], weight, bias)
    _compare(lambda c: lambda *a: jax.jvp(partial(total, c), a, a)[1], *primals)
    _compare(lambda c: lambda *a: jax.jvp(gradient(partial(total, c)), a, a)[1], *primals)
    _compare(lambda c: jax.hessian(partial(total, c), argnums=(0, 1, 2)), x[0, :, :4, :3], weight, bias)


def test_gradients_that_are_not_finite(getkey):
    """Values in the image that are not finite affect only the gradient of the weight."""
    x, weight = jr.normal(getkey(), (4, 9, 8)), jr.normal(getkey(), (5, 4, 3, 3))

    def gradient(x):
        return jax.grad(lambda x, w: nn.conv2d(x, w, padding=1).sum(), argnums=(0, 1))(x, weight)

    (in_image, _), (same, in_weight) = gradient(x), gradient(x.at[:, 3, 4].set(jnp.array([jnp.inf, jnp.nan, 0, 0])))
    assert not jnp.isfinite(in_weight).all()
    np.testing.assert_array_equal(in_image, same)
    _, pull = jax.vjp(lambda x, weight: nn.conv2d(x, weight, padding=1), x, weight)
    assert all(jnp.isnan(g).all() for g in pull(jnp.full((5, 9, 8), jnp.nan)))


def test_in_loops_and_conditions(getkey):
    xs, weight = jr.normal(getkey(), (3, 4, 9, 8)), jr.normal(getkey(), (5, 4, 3, 3))

    def gradient(convolution):
        def total(xs, weight):
            def step(sum, x):
                apply = partial(convolution, stride=1, padding=1)
                y = lax.cond(x[0, 0, 0] > -9, lambda: apply(x, weight), lambda: jnp.zeros((5, 9, 8)))
                return sum + jnp.sin(y).sum(), None

            return lax.scan(step, jnp.zeros(()), xs)[0]

        return jax.jit(jax.grad(total, argnums=(0, 1)))

    _compare(gradient, xs, weight)


def test_programs_of_other_platforms_hold_one_convolution(getkey):
    """On other platforms, programs and gradients use XLA's own convolutions and nothing written for the CPU."""
    x, weight = jr.normal(getkey(), (2, 4, 9, 8)), jr.normal(getkey(), (5, 4, 3, 3))

    def total(x, weight):
        return jax.vmap(lambda x: nn.conv2d(x, weight, padding=1))(x).sum()

    text = jax.jit(jax.grad(total, argnums=(0, 1))).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.convolution") == 2
    assert "stablehlo.while" not in text


def test_bfloat16(getkey):
    x, weight = (jr.normal(getkey(), shape).astype(jnp.bfloat16) for shape in ((2, 4, 9, 8), (5, 4, 3, 3)))

    def total(x, weight):
        return jax.vmap(lambda x: nn.conv2d(x, weight, padding=1))(x).astype(jnp.float32).sum()

    gradients = jax.grad(total, argnums=(0, 1))(x, weight)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    exact = jax.grad(total, argnums=(0, 1))(x.astype(jnp.float32), weight.astype(jnp.float32))
    for a, b in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("batch, height, width", [(1, 5, 8), (3, 12, 7), (2, 45, 130)])
def test_many_channels(getkey, batch, height, width):
    """With many channels, 3×3 kernels use Winograd's algorithm, in one block of rows or in several."""
    x, weight = jr.normal(getkey(), (batch, 256, height, width)), jr.normal(getkey(), (256, 256, 3, 3)) / 48

    def run(convolution):
        convolve = jax.vmap(partial(convolution, stride=1, padding=1), in_axes=(0, None))
        return jax.jit(lambda x, weight, y: (convolve(x, weight), jax.vjp(convolve, x, weight)[1](y)))

    _compare(run, x, weight, jr.normal(getkey(), x.shape))


DEPTHWISE_CASES = [
    # kernel, stride, padding, height, width
    (3, 1, 1, 11, 13),
    (3, 2, 1, 12, 14),
    (3, 2, 1, 11, 13),
    (5, 2, 2, 16, 9),
    (5, 3, 1, 17, 20),
    (3, 1, 0, 9, 8),
    (2, 2, 3, 8, 9),  # the padding exceeds the kernel
    (1, 1, 0, 4, 5),
]


@pytest.mark.parametrize("kernel, stride, padding, height, width", DEPTHWISE_CASES)
def test_depthwise(getkey, kernel, stride, padding, height, width):
    """Values, gradients, forward derivatives and derivatives of gradients, of a batch and of several kernels."""
    x, kernels = jr.normal(getkey(), (3, 6, height, width)), jr.normal(getkey(), (2, 6, 1, kernel, kernel))
    options = {"stride": stride, "padding": padding}

    def results(convolution):
        def total(x, weight):
            return jnp.sin(jax.vmap(lambda x: convolution(x, weight, **options))(x)).sum()

        def run(x, kernels):
            y = jax.vmap(lambda weight: jax.vmap(lambda x: convolution(x, weight, **options))(x))(kernels)
            gradients = jax.grad(total, argnums=(0, 1))
            tangents = jax.jvp(gradients, (x, kernels[0]), (jnp.cos(x), jnp.cos(kernels[0])))
            by_kernel = jax.vmap(jax.grad(total, argnums=1), in_axes=(None, 0))(x, kernels)
            return y, tangents, by_kernel

        return jax.jit(run)

    ours, theirs = (
        jax.tree.leaves(results(partial(convolution, groups=6))(x, kernels)) for convolution in (nn.conv2d, _by_xla)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_depthwise_of_no_image_and_in_bfloat16(getkey):
    weight = jr.normal(getkey(), (6, 1, 3, 3))

    def gradients(x, weight):
        def total(x, weight):
            return jax.vmap(partial(nn.conv2d, padding=1, groups=6), in_axes=(0, None))(x, weight).sum()

        return jax.grad(total, argnums=(0, 1))(x, weight)

    in_image, in_weight = gradients(jnp.zeros((0, 6, 5, 4)), weight)
    assert in_image.shape == (0, 6, 5, 4) and not in_weight.any()
    x = jr.normal(getkey(), (2, 6, 40, 50))
    exact, half = gradients(x, weight)[1], gradients(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))[1]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.01 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("kernel, channels, groups", [(1, 4, 1), (3, 4, 1), (3, 256, 1), (3, 8, 8)])
def test_float64(getkey, kernel, channels, groups):
    """Every form computes in double precision, in the image and in its gradients, under strict promotion."""
    with jax.enable_x64(True):
        x = jr.normal(getkey(), (2, channels, 9, 10), jnp.float64)
        weight = jr.normal(getkey(), (channels, channels // groups, kernel, kernel), jnp.float64)
        options = {"stride": 1, "padding": kernel // 2, "groups": groups}

        def gradients(convolve):
            total = lambda x, weight: (jax.vmap(partial(convolve, **options), (0, None))(x, weight) ** 2).sum()  # noqa: E731
            return jax.jit(jax.value_and_grad(total, (0, 1)))(x, weight)

        for a, b in zip(*map(jax.tree.leaves, (gradients(nn.conv2d), gradients(_by_xla))), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, atol=1e-12 * float(jnp.abs(b).max()))
