"""Areas, clipping, conversions and pairwise overlaps of boxes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import ops


PAIRWISE = [ops.pairwise_iou, ops.pairwise_ioa, ops.pairwise_giou, ops.pairwise_diou, ops.pairwise_ciou]
CONVERSIONS = [ops.xyxy_to_cxcywh, ops.cxcywh_to_xyxy, ops.xyxy_to_xywh, ops.xywh_to_xyxy]
UNARY = [ops.box_area, lambda boxes: ops.clip_boxes(boxes, (40, 60)), *CONVERSIONS]
DEGENERATE = jnp.array([[0, 0, 0, 0], [3, 4, 3, 4], [3, 4, 9, 4], [3, 4, 3, 9], [0, 0, 1e-10, 1e-10]], jnp.float32)


def random_boxes(seed, n):
    """Boxes that mostly overlap, some with negative coordinates."""
    rng = np.random.default_rng(seed)
    x0y0 = rng.uniform(-20, 40, (n, 2))
    return jnp.asarray(np.concatenate([x0y0, x0y0 + rng.uniform(0.5, 50, (n, 2))], axis=1), jnp.float32)


def naive_pair(a, b):
    """The five overlap measures of two boxes in float64, from their definitions."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    intersection = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    area_a, area_b = (ax1 - ax0) * (ay1 - ay0), (bx1 - bx0) * (by1 - by0)
    union = area_a + area_b - intersection
    width, height = max(ax1, bx1) - min(ax0, bx0), max(ay1, by1) - min(ay0, by0)
    iou = intersection / union
    distance = ((ax0 + ax1 - bx0 - bx1) / 2) ** 2 + ((ay0 + ay1 - by0 - by1) / 2) ** 2
    diou = iou - distance / (width**2 + height**2)
    v = 4 / math.pi**2 * (math.atan((ax1 - ax0) / (ay1 - ay0)) - math.atan((bx1 - bx0) / (by1 - by0))) ** 2
    giou = iou - (width * height - union) / (width * height)
    return iou, intersection / area_b, giou, diou, diou - v * v / (1 - iou + v + 1e-7)


def test_pairwise_equals_naive_reference():
    a, b = random_boxes(0, 23), random_boxes(1, 17)
    a = a.at[0].set(b[0])
    expected = np.array([[naive_pair(p, q) for q in np.asarray(b, np.float64)] for p in np.asarray(a, np.float64)])
    for op, values in zip(PAIRWISE, np.moveaxis(expected, -1, 0), strict=True):
        np.testing.assert_allclose(jax.jit(op)(a, b), values, atol=1e-5)


def test_iou_is_rounded_step_by_step():
    # No fused multiply-adds: float32 NumPy, which has none, gives the same bits.
    a, b = random_boxes(0, 60), random_boxes(1, 300)
    p, q = np.asarray(a)[:, None], np.asarray(b)[None]
    size = np.maximum(np.minimum(p[..., 2:], q[..., 2:]) - np.maximum(p[..., :2], q[..., :2]), 0)
    intersection = size[..., 0] * size[..., 1]
    area_p, area_q = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (p, q))
    expected = intersection / (area_p + area_q - intersection)
    np.testing.assert_array_equal(jax.jit(ops.pairwise_iou)(a, b), expected)


@pytest.mark.parametrize(
    ("op", "expected"),
    [  # partly overlapping, equal, contained, disjoint, touching
        (ops.pairwise_iou, [2 / 6, 1, 1 / 4, 0, 0]),
        (ops.pairwise_ioa, [1 / 2, 1, 1, 0, 0]),
        (ops.pairwise_giou, [2 / 6, 1, 1 / 4, -2 / 6, 0]),
        (ops.pairwise_diou, [2 / 6 - 1 / 13, 1, 1 / 4 - 0.5 / 8, -16 / 40, -4 / 20]),
        (ops.pairwise_ciou, [2 / 6 - 1 / 13, 1, 1 / 4 - 0.5 / 8, -16 / 40, -4 / 20]),
    ],
)
def test_pairwise_by_hand(op, expected):
    a = jnp.array([[0, 0, 2, 2]], jnp.float32)
    b = jnp.array([[1, 0, 3, 2], [0, 0, 2, 2], [0, 0, 1, 1], [4, 0, 6, 2], [2, 0, 4, 2]], jnp.float32)
    np.testing.assert_allclose(jax.jit(op)(a, b)[0], expected, atol=1e-6)


