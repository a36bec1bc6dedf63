"""Modules against NumPy, and the properties that detectors rely on."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import nn


def _naive_conv(x, weight, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    o, _, k, _ = weight.shape
    height, width = ((side - k) // stride + 1 for side in x.shape[1:])
    out = np.zeros((o, height, width))
    for y in range(height):
        for z in range(width):
            patch = x[:, y * stride : y * stride + k, z * stride : z * stride + k]
            out[:, y, z] = (weight * patch[None]).sum(axis=(1, 2, 3))
    return out


@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3), (1, 1, 1)])
def test_conv2d(getkey, kernel, stride, padding):
    x, weight = jr.normal(getkey(), (3, 9, 8)), jr.normal(getkey(), (4, 3, kernel, kernel))
    expected = _naive_conv(np.asarray(x, np.float64), np.asarray(weight, np.float64), stride, padding)
    np.testing.assert_allclose(nn.conv2d(x, weight, stride=stride, padding=padding), expected, atol=1e-5)
    bias = jr.normal(getkey(), (4,))
    with_bias = nn.conv2d(x, weight, bias, stride=stride, padding=padding)
    np.testing.assert_allclose(with_bias, expected + np.asarray(bias)[:, None, None], atol=1e-5)


def test_upsample_is_a_transposed_convolution(getkey):
    module = nn.Upsample2x2(3, 4, key=getkey())
    module = eqx.tree_at(lambda m: m.bias, module, jr.normal(getkey(), (4,)))
    x = jr.normal(getkey(), (3, 5, 6))
    expected = np.zeros((4, 10, 12))
    for y in range(5):
        for z in range(6):
            block = np.einsum("i,ioab->oab", np.asarray(x[:, y, z]), np.asarray(module.weight))
            expected[:, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2] = block
    np.testing.assert_allclose(module(x), expected + np.asarray(module.bias)[:, None, None], atol=1e-5)


def test_upsample_with_overlapping_kernels_is_a_transposed_convolution(getkey):
    """Input pixel `i` adds its kernel to the outputs `2 i - 1`..`2 i + 2`."""
    module = nn.Upsample4x4(3, 4, key=getkey())
    module = eqx.tree_at(lambda m: m.bias, module, jr.normal(getkey(), (4,)))
    x = jr.normal(getkey(), (3, 5, 6))
    padded = np.zeros((4, 12, 14))  # with a margin of one pixel
    for y in range(5):
        for z in range(6):
            kernel = np.einsum("i,ioab->oab", np.asarray(x[:, y, z]), np.asarray(module.weight))
            padded[:, 2 * y : 2 * y + 4, 2 * z : 2 * z + 4] += kernel
    expected = padded[:, 1:-1, 1:-1] + np.asarray(module.bias)[:, None, None]
    np.testing.assert_allclose(module(x), expected, atol=1e-5)


def test_max_pool_ignores_padding():
    x = -jnp.arange(1.0, 10.0).reshape(1, 3, 3)
    out = nn.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    np.testing.assert_array_equal(out[0], [[-1, -2], [-4, -5]])


def test_max_pool_gradient_goes_to_the_first_of_equals(getkey):
    """So does that of XLA's own pooling, on a map with many ties; NaN stays NaN."""
    x = jnp.maximum(jnp.round(jr.normal(getkey(), (3, 11, 14))), 0)
    weights = jr.normal(getkey(), (3, 6, 7))

    def by_xla(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))

    def ours(x):
        return nn.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    for a, b in zip(
        *(jax.value_and_grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ours, by_xla)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert jnp.isnan(ours(x.at[0, 4, 4].set(jnp.nan))).sum() == jnp.isnan(by_xla(x.at[0, 4, 4].set(jnp.nan))).sum() > 0


def test_cast_leaves_norms_alone(getkey):
    body = nn.resnet18(key=getkey(), width=8)
    half = nn.cast(body, jnp.bfloat16)
    assert half.conv1.weight.dtype == jnp.bfloat16
    assert half.norm1.running_var.dtype == jnp.float32
    x = jr.normal(getkey(), (3, 64, 64))
    for a, b in zip(half(x), body(x), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.03 * jnp.linalg.norm(b)


def test_checkpointing_changes_no_gradient(getkey):
    key, x = getkey(), jr.normal(getkey(), (3, 64, 64))

    def gradient(checkpoint):
        body = nn.resnet18(key=key, width=8, checkpoint=checkpoint)
        run = eqx.filter_grad(lambda body, x: sum(jnp.sin(y).sum() for y in body(x)))
        return jax.tree.leaves(run(body, x)), str(eqx.filter_make_jaxpr(run)(body, x)[0])

    (plain, without), (again, program) = gradient(False), gradient(True)
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
    assert program.count(" convolve[") > without.count(" convolve[")  # the forward pass appears twice


def test_frozen_batch_norm(getkey):
    module = nn.FrozenBatchNorm(4)
    values = [jr.uniform(getkey(), (4,), minval=0.5, maxval=2.0) for _ in range(4)]
    module = eqx.tree_at(lambda m: [m.weight, m.bias, m.running_mean, m.running_var], module, values)
    x = jr.normal(getkey(), (4, 3, 5))
    weight, bias, mean, var = (np.asarray(v, np.float64)[:, None, None] for v in values)
    np.testing.assert_allclose(module(x), (x - mean) / np.sqrt(var + 1e-5) * weight + bias, atol=1e-5)


def test_group_norm(getkey):
    module = nn.GroupNorm(6, groups=3)
    module = eqx.tree_at(lambda m: [m.weight, m.bias], module, [jr.normal(getkey(), (6,)), jr.normal(getkey(), (6,))])
    x = 3.0 + 2.0 * jr.normal(getkey(), (6, 4, 5))
    grouped = np.asarray(x, np.float64).reshape(3, -1)
    normal = ((grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)).reshape(
        x.shape
    )
    expected = normal * np.asarray(module.weight)[:, None, None] + np.asarray(module.bias)[:, None, None]
    np.testing.assert_allclose(module(x), expected, atol=1e-5)
    constant = jax.grad(lambda x: module(x).sum())(jnp.full((6, 4, 5), 7.0))
    assert jnp.isfinite(constant).all()


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="48 channels in 32 groups"):
        nn.GroupNorm(48)


@pytest.mark.parametrize(
    "build, parameters, channels",
    [
        (nn.resnet18, 11_166_912, (64, 128, 256, 512)),
        (nn.resnet34, 21_267_648, (64, 128, 256, 512)),
        (nn.resnet50, 23_454_912, (256, 512, 1024, 2048)),
        (nn.resnet101, 42_394_816, (256, 512, 1024, 2048)),
        (nn.resnet152, 57_992_384, (256, 512, 1024, 2048)),
        (nn.resnext50_32x4d, 22_911_680, (256, 512, 1024, 2048)),
        (nn.resnext101_32x8d, 86_539_456, (256, 512, 1024, 2048)),
        (nn.resnext101_64x4d, 81_203_392, (256, 512, 1024, 2048)),
        (nn.wide_resnet50_2, 66_766_016, (256, 512, 1024, 2048)),
        (nn.wide_resnet101_2, 124_699_840, (256, 512, 1024, 2048)),
    ],
)
def test_resnet_parameters_equal_torchvisions(build, parameters, channels):
    """torchvision's counts, less the classifier and the norms' affine parameters, which are buffers when frozen."""
    model = eqx.filter_eval_shape(build, key=jr.key(0))
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nn.FrozenBatchNorm))
    assert sum(leaf.size for leaf in leaves if not isinstance(leaf, nn.FrozenBatchNorm)) == parameters
    assert model.channels == channels


