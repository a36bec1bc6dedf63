"""Grids of anchors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx.ops import anchor_grid


def naive_grid(feature_size, stride_y, stride_x, sizes, aspect_ratios):
    anchors = []
    for y in range(feature_size[0]):
        for x in range(feature_size[1]):
            for ratio in aspect_ratios:
                for size in sizes:
                    half_width, half_height = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
                    base = [round(v) for v in (-half_width, -half_height, half_width, half_height)]
                    anchors.append(np.add(base, [x * stride_x, y * stride_y, x * stride_x, y * stride_y]))
    return np.array(anchors, np.float64).reshape(-1, 4)


@pytest.mark.parametrize("feature_size", [(1, 1), (2, 3), (5, 1), (0, 4)])
@pytest.mark.parametrize("stride", [4, (8, 16)])
def test_equals_naive_reference(feature_size, stride):
    sizes, aspect_ratios = (32, 45.3, 64), (0.5, 1.0, 2.0, 3.0)
    stride_y, stride_x = (stride, stride) if isinstance(stride, int) else stride
    anchors = anchor_grid(feature_size, stride=stride, sizes=sizes, aspect_ratios=aspect_ratios)
    assert anchors.dtype == jnp.float32
    np.testing.assert_array_equal(anchors, naive_grid(feature_size, stride_y, stride_x, sizes, aspect_ratios))


def test_by_hand():
    # The output of torchvision's generator for its default FPN level: 32 / sqrt(.5) = 45.25, halved and rounded.
    base = np.array([[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])
    anchors = anchor_grid((2, 2), stride=4, sizes=(32,), aspect_ratios=(0.5, 1.0, 2.0))
    shifts = np.array([[0, 0, 0, 0], [4, 0, 4, 0], [0, 4, 0, 4], [4, 4, 4, 4]])
    np.testing.assert_array_equal(anchors, (shifts[:, None] + base[None]).reshape(-1, 4))


def test_halves_are_rounded_to_even():
    anchors = anchor_grid((1, 1), stride=1, sizes=(1, 3, 5), aspect_ratios=(1.0,))
    np.testing.assert_array_equal(anchors, [[0, 0, 0, 0], [-2, -2, 2, 2], [-2, -2, 2, 2]])


def test_jit_equals_eager():
    options = {"stride": (4, 8), "sizes": [16, 32], "aspect_ratios": [0.5, 1]}
    grid = jax.jit(lambda: anchor_grid((3, 5), **options))()
    np.testing.assert_array_equal(grid, anchor_grid((3, 5), **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_size": (-1, 2)}, r"feature_size must not be negative, got \(-1, 2\)"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"stride": (4, -4)}, r"stride must be positive, got \(4, -4\)"),
        ({"sizes": ()}, r"sizes must be one or more positive numbers, got \(\)"),
        ({"sizes": (32, 0)}, "sizes must be"),
        ({"aspect_ratios": (1.0, -2.0)}, "aspect_ratios must be"),
    ],
)
def test_errors(change, message):
    options = {"feature_size": (2, 2), "stride": 4, "sizes": (32,), "aspect_ratios": (1.0,)} | change
    with pytest.raises(ValueError, match=message):
        anchor_grid(options.pop("feature_size"), **options)