def test_torchvision_test_boxes():
    # The boxes of torchvision's own tests of its box_iou family; torchvision computed the values.
    boxes = jnp.array([[0, 0, 100, 100], [0, 0, 50, 50], [200, 200, 300, 300]], jnp.float32)
    iou = [[1.0, 0.25, 0.0], [0.25, 1.0, 0.0], [0.0, 0.0, 1.0]]
    giou = [[1.0, 0.25, -0.7778], [0.25, 1.0, -0.8611], [-0.7778, -0.8611, 1.0]]
    diou = [[1.0, 0.1875, -0.4444], [0.1875, 1.0, -0.5625], [-0.4444, -0.5625, 1.0]]
    for op, expected in zip(PAIRWISE[:1] + PAIRWISE[2:], (iou, giou, diou, diou), strict=True):
        np.testing.assert_allclose(jax.jit(op)(boxes, boxes), expected, atol=5e-5)


def test_area_and_conversions_by_hand():
    boxes = jnp.array([[1, 2, 5, 8], [-3, -1, -3, 4]], jnp.float32)
    np.testing.assert_array_equal(ops.box_area(boxes), [24, 0])
    np.testing.assert_array_equal(ops.xyxy_to_cxcywh(boxes), [[3, 5, 4, 6], [-3, 1.5, 0, 5]])
    np.testing.assert_array_equal(ops.xyxy_to_xywh(boxes), [[1, 2, 4, 6], [-3, -1, 0, 5]])
    np.testing.assert_array_equal(ops.cxcywh_to_xyxy(ops.xyxy_to_cxcywh(boxes)), boxes)
    np.testing.assert_array_equal(ops.xywh_to_xyxy(ops.xyxy_to_xywh(boxes)), boxes)


def test_clip_takes_height_then_width_of_any_kind():
    boxes = jnp.array([[-5, -5, 100, 100], [70, 10, 80, 20], [1, 2, 3, 4]], jnp.float32)
    expected = [[0, 0, 60, 40], [60, 10, 60, 20], [1, 2, 3, 4]]
    np.testing.assert_array_equal(ops.clip_boxes(boxes, (40, 60)), expected)
    np.testing.assert_array_equal(ops.clip_boxes(boxes, np.array([40, 60])), expected)
    np.testing.assert_array_equal(jax.jit(ops.clip_boxes)(boxes, jnp.array([40, 60], jnp.int32)), expected)


@pytest.mark.parametrize("op", PAIRWISE)
def test_degenerate_pairs_are_finite_with_finite_gradients(op):
    a, b = (jnp.concatenate([DEGENERATE, boxes]) for boxes in (random_boxes(0, 2), random_boxes(0, 2) + 1.5))
    values, gradients = jax.jit(lambda a, b: (op(a, b), jax.jacrev(op, argnums=(0, 1))(a, b)))(a, b)
    assert jnp.isfinite(values).all()
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert jnp.abs(gradients[0][-2:, -2:, -2:]).max() > 0


@pytest.mark.parametrize("op", [ops.pairwise_iou, ops.pairwise_ioa, ops.pairwise_giou])
def test_pairs_without_area_give_zero(op):
    point, line = jnp.zeros((1, 4)), jnp.array([[0.0, 0.0, 5.0, 0.0]])
    assert op(point, point).item() == op(line, line).item() == 0


