"""Elementwise losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import ops


BOX_LOSSES = [ops.giou_loss, ops.diou_loss, ops.ciou_loss]
# One call of each loss on a pair of `(n, 4)` arrays.
LOSSES = [
    lambda x, y: ops.smooth_l1_loss(x, y, beta=0.5),
    lambda x, y: ops.sigmoid_focal_loss(x, jax.nn.sigmoid(y)),
    lambda x, y: ops.dice_loss(x, jax.nn.sigmoid(y)),
    *BOX_LOSSES,
]


def random_boxes(seed, n):
    rng = np.random.default_rng(seed)
    x0y0 = rng.uniform(-20, 40, (n, 2))
    return jnp.asarray(np.concatenate([x0y0, x0y0 + rng.uniform(0.5, 50, (n, 2))], axis=1), jnp.float32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def naive_box_losses(a, b, weight=None):
    """GIoU, DIoU and CIoU loss of two boxes in float64, from the papers' equations, and the weight in CIoU."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b
    intersection = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    width, height = max(ax1, bx1) - min(ax0, bx0), max(ay1, by1) - min(ay0, by0)
    iou = intersection / union
    distance = ((ax0 + ax1 - bx0 - bx1) / 2) ** 2 + ((ay0 + ay1 - by0 - by1) / 2) ** 2
    diou = 1 - iou + distance / (width**2 + height**2)
    v = 4 / math.pi**2 * (math.atan((ax1 - ax0) / (ay1 - ay0)) - math.atan((bx1 - bx0) / (by1 - by0))) ** 2
    weight = v / (1 - iou + v + 1e-7) if weight is None else weight
    return 1 - iou + (width * height - union) / (width * height), diou, diou + weight * v, weight


def naive_focal(x, t, alpha, gamma):
    p = 1 / (1 + np.exp(-x))
    p_t = p * t + (1 - p) * (1 - t)
    weight = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return -weight * (1 - p_t) ** gamma * (t * np.log(p) + (1 - t) * np.log(1 - p))


def test_box_losses_equal_naive_reference():
    a, b = random_boxes(0, 100), random_boxes(1, 100)
    pairs = zip(np.asarray(a, np.float64), np.asarray(b, np.float64), strict=True)
    expected = np.array([naive_box_losses(p, q)[:3] for p, q in pairs])
    for loss, values in zip(BOX_LOSSES, expected.T, strict=True):
        np.testing.assert_allclose(jax.jit(loss)(a, b), values, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [  # partly overlapping, equal, contained, disjoint
        (ops.giou_loss, [4 / 6, 0, 3 / 4, 8 / 6]),
        (ops.diou_loss, [4 / 6 + 1 / 13, 0, 3 / 4 + 0.5 / 8, 56 / 40]),
        (ops.ciou_loss, [4 / 6 + 1 / 13, 0, 3 / 4 + 0.5 / 8, 56 / 40]),
    ],
)
def test_box_losses_by_hand(loss, expected):
    a = jnp.tile(jnp.array([[0.0, 0.0, 2.0, 2.0]]), (4, 1))
    b = jnp.array([[1, 0, 3, 2], [0, 0, 2, 2], [0, 0, 1, 1], [4, 0, 6, 2]], jnp.float32)
    np.testing.assert_allclose(jax.jit(loss)(a, b), expected, atol=1e-5)


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_box_losses_of_degenerate_boxes_are_finite(loss):
    rows = jnp.array([[0, 0, 0, 0], [1, 1, 5, 1], [1, 1, 1, 5], [0, 0, 4, 4], [0, 0, 1e-10, 1e-10]], jnp.float32)
    a, b = (x.reshape(-1, 4) for x in jnp.broadcast_arrays(rows[:, None], rows[None]))
    values = jax.jit(loss)(a, b)
    gradients = jax.jit(jax.grad(lambda a, b: loss(a, b).sum(), argnums=(0, 1)))(a, b)
    assert jnp.isfinite(values).all() and jnp.isfinite(jnp.stack(gradients)).all()
    assert values[0] == 1 and not gradients[0][0].any()


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_box_loss_gradients_equal_finite_differences(loss):
    a, b = random_boxes(0, 10), random_boxes(1, 10)
    gradients = jax.jit(jax.grad(lambda a: loss(a, b).sum()))(a)
    for p, q, gradient in zip(np.asarray(a, np.float64), np.asarray(b, np.float64), gradients, strict=True):
        weight = naive_box_losses(p, q)[-1]  # constant in the gradient
        ahead, behind = ([naive_box_losses(p + s * e, q, weight) for e in np.eye(4)] for s in (1e-6, -1e-6))
        expected = (np.array(ahead) - np.array(behind))[:, BOX_LOSSES.index(loss)] / 2e-6
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_ciou_gradient_by_hand():
    # Boxes of 4 × 2 and 2 × 2 with the same centre: v = 4/π² (atan 2 - atan 1)², IoU 1/2, and a constant weight.
    a, b = jnp.array([[-1.0, 0.0, 3.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]])
    angle = math.atan(2) - math.atan(1)
    v = 4 / math.pi**2 * angle**2
    weight = v / (0.5 + v)
    penalty = lambda a: (ops.ciou_loss(a, b) - ops.diou_loss(a, b)).sum()  # noqa: E731
    value, difference = jax.jit(jax.value_and_grad(penalty))(a)
    np.testing.assert_allclose(value, weight * v, atol=1e-6)
    d_angle = (1 / 2) / (1 + 2**2)  # d/dw atan(w / h)
    np.testing.assert_allclose(difference[0, 2], weight * 8 / math.pi**2 * angle * d_angle, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0, 2.5])
