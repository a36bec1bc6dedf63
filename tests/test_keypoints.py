"""Keypoints of heatmaps and heatmap bins of keypoints, against naive loops in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import ops


A = -0.75


def naive_resize(values, height, width):
    """Bicubic interpolation of one map as `torch.nn.functional.interpolate` defines it, one output pixel at a time."""

    def taps(position, count, size):
        centre = (position + 0.5) * size / count - 0.5
        first = math.floor(centre)
        t = centre - first
        outer = [A * d**3 - 5 * A * d**2 + 8 * A * d - 4 * A for d in (t + 1, 2 - t)]
        inner = [(A + 2) * d**3 - (A + 3) * d**2 + 1 for d in (t, 1 - t)]
        weights = [outer[0], inner[0], inner[1], outer[1]]
        return [(min(max(first + i, 0), size - 1), weight) for i, weight in zip(range(-1, 3), weights, strict=True)]

    rows = [taps(y, height, values.shape[0]) for y in range(height)]
    columns = [taps(x, width, values.shape[1]) for x in range(width)]
    return np.array(
        [[sum(v * h * values[i, j] for i, v in row for j, h in column) for column in columns] for row in rows]
    )


def naive_keypoints(heatmaps, box):
    x0, y0, x1, y1 = box
    width, height = max(x1 - x0, 1), max(y1 - y0, 1)
    points = []
    for values in heatmaps:
        resized = naive_resize(values, math.ceil(height), math.ceil(width))
        y, x = np.unravel_index(resized.argmax(), resized.shape)
        place = (x + 0.5) * width / math.ceil(width) + x0, (y + 0.5) * height / math.ceil(height) + y0
        points.append([*place, resized[y, x]])
    return np.array(points)


def naive_target(point, box, size):
    (x, y, visibility), (x0, y0, x1, y1) = point, box
    column = size - 1 if x == x1 else math.floor((x - x0) * size / (x1 - x0))
    row = size - 1 if y == y1 else math.floor((y - y0) * size / (y1 - y0))
    inside = 0 <= column < size and 0 <= row < size
    return (row * size + column, True) if inside and visibility > 0 else (0, False)


# Of one tile, of several with a remainder, narrower than a heatmap, of less than a pixel, inverted, beyond the image.
BOXES = [
    (10.0, 20.0, 60.5, 47.25),
    (3.3, 7.7, 140.0, 72.2),
    (0.0, 0.0, 64.0, 128.0),
    (5.5, 6.5, 9.25, 90.0),
    (5.0, 5.0, 5.4, 5.6),
    (8.0, 8.0, 6.0, 4.0),
    (-30.0, -20.0, 31.5, 45.0),
]


@pytest.mark.parametrize("box", BOXES)
def test_keypoints_equal_naive_reference(box):
    heatmaps = np.random.default_rng(0).normal(size=(4, 7, 7))
    expected = naive_keypoints(heatmaps, box)
    points = ops.keypoints_from_heatmaps(jnp.asarray(heatmaps, jnp.float32), jnp.asarray(box, jnp.float32))
    np.testing.assert_allclose(points, expected, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        points = ops.keypoints_from_heatmaps(jnp.asarray(heatmaps), jnp.asarray(box, jnp.float64))
        np.testing.assert_allclose(points, expected, rtol=1e-12, atol=1e-12)


def test_keypoints_by_hand():
    """A box of less than a pixel has one position, and a box as large as its map is not interpolated."""
    points = ops.keypoints_from_heatmaps(jnp.full((2, 1, 1), 3.0), jnp.array([1.0, 2.0, 1.5, 2.25]))
    np.testing.assert_allclose(points, [[1.5, 2.5, 3.0]] * 2, rtol=1e-6)
    heatmaps = jnp.zeros((1, 5, 5)).at[0, 4, 1].set(2.0)
    points = ops.keypoints_from_heatmaps(heatmaps, jnp.array([0.0, 10.0, 5.0, 15.0]))
    np.testing.assert_array_equal(points, [[1.5, 14.5, 2.0]])


def test_scores_as_probabilities():
    """The softmax over the bins; between bins, interpolation may exceed it."""
    heatmaps = jnp.asarray(np.random.default_rng(4).normal(size=(3, 6, 6)), jnp.float32)
    logits = ops.keypoints_from_heatmaps(heatmaps, jnp.array([2.0, 2.0, 30.0, 25.0]))
    points = ops.keypoints_from_heatmaps(heatmaps, jnp.array([2.0, 2.0, 30.0, 25.0]), probabilities=True)
    np.testing.assert_array_equal(points[:, :2], logits[:, :2])
    np.testing.assert_allclose(points[:, 2], np.exp(logits[:, 2]) / np.exp(heatmaps).sum(axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "bins, first",
    [
        ([(2, 3), (1, 40)], (1, 40)),
        ([(2, 70), (2, 3)], (2, 3)),
        ([(70, 3), (69, 99)], (69, 99)),
        # The first in row-major order is in the second tile of its row, the other in the first.
        ([(30, 80), (31, 0)], (30, 80)),
        ([(0, 99), (99, 0)], (0, 99)),
    ],
)
def test_the_first_maximum_wins_across_tiles(bins, first):
    heatmaps = jnp.zeros((1, 100, 100))
    for row, column in bins:
        heatmaps = heatmaps.at[0, row, column].set(1.0)
    points = ops.keypoints_from_heatmaps(heatmaps, jnp.array([0.0, 0.0, 100.0, 100.0]))
    np.testing.assert_array_equal(points, [[first[1] + 0.5, first[0] + 0.5, 1.0]])


def test_keypoints_under_jit_and_vmap():
    heatmaps = jnp.asarray(np.random.default_rng(1).normal(size=(len(BOXES), 3, 6, 6)), jnp.float32)
    boxes = jnp.array(BOXES)
    alone = [ops.keypoints_from_heatmaps(maps, box) for maps, box in zip(heatmaps, boxes, strict=True)]
    together = jax.jit(jax.vmap(ops.keypoints_from_heatmaps))(heatmaps, boxes)
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5, atol=1e-5)


def test_keypoints_of_unusual_input():
    heatmaps = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6, 6)), jnp.float32)
    for box in ([jnp.nan, 0.0, 5.0, 5.0], [0.0, 0.0, jnp.inf, 5.0]):
        assert jnp.isnan(ops.keypoints_from_heatmaps(heatmaps, jnp.array(box))).all()
    box = jnp.array(BOXES[0])
    assert ops.keypoints_from_heatmaps(heatmaps[:0], box).shape == (0, 3)
    half = ops.keypoints_from_heatmaps(heatmaps.astype(jnp.bfloat16), box)
    assert half.dtype == jnp.bfloat16
    # A box far larger than any image is searched on a coarser grid, and its points stay inside.
    wide = ops.keypoints_from_heatmaps(heatmaps, jnp.array([0.0, 0.0, 1e6, 1.0]))
    assert ((wide[:, 0] > 0) & (wide[:, 0] < 1e6)).all()


def test_gradients_of_keypoints():
    """Scores are linear in the heatmaps, positions in the box; a finite difference moves no maximum."""
    heatmaps = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 5)), jnp.float32)
    box = jnp.array([1.0, 2.0, 20.5, 30.25])

    def total(heatmaps, box):
        x, y, score = jnp.unstack(ops.keypoints_from_heatmaps(heatmaps, box), axis=1)
        return x.sum() + 2 * y.sum(), score.sum()

    place = jax.grad(lambda box: total(heatmaps, box)[0])(box)
    step = 2.0**-6
    steps = jnp.eye(4) * step
    expected = [(total(heatmaps, box + d)[0] - total(heatmaps, box - d)[0]) / (2 * step) for d in steps]
    np.testing.assert_allclose(place, expected, rtol=1e-3)
    weights = jax.grad(lambda maps: total(maps, box)[1])(heatmaps)
    np.testing.assert_allclose((weights * heatmaps).sum(), total(heatmaps, box)[1], rtol=1e-5)
    flat = jax.grad(lambda box: sum(total(heatmaps, box)))(jnp.zeros(4))
    assert jnp.isfinite(flat).all()


@pytest.mark.parametrize("size", [1, 7, 56])
def test_targets_equal_naive_reference(size):
    rng = np.random.default_rng(size)
    corners = rng.integers(-20, 40, (30, 2))
    boxes = np.concatenate([corners, corners + 2.0 ** rng.integers(0, 7, (30, 2))], axis=1)
    # Quarters of pixels, so that many points lie on a border exactly.
    points = rng.integers(-100, 300, (30, 5, 2)) / 4
    points[:, 0], points[:, 1] = boxes[:, :2], boxes[:, 2:]
    keypoints = np.concatenate([points, rng.integers(0, 3, (30, 5, 1))], axis=2)
    bins, counted = ops.keypoint_targets(
        jnp.asarray(keypoints, jnp.float32), jnp.asarray(boxes, jnp.float32), size=size
    )
    expected = [[naive_target(p, box, size) for p in row] for row, box in zip(keypoints, boxes, strict=True)]
    np.testing.assert_array_equal(bins, [[bin for bin, _ in row] for row in expected])
    np.testing.assert_array_equal(counted, [[flag for _, flag in row] for row in expected])
    assert 20 < counted.sum() < 130


def test_targets_of_unusual_input():
    keypoints = jnp.array([[[3.0, 3.0, 2.0], [jnp.nan, 3.0, 2.0], [jnp.inf, 3.0, 2.0]]])
    for box in ([3.0, 3.0, 3.0, 3.0], [4.0, 4.0, 2.0, 2.0], [0.0, 0.0, jnp.nan, 5.0], [0.0, 0.0, jnp.inf, 5.0]):
        bins, counted = ops.keypoint_targets(keypoints, jnp.array([box]), size=4)
        assert not counted.any() and not bins.any()
    bins, counted = ops.keypoint_targets(keypoints, jnp.array([[0.0, 0.0, 6.0, 6.0]]), size=4)
    assert counted.tolist() == [[True, False, False]] and bins.tolist() == [[10, 0, 0]]
    bins, counted = ops.keypoint_targets(jnp.zeros((0, 3, 3)), jnp.zeros((0, 4)), size=4)
    assert bins.shape == counted.shape == (0, 3)


def test_a_bin_and_back():
    """The keypoint of a heatmap with a single bin set lies in that bin."""
    box = jnp.array([12.0, 30.0, 96.0, 142.0])
    points = jnp.array([[[40.0, 61.0, 2.0], [90.0, 140.0, 2.0], [13.0, 31.0, 1.0]]])
    bins, _ = ops.keypoint_targets(points, box[None], size=14)
    heatmaps = jax.nn.one_hot(bins[0], 14 * 14).reshape(3, 14, 14)
    found = ops.keypoints_from_heatmaps(heatmaps, box)
    again, counted = ops.keypoint_targets(jnp.concatenate([found[None, :, :2], points[..., 2:]], 2), box[None], size=14)
    assert counted.all() and again.tolist() == bins.tolist()
