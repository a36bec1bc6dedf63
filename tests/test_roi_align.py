"""RoIAlign against a naive loop in float64, hand-computed tables, and finite differences."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx._xla import _plain
from detectax_eqx.ops import _roi_align, multilevel_roi_align, roi_align


def _axis_weights(low, high, size, bins, scale, ratio, aligned):
    """Weight of each of `size` pixels in each bin, sample by sample."""
    weights = np.zeros((bins, size))
    start, end = low * scale - 0.5 * aligned, high * scale - 0.5 * aligned
    length = end - start if aligned else max(end - start, 1.0)
    samples = ratio or math.ceil(length / bins)
    for p in range(bins):
        for i in range(samples):
            position = start + p * length / bins + (i + 0.5) * length / bins / samples
            if position < -1 or position > size:
                continue
            position = min(max(position, 0), size - 1)
            below = int(position)
            weights[p, below] += (1 - position + below) / samples
            weights[p, min(below + 1, size - 1)] += (position - below) / samples
    return weights


def _weights(shape, boxes, *, output_size, spatial_scale, sampling_ratio, aligned):
    """`(n, p, q, h, w)`: weight of each cell in each bin."""
    options = (spatial_scale, sampling_ratio, aligned)
    return np.stack(
        [
            np.einsum(
                "ph,qw->pqhw",
                _axis_weights(y0, y1, shape[0], output_size[0], *options),
                _axis_weights(x0, x1, shape[1], output_size[1], *options),
            )
            for x0, y0, x1, y1 in np.asarray(boxes, np.float64)
        ]
    )


def _reference(features, boxes, **options):
    weights = _weights(features.shape[1:], boxes, **options)
    return np.einsum("npqhw,chw->ncpq", weights, np.asarray(features, np.float64))


# Boxes on a map of 11×14 cells at scale 1/4: 44×56 pixels. Coordinates are exact in float32.
BOXES = {
    "inside": (7.25, 5.5, 31.75, 30.125),
    "whole map": (0, 0, 56, 44),
    "over the top left corner": (-9.5, -7.25, 12.5, 10.75),
    "over the bottom right corner": (44.5, 30.25, 70.5, 61.75),
    "far outside": (100, -200, 130, -150),
    "edge on the last cell": (48, 36, 56, 44),
    "tall": (20, -30, 23, 90),
    "tiny": (10.5, 10.5, 10.625, 10.75),
    "point": (10, 12, 10, 12),
    "point on the origin": (0, 0, 0, 0),
    "no width": (10, 4, 10, 40),
    "corners swapped": (30, 25, 20, 10),
    "huge": (-4000, -3000, 5000, 7000),
    "very huge": (-100000, -160000, 140000, 120000),
}


def _value_and_gradients(features, boxes, cotangent, **options):
    """RoIAlign, and the gradients of its product with `cotangent` with respect to features and boxes."""

    @jax.jit
    def run(features, boxes):
        out, pull = jax.vjp(lambda features, boxes: roi_align(features, boxes, **options), features, boxes)
        return out, pull(cotangent)

    return run(features, boxes)


def _boxes():
    return jnp.array(list(BOXES.values()), jnp.float32)


# Boxes without a sample on a kink of the interpolation.
SMOOTH = [
    [7.31, 5.63, 31.77, 30.21],
    [-9.37, -7.29, 12.61, 10.83],
    [44.59, 30.33, 70.41, 61.27],
    [10.23, 10.11, 10.79, 17.43],
]
NOT_FINITE = [
    [np.nan] * 4,
    [0, 0, np.inf, 5],
    [-np.inf, -np.inf, np.inf, np.inf],
    [0, np.nan, 9, 9],
    [-3e38, 0, 3e38, 9],
]
CASES = [
    (0, True, (7, 7)),
    (0, False, (3, 2)),
    (1, False, (3, 2)),
    (2, True, (3, 2)),
    (2, False, (7, 7)),
    (3, True, (2, 5)),
    (4, False, (3, 2)),
]


@pytest.mark.parametrize("sampling_ratio, aligned, output_size", CASES)
def test_agrees_with_a_naive_loop(getkey, sampling_ratio, aligned, output_size):
    features = jr.uniform(getkey(), (3, 11, 14))
    corner, side = jr.uniform(getkey(), (12, 2), minval=-20, maxval=56), jr.uniform(getkey(), (12, 2), maxval=50)
    random = jnp.concatenate([corner, corner + side], axis=1)
    boxes = jnp.concatenate([_boxes(), random, jnp.array(SMOOTH), jnp.array(NOT_FINITE)])
    finite = len(boxes) - len(NOT_FINITE)
    smooth = slice(finite - len(SMOOTH), finite)
    cotangent = jr.normal(getkey(), (len(boxes), 3, *output_size))
    options = {
        "output_size": output_size,
        "spatial_scale": 0.25,
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }
    out, (feature_gradient, box_gradient) = _value_and_gradients(features, boxes, cotangent, **options)
    weights = _weights(features.shape[1:], boxes[:finite], **options)
    expected = np.einsum("npqhw,chw->ncpq", weights, np.asarray(features, np.float64))
    np.testing.assert_allclose(out[:finite], expected, atol=1e-5)
    # RoIAlign is linear in the features, so the gradient is the transpose.
    expected = np.einsum("npqhw,ncpq->chw", weights, np.asarray(cotangent[:finite], np.float64))
    np.testing.assert_allclose(feature_gradient, expected, atol=1e-5 * max(1, np.abs(expected).max()))

    exact, step = np.asarray(boxes[smooth], np.float64), 1e-6
    for axis in range(4):
        shift = step * np.eye(4)[axis]
        difference = _reference(features, exact + shift, **options) - _reference(features, exact - shift, **options)
        expected = (difference * np.asarray(cotangent[smooth])).sum(axis=(1, 2, 3)) / (2 * step)
        np.testing.assert_allclose(box_gradient[smooth, axis], expected, atol=1e-5)

    assert jnp.isfinite(box_gradient).all()
    np.testing.assert_array_equal(out[finite:], 0)
    np.testing.assert_array_equal(box_gradient[finite:], 0)


TABLES = [
    # The half-pixel shift puts the bins' centres between cells: 5 * 0.75 + 0.75.
    ("aligned", (5, 5), (1, 1, 3, 3), 4, True, [[4.5 + 2.5 * p + 0.5 * q for q in range(4)] for p in range(4)]),
    ("not aligned", (5, 5), (1, 1, 3, 3), 4, False, [[7.5 + 2.5 * p + 0.5 * q for q in range(4)] for p in range(4)]),
    # Half the samples of the first bins lie beyond index 0 and are clamped to it.
    ("clamped", (2, 2), (0, 0, 1, 1), 2, True, [[0, 0.25], [0.5, 0.75]]),
    # A point counts as one cell; its samples are at 1.25 and 1.75.
    ("least side", (5, 5), (1, 1, 1, 1), 1, False, [[9.0]]),
    ("point", (5, 5), (1, 1, 1, 1), 1, True, [[3.0]]),
    # Per side, the sample at 4.75 reads the last cell, of value 24, and the sample at 5.25 reads 0.
    ("beyond the border", (5, 5), (4.5, 4.5, 5.5, 5.5), 1, False, [[6.0]]),
    # In x, the sample at -1.25 reads 0 and the one at -0.75 reads column 0. In y, samples are at 2.25 and 2.75.
    ("beyond the origin", (5, 5), (-1.5, 2, -0.5, 3), 1, False, [[6.25]]),
]


@pytest.mark.parametrize(
    "shape, box, output_size, aligned, expected", [row[1:] for row in TABLES], ids=[row[0] for row in TABLES]
)
def test_tables(shape, box, output_size, aligned, expected):
    features = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(1, *shape)
    boxes = jnp.array([box], jnp.float32)
    out = roi_align(features, boxes, output_size=output_size, spatial_scale=1, sampling_ratio=2, aligned=aligned)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-6)


def test_gradient_table():
    def total(features):
        return roi_align(features, jnp.array([[0.0, 0, 1, 1]]), output_size=2, spatial_scale=1).sum()

    gradient = jax.grad(total)(jnp.array([[[1.0, 2], [3, 4]]]))
    np.testing.assert_allclose(gradient[0], [[3.0625, 0.4375], [0.4375, 0.0625]], atol=1e-6)


def test_aligned_resizes_as_an_image_does(getkey):
    """With one aligned sample per bin, RoIAlign of the whole map is an image resize: the half-pixel shift is right."""
    features = jr.uniform(getkey(), (2, 5, 6))
    box = jnp.array([[0.0, 0, 6, 5]])
    for size in ((10, 12), (15, 18), (5, 6)):
        out = roi_align(features, box, output_size=size, spatial_scale=1, sampling_ratio=1)[0]
        np.testing.assert_allclose(out, jax.image.resize(features, (2, *size), "linear"), atol=1e-5)


def test_bins_of_whole_length_get_as_many_samples(getkey):
    """84 / 14 is 6 samples per bin, not 7: the number must not depend on how a compiler divides."""
    features, boxes = jr.uniform(getkey(), (1, 84, 84)), jnp.array([[0.0, 0, 84, 84], [3, 5, 45, 33]])
    options = {"output_size": (14, 14), "spatial_scale": 1, "sampling_ratio": 0, "aligned": False}
    out = jax.jit(lambda *args: roi_align(*args, **options))(features, boxes)
    np.testing.assert_allclose(out, _reference(features, boxes, **options), atol=1e-5)


@pytest.mark.parametrize("limit, inside", [(-1.0, True), (5.0, True), (-1.0000001, False), (5.0000005, False)])
@pytest.mark.parametrize("sampling_ratio", [0, 1])
def test_the_limits_of_a_map_are_inside(limit, inside, sampling_ratio):
    features = jnp.arange(1.0, 26).reshape(1, 5, 5)
    boxes = jnp.array([[2.0, limit - 0.5, 3.0, limit + 0.5]], jnp.float32)
    if not inside:  # by one float32 step
        edge = np.float32(round(limit))
        step = np.nextafter(edge, np.float32(10 * limit)) - edge
        boxes = jnp.array([[2.0, edge - 0.5 + 4 * step, 3.0, edge + 0.5 + 4 * step]], jnp.float32)
    options = {"output_size": 1, "spatial_scale": 1, "sampling_ratio": sampling_ratio, "aligned": False}
    value = roi_align(features, boxes, **options)[0, 0, 0, 0]
    assert (value > 0) == inside


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_both_forms_eager_and_batched_agree(getkey, monkeypatch, sampling_ratio):
    """The loop over boxes (CPU) and all boxes at once (elsewhere); jit and eager; vmap and a loop over examples."""
    features = jr.uniform(getkey(), (2, 3, 11, 14))
    boxes = jnp.stack([_boxes(), _boxes()[::-1] + 3])
    cotangent = jr.normal(getkey(), (2, len(BOXES), 3, 3, 2))

    def align(features, boxes):
        return roi_align(features, boxes, output_size=(3, 2), spatial_scale=0.25, sampling_ratio=sampling_ratio)

    def run(features, boxes, cotangent):
        out, pull = jax.vjp(align, features, boxes)
        return out, *pull(cotangent)

    def check(results):
        for result, reference in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, reference, atol=1e-5 * float(jnp.abs(reference).max()))

    one = jax.jit(run)
    examples = [one(features[i], boxes[i], cotangent[i]) for i in range(2)]
    expected = [jnp.stack(values) for values in zip(*examples, strict=True)]
    np.testing.assert_allclose(align(features[0], boxes[0]), expected[0][0], atol=1e-5)
    check(jax.jit(jax.vmap(run))(features, boxes, cotangent))
    nested = jax.jit(jax.vmap(jax.vmap(align)))(features[None], boxes[None])
    np.testing.assert_allclose(nested[0], expected[0], atol=1e-5)
    monkeypatch.setattr(_plain.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    check(jax.jit(jax.vmap(run))(features, boxes, cotangent))


def test_rows_are_independent_and_may_be_none(getkey):
    features, boxes = jr.uniform(getkey(), (2, 11, 14)), _boxes()
    for ratio in (0, 2):
        align = jax.jit(
            lambda boxes, r=ratio: roi_align(features, boxes, output_size=2, spatial_scale=0.25, sampling_ratio=r)
        )
        padded = align(jnp.concatenate([boxes, jnp.zeros((3, 4)), jnp.full((1, 4), 1e9)]))
        np.testing.assert_allclose(align(boxes), padded[: len(boxes)], atol=1e-6)
        assert align(boxes[:0]).shape == (0, 2, 2, 2)
    gradient = jax.grad(lambda f: roi_align(f, boxes[:0], output_size=2, spatial_scale=1).sum())(features)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_bfloat16_keeps_its_dtype(getkey, sampling_ratio):
    features, boxes = jr.uniform(getkey(), (2, 11, 14), jnp.bfloat16), _boxes()
    options = {"output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": sampling_ratio, "aligned": True}
    cotangent = jnp.ones((len(BOXES), 2, 3, 2), jnp.bfloat16)
    out, (gradient, box_gradient) = _value_and_gradients(features, boxes, cotangent, **options)
    assert out.dtype == gradient.dtype == jnp.bfloat16 and box_gradient.dtype == jnp.float32
    # Sums are in float32: the only error is that of one final rounding.
    exact = _reference(features.astype(jnp.float32), boxes, **options)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


# For levels of strides 4 to 32: the side of a square box, and the level that it reads.
LEVELS = [(0, 2), (1, 2), (55.9, 2), (56, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (447, 4), (448, 5), (5000, 5)]


def test_level_assignment():
    boxes = jnp.array([[3.0, 5, 3 + side, 5 + side] for side, _ in LEVELS])
    levels = _roi_align._levels(boxes, 2, 5, 224, 4)
    np.testing.assert_array_equal(levels, [level for _, level in LEVELS])
    odd = jnp.array([[0.0, 0, 448, 112], [0, 0, 112, 447], [9, 9, 5, 12], [jnp.nan] * 4, [-jnp.inf, 0, jnp.inf, 9]])
    np.testing.assert_array_equal(_roi_align._levels(odd, 2, 5, 224, 4), [4, 3, 2, 2, 5])
    np.testing.assert_array_equal(_roi_align._levels(boxes[-2:], 3, 4, 448, 4), [4, 4])


@pytest.mark.parametrize("sampling_ratio, aligned", [(2, False), (0, True)])
def test_each_box_reads_its_own_level(getkey, sampling_ratio, aligned):
    strides = (4, 8, 16)
    features = [jr.uniform(getkey(), (3, 64 // stride, 96 // stride)) for stride in strides]
    boxes = jnp.array([[4.5, 3, 20, 17], [2, -5, 60, 30], [30, 5, 99, 70], [0, 0, 0, 0], [1, 9, 14, 60]])
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) ** 0.5
    levels = np.clip(np.floor(3 + np.log2(np.maximum(sides, 1) / 32) + 1e-6), 2, 4).astype(int) - 2
    assert set(levels) == {0, 1, 2}
    options = {"output_size": (3, 2), "sampling_ratio": sampling_ratio, "aligned": aligned}

    cotangent = jr.normal(getkey(), (5, 3, 3, 2))

    @jax.jit
    def run(features):
        def align(features):
            return multilevel_roi_align(
                features, boxes, strides=strides, canonical_size=32, canonical_level=3, **options
            )

        out, pull = jax.vjp(align, features)
        return out, *pull(cotangent)

    out, gradients = run(features)
    for level, stride in enumerate(strides):
        rows = np.flatnonzero(levels == level)
        weights = _weights(features[level].shape[1:], boxes[rows], spatial_scale=1 / stride, **options)
        expected = np.einsum("npqhw,chw->ncpq", weights, np.asarray(features[level], np.float64))
        np.testing.assert_allclose(out[rows], expected, atol=1e-5)
        expected = np.einsum("npqhw,ncpq->chw", weights, np.asarray(cotangent[rows], np.float64))
        np.testing.assert_allclose(gradients[level], expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_size": 0}, "output_size"),
        ({"output_size": (3, -1)}, "output_size"),
        ({"spatial_scale": 0}, "spatial_scale"),
        ({"spatial_scale": math.nan}, "spatial_scale"),
        ({"sampling_ratio": -1}, "sampling_ratio"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        roi_align(jnp.ones((1, 4, 4)), jnp.zeros((1, 4)), **{"output_size": 2, "spatial_scale": 1, **options})


@pytest.mark.parametrize(
    "shapes, strides, options, message",
    [
        ([(1, 4, 4)], (4, 8), {}, "strides"),
        ([], (), {}, "strides"),
        ([(1, 4, 4), (1, 2, 2)], (4, 16), {}, "strides"),
        ([(1, 4, 4), (1, 2, 2)], (6, 12), {}, "strides"),
        ([(1, 4, 4), (2, 2, 2)], (4, 8), {}, "channels"),
        ([(1, 4, 4), (1, 0, 2)], (4, 8), {}, "row and column"),
        ([(1, 4, 4)], (4,), {"canonical_size": 0}, "canonical_size"),
    ],
)
def test_multilevel_refuses(shapes, strides, options, message):
    features = [jnp.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        multilevel_roi_align(features, jnp.zeros((1, 4)), output_size=2, strides=strides, **options)