def test_smooth_l1_equals_naive_reference(beta):
    pred, target = 2 * normal(0, 200), 2 * normal(1, 200)
    d = np.abs(np.asarray(pred, np.float64) - np.asarray(target, np.float64))
    expected = np.where(d < beta, d**2 / (2 * max(beta, 1e-9)), d - beta / 2)
    np.testing.assert_allclose(ops.smooth_l1_loss(pred, target, beta=beta), expected, atol=1e-5)
    slope = jax.grad(lambda p: ops.smooth_l1_loss(p, jnp.zeros(5), beta=beta).sum())(jnp.array([-9.0, 0, 0, 1e-3, 9]))
    np.testing.assert_allclose(slope, [-1, 0, 0, 1e-3 / beta if beta else 1, 1], atol=1e-6)


def test_smooth_l1_by_hand():
    values = ops.smooth_l1_loss(jnp.array([1.0, 1.25, 2.0, -3.0]), jnp.ones(4), beta=0.5)
    np.testing.assert_allclose(values, [0, 0.0625, 0.75, 3.75])


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (None, 2.0), (0.9, 0.5), (0.0, 0.0), (None, 0)])
def test_focal_equals_naive_reference(alpha, gamma):
    logits = 4 * normal(0, 300)
    for targets in (uniform(1, 300).round(), uniform(2, 300)):
        expected = naive_focal(np.asarray(logits, np.float64), np.asarray(targets, np.float64), alpha, gamma)
        values = ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_focal_by_hand():
    logits, targets = jnp.array([0.0, 0.0, math.log(3)]), jnp.array([1.0, 0.0, 1.0])
    values = ops.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2)
    expected = [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2), 0.25 * 0.0625 * -math.log(0.75)]
    np.testing.assert_allclose(values, expected, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_at_any_logit(gamma):
    logits = jnp.array([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])
    for target in (0.0, 1.0):
        loss = lambda x, t=target: ops.sigmoid_focal_loss(x, jnp.full(7, t), gamma=gamma)  # noqa: E731
        values, pullback = jax.vjp(jax.jit(loss), logits)
        assert jnp.isfinite(values).all() and jnp.isfinite(pullback(jnp.ones(7))[0]).all()
    wrong = ops.sigmoid_focal_loss(jnp.array([-200.0]), jnp.ones(1), alpha=None, gamma=gamma)
    np.testing.assert_allclose(wrong, [200])


def test_dice_equals_naive_reference():
    logits, targets = 3 * normal(0, 6, 50), uniform(1, 6, 50)
    p, t = 1 / (1 + np.exp(-np.asarray(logits, np.float64))), np.asarray(targets, np.float64)
    expected = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    np.testing.assert_allclose(ops.dice_loss(logits, targets), expected, atol=1e-5)


def test_dice_by_hand():
    logits = jnp.array([[50.0, 50.0, -50.0, -50.0], [-50.0] * 4, [50.0] * 4])
    targets = jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4])
    np.testing.assert_allclose(ops.dice_loss(logits, targets), [1 - 3 / 5, 0, 1 - 1 / 5], atol=1e-6)
    assert ops.dice_loss(jnp.zeros((2, 0)), jnp.zeros((2, 0))).tolist() == [0, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_jit_vmap_padding_dtype_and_empty(loss):
    x, y = (random_boxes(seed, 3 * 5).reshape(3, 5, 4) / 10 for seed in (0, 1))
    jitted, batched = jax.jit(loss), jax.jit(jax.vmap(loss))(x, y)
    np.testing.assert_allclose(loss(x[0], y[0]), jitted(x[0], y[0]), atol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(batched[i], jitted(x[i], y[i]), atol=1e-6)
    padded = jitted(*(jnp.pad(z[0], ((0, 2), (0, 0))) for z in (x, y)))
    np.testing.assert_allclose(padded[:5], jitted(x[0], y[0]), atol=1e-6)
    assert jnp.isfinite(padded).all()
    half_x, half_y = x[0].astype(jnp.bfloat16), y[0].astype(jnp.bfloat16)
    half = jitted(half_x, half_y)
    assert half.dtype == jnp.bfloat16
    expected = jitted(half_x.astype(jnp.float32), half_y.astype(jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2**-7, atol=2**-7)
    assert jitted(x[0, :0], y[0, :0]).shape[0] == 0


def test_errors():
    x = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"beta must not be negative, got -1\.0"):
        ops.smooth_l1_loss(x, x, beta=-1.0)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, or be None for equal weights, got -1"):
        ops.sigmoid_focal_loss(x, x, alpha=-1)
    with pytest.raises(ValueError, match=r"gamma must not be negative, got -2\.0"):
        ops.sigmoid_focal_loss(x, x, gamma=-2.0)
    with pytest.raises(Exception, match="target"):
        ops.smooth_l1_loss(x, jnp.zeros(4))
    with pytest.raises(Exception, match="boxes_b"):
        ops.giou_loss(jnp.zeros((3, 4)), jnp.zeros((2, 4)))