@pytest.mark.parametrize("op", PAIRWISE)
def test_pairwise_jit_vmap_padding_dtype_and_empty(op):
    a, b = (random_boxes(seed, 3 * 5).reshape(3, 5, 4) for seed in (0, 1))
    jitted, batched = jax.jit(op), jax.jit(jax.vmap(op))(a, b)
    np.testing.assert_allclose(op(a[0], b[0]), jitted(a[0], b[0]), atol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(batched[i], jitted(a[i], b[i]), atol=1e-6)
    half_a, half_b = a[0].astype(jnp.bfloat16), b[0].astype(jnp.bfloat16)
    rounded = jitted(half_a.astype(jnp.float32), half_b.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jitted(half_a, half_b), rounded)
    np.testing.assert_array_equal(jitted(jnp.pad(a[0], ((0, 2), (0, 0))), b[0])[:5], jitted(a[0], b[0]))
    assert jax.eval_shape(op, a[0, :0], b[0]).shape == (0, 5)
    assert jitted(a[0], b[0, :0]).shape == (5, 0)


@pytest.mark.parametrize("op", UNARY)
def test_unary_jit_vmap_dtype_and_empty(op):
    boxes = random_boxes(0, 3 * 5).reshape(3, 5, 4)
    jitted, batched = jax.jit(op), jax.jit(jax.vmap(op))(boxes)
    np.testing.assert_allclose(op(boxes[0]), jitted(boxes[0]), rtol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(batched[i], jitted(boxes[i]), rtol=1e-6)
    expected = jnp.float32 if op is ops.box_area else jnp.bfloat16
    assert jitted(boxes[0].astype(jnp.bfloat16)).dtype == expected
    assert jitted(boxes[0, :0]).shape[0] == 0
    assert jnp.isfinite(jax.jit(jax.jacrev(op))(DEGENERATE)).all()


def test_half_precision_is_computed_in_float32():
    # The coordinates are exact in half precision; their products and sums are not.
    boxes = jnp.array([[0, 0, 255, 255], [1, 1, 255, 255]], jnp.bfloat16)
    expected = jnp.float32(254 * 254 / 255**2).astype(jnp.bfloat16)
    assert ops.pairwise_iou(boxes[:1], boxes[1:])[0, 0] == expected


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_squared_pixels_do_not_overflow_half_precision(dtype):
    """The largest float16 is 65,504, about the area of a box of 256×256 pixels."""
    a, b = jnp.array([[0, 0, 304, 304]], dtype), jnp.array([[0, 0, 304, 608], [2048, 1024, 3072, 3072]], dtype)
    area = jax.jit(ops.box_area)(a)
    assert area.dtype == jnp.float32 and area.tolist() == [304 * 304]
    for op in PAIRWISE:
        overlaps = op(a, b)
        expected = op(a.astype(jnp.float32), b.astype(jnp.float32)).astype(dtype)
        assert overlaps.dtype == dtype and jnp.isfinite(overlaps).all()
        np.testing.assert_array_equal(overlaps, expected)
    for loss in (ops.giou_loss, ops.diou_loss, ops.ciou_loss):
        expected = loss(a.astype(jnp.float32), b[1:].astype(jnp.float32)).astype(dtype)
        assert jnp.isfinite(expected).all()
        np.testing.assert_array_equal(loss(a, b[1:]), expected)
    maps = [jnp.full((1, 16, 16), level, dtype) for level in (0, 1)]
    box = jnp.array([[0, 0, 608, 608]], dtype)
    pooled = ops.multilevel_roi_align(maps, box, output_size=1, strides=(32, 64), canonical_level=6, canonical_size=512)
    assert pooled.item() == 1


def test_wrong_shapes_are_named():
    with pytest.raises(Exception, match="boxes"):
        ops.box_area(jnp.zeros((3, 5)))
    with pytest.raises(Exception, match="b"):
        ops.pairwise_iou(jnp.zeros((3, 4)), jnp.zeros(4))