@pytest.mark.parametrize(
    "build, parameters, channels",
    [
        (nn.mobilenet_v2, 3_504_872 - 1_281_000 - 34_112, (32, 24, 32, 64, 160, 1280)),
        (nn.mobilenet_v3_large, 5_483_032 - 2_511_080 - 24_400, (16, 24, 40, 80, 160, 960)),
    ],
)
def test_mobilenet_parameters_equal_torchvisions(build, parameters, channels):
    """torchvision's counts, less the classifier and the norms' affine parameters, which are buffers when frozen."""
    model = eqx.filter_eval_shape(build, key=jr.key(0))
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nn.FrozenBatchNorm))
    norms = [leaf for leaf in leaves if isinstance(leaf, nn.FrozenBatchNorm)]
    assert sum(leaf.size for leaf in leaves if not isinstance(leaf, nn.FrozenBatchNorm)) == parameters
    assert sum(2 * norm.weight.size for norm in norms) in (34_112, 24_400)
    assert model.channels == channels and len(model.stages) == 6


def naive_groups(x, weight, stride, padding, dilation):
    """A convolution in groups, one output pixel at a time, in float64."""
    outputs, per_group, kernel, _ = weight.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding)))
    span = dilation * (kernel - 1) + 1
    sides = [(side - span) // stride + 1 for side in padded.shape[1:]]
    y = np.zeros((outputs, *sides))
    per_output = outputs // (len(x) // per_group)
    for o in range(outputs):
        first = o // per_output * per_group
        for i, j in np.ndindex(*sides):
            window = padded[first : first + per_group, i * stride :, j * stride :][:, :span:dilation, :span:dilation]
            y[o, i, j] = (window[:, :kernel, :kernel] * weight[o]).sum()
    return y


@pytest.mark.parametrize(
    "groups, out, kernel, stride, padding, dilation",
    [
        (6, 6, 3, 1, 1, 1),
        (6, 6, 5, 2, 2, 1),
        (2, 4, 3, 2, 1, 1),
        (3, 9, 1, 1, 0, 1),
        (1, 5, 3, 1, 6, 6),
        (6, 12, 3, 1, 2, 2),
    ],
)
def test_convolution_in_groups(groups, out, kernel, stride, padding, dilation, getkey):
    x, weight = jr.normal(getkey(), (6, 9, 13)), jr.normal(getkey(), (out, 6 // groups, kernel, kernel))
    bias = jr.normal(getkey(), (out,))
    options = {"stride": stride, "padding": padding, "groups": groups, "dilation": dilation}
    y = nn.conv2d(x, weight, bias, **options)
    expected = naive_groups(np.asarray(x), np.asarray(weight), stride, padding, dilation)
    np.testing.assert_allclose(y, expected + np.asarray(bias)[:, None, None], atol=1e-4)
    # The function is linear in each argument: gradients of a weighted sum, by the naive convolution of unit vectors.
    cotangent = np.asarray(jr.normal(getkey(), y.shape))
    gx, gw, gb = jax.grad(lambda *args: (nn.conv2d(*args, **options) * cotangent).sum(), argnums=(0, 1, 2))(
        x, weight, bias
    )
    np.testing.assert_allclose(gb, cotangent.sum((1, 2)), atol=1e-4)
    for index in [(0, 0, 0), (5, 8, 12), (3, 4, 6)]:
        unit = np.zeros(x.shape)
        unit[index] = 1
        expected = (naive_groups(unit, np.asarray(weight), stride, padding, dilation) * cotangent).sum()
        np.testing.assert_allclose(gx[index], expected, atol=1e-4)
    for index in [(0, 0, 0, 0), (out - 1, 6 // groups - 1, kernel - 1, 0)]:
        unit = np.zeros(weight.shape)
        unit[index] = 1
        expected = (naive_groups(np.asarray(x), unit, stride, padding, dilation) * cotangent).sum()
        np.testing.assert_allclose(gw[index], expected, atol=1e-4)


def test_convolution_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups must divide the channels, got 6 to 8 in 4 groups"):
        nn.Conv2d(6, 8, 3, groups=4, key=jr.key(0))
    with pytest.raises(ValueError, match=r"x has 6 channels, but weight .* in 2 groups needs 4"):
        nn.conv2d(jnp.zeros((6, 4, 4)), jnp.zeros((8, 2, 3, 3)), groups=2)
    with pytest.raises(ValueError, match=r"A BasicBlock has neither groups nor .*, got groups=2"):
        nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), groups=2, key=jr.key(0))


def test_squeeze_and_excitation(getkey):
    module = nn.SqueezeExcitation(6, 4, key=getkey())
    x = jr.normal(getkey(), (6, 3, 5))
    fc1, fc2 = (np.asarray(conv.weight)[:, :, 0, 0] for conv in (module.fc1, module.fc2))
    hidden = np.maximum(fc1 @ np.asarray(x).mean((1, 2)), 0)
    scale = np.clip(fc2 @ hidden + 3, 0, 6) / 6
    np.testing.assert_allclose(module(x), np.asarray(x) * scale[:, None, None], atol=1e-5)


@pytest.mark.parametrize("build", [nn.mobilenet_v2, nn.mobilenet_v3_large], ids=lambda build: build.__name__)
def test_mobilenet_maps(build, getkey):
    """Sizes and widths of the maps, and that the pyramid adds levels of equal size without upsampling."""
    norm = functools.partial(nn.GroupNorm, groups=8)
    model = nn.MobileNetFPN(build(key=getkey(), width_multiplier=0.25, norm=norm), key=getkey(), channels=16)
    image = jr.normal(getkey(), (3, 64, 96))
    maps = eqx.filter_jit(model.body)(image)
    assert [x.shape for x in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(model.body.channels, (2, 4, 8, 16, 32, 32), strict=True)
    ]
    levels = eqx.filter_jit(model)(image)
    assert model.strides == (32, 32, 64) and [x.shape for x in levels] == [(16, 2, 3), (16, 2, 3), (16, 1, 2)]
    merged = model.fpn.lateral[0](maps[4]) + model.fpn.lateral[1](maps[5])
    np.testing.assert_allclose(levels[0], model.fpn.output[0](merged), atol=1e-4)
    with pytest.raises(ValueError, match=r"levels must be ascending numbers in 0\.\.5, got \(5, 4\)"):
        nn.MobileNetFPN(model.body, key=getkey(), levels=(5, 4))


def test_pyramid_levels_and_upsampling(getkey):
    body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=getkey(), width=8, norm=nn.GroupNorm)
    model = nn.BackboneWithFPN(body, key=getkey(), channels=16)
    image = jr.normal(getkey(), (3, 96, 64))
    levels = eqx.filter_jit(model)(image)
    assert [level.shape for level in levels] == [(16, 24, 16), (16, 12, 8), (16, 6, 4), (16, 3, 2), (16, 2, 1)]
    np.testing.assert_array_equal(levels[4], levels[3][:, ::2, ::2])
    # Of the topmost level, only the lateral map reaches the level below, through nearest upsampling.
    c4, c5 = eqx.filter_jit(model.body)(image)[2:]
    merged = model.fpn.lateral[2](c4) + jnp.repeat(jnp.repeat(model.fpn.lateral[3](c5), 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(levels[2], model.fpn.output[2](merged), atol=1e-4)


def test_pyramid_refuses_other_canvases():
    model = eqx.filter_eval_shape(lambda: nn.BackboneWithFPN(nn.resnet18(key=jr.key(0)), key=jr.key(1)))
    with pytest.raises(ValueError, match=r"multiple of 32 .* 40×64"):
        model(jnp.zeros((3, 40, 64)))


def test_batch_is_vmap(getkey):
    body = nn.ResNet(nn.Bottleneck, (1, 1, 1, 1), key=getkey(), width=8)
    model = nn.BackboneWithFPN(body, key=getkey(), channels=16)
    images = jr.normal(getkey(), (2, 3, 64, 64))
    batched = eqx.filter_jit(lambda model, images: jax.vmap(model)(images))(model, images)
    for i in range(2):
        for a, b in zip(batched, eqx.filter_jit(model)(images[i]), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-4)
