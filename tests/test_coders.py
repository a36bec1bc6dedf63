"""Encoding boxes as offsets from anchors, and decoding them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx.ops import decode_boxes, encode_boxes


WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)]


def random_boxes(seed, n):
    rng = np.random.default_rng(seed)
    x0y0 = rng.uniform(-50, 100, (n, 2))
    return jnp.asarray(np.concatenate([x0y0, x0y0 + rng.uniform(1, 80, (n, 2))], axis=1), jnp.float32)


def naive_encode(box, anchor, weights):
    size, anchor_size = box[2:] - box[:2], anchor[2:] - anchor[:2]
    shift = ((box[:2] + box[2:]) / 2 - (anchor[:2] + anchor[2:]) / 2) / anchor_size
    return np.concatenate([shift, np.log(size / anchor_size)]) * weights


def naive_decode(delta, anchor, weights):
    delta = delta / weights
    anchor_size = anchor[2:] - anchor[:2]
    centre = (anchor[:2] + anchor[2:]) / 2 + delta[:2] * anchor_size
    size = anchor_size * np.exp(np.minimum(delta[2:], np.log(1000 / 16)))
    return np.concatenate([centre - size / 2, centre + size / 2])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_equal_naive_reference(weights):
    boxes, anchors = random_boxes(0, 50), random_boxes(1, 50)
    deltas = jnp.asarray(2 * np.random.default_rng(2).normal(size=(50, 4)), jnp.float32)
    rows = [np.asarray(x, np.float64) for x in (boxes, anchors, deltas)]
    encoded = np.stack([naive_encode(b, a, weights) for b, a, _ in zip(*rows, strict=True)])
    decoded = np.stack([naive_decode(d, a, weights) for _, a, d in zip(*rows, strict=True)])
    np.testing.assert_allclose(encode_boxes(boxes, anchors, weights=weights), encoded, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode_boxes(deltas, anchors, weights=weights), decoded, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(
        encode_boxes(boxes, anchors, weights=weights), encode_boxes(boxes, anchors, weights=jnp.array(weights))
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_inverts_encode(weights):
    boxes, anchors = random_boxes(0, 50), random_boxes(1, 50)
    deltas = encode_boxes(boxes, anchors, weights=weights)
    scale = jnp.abs(boxes).max()
    np.testing.assert_allclose(decode_boxes(deltas, anchors, weights=weights) / scale, boxes / scale, atol=1e-5)


def test_by_hand():
    anchors = jnp.array([[0, 0, 4, 8]], jnp.float32)
    boxes = jnp.array([[2, 4, 10, 8]], jnp.float32)  # centre (6, 6), size (8, 4); the anchor's are (2, 4) and (4, 8)
    deltas = np.array([[1, 0.25, np.log(2), -np.log(2)]])
    np.testing.assert_allclose(encode_boxes(boxes, anchors), deltas, atol=1e-6)
    np.testing.assert_allclose(encode_boxes(boxes, anchors, weights=(10, 10, 5, 5)), deltas * [10, 10, 5, 5], atol=1e-5)
    np.testing.assert_allclose(decode_boxes(jnp.asarray(deltas, jnp.float32), anchors), boxes, atol=1e-5)


def test_log_scale_is_clamped_before_exp():
    anchors = jnp.array([[-8, -8, 8, 8]], jnp.float32)
    deltas = jnp.array([[0, 0, 1000, 20]], jnp.float32)
    np.testing.assert_allclose(decode_boxes(deltas, anchors), [[-500, -500, 500, 500]], rtol=1e-5)
    # The clamp is on the log-scale, after the weight is divided out.
    np.testing.assert_allclose(
        decode_boxes(deltas, anchors, weights=(1, 1, 10, 10)), [[-500, -8 * np.e**2, 500, 8 * np.e**2]], rtol=1e-5
    )
    np.testing.assert_array_equal(jax.grad(lambda d: decode_boxes(d, anchors)[0, 2])(deltas)[0, 2:], [0, 0])


def test_degenerate_rows_are_finite_with_finite_gradients():
    rows = jnp.array([[0, 0, 0, 0], [1, 1, 5, 1], [1, 1, 1, 5], [0, 0, 4, 4], [0, 0, 1e-10, 1e-10]], jnp.float32)
    boxes, anchors = (x.reshape(-1, 4) for x in jnp.broadcast_arrays(rows[:, None], rows[None]))
    deltas = jnp.full_like(anchors, 0.3)
    for op, first in ((encode_boxes, boxes), (decode_boxes, deltas)):
        assert jnp.isfinite(jax.jit(op)(first, anchors)).all()
        gradients = jax.jit(jax.grad(lambda x, a, op=op: op(x, a).sum(), argnums=(0, 1)))(first, anchors)
        assert jnp.isfinite(jnp.stack(gradients)).all()
    # A line is encoded along its length; only the component of its zero side is 0.
    np.testing.assert_allclose(encode_boxes(rows[1:2], rows[3:4]), [[0.25, -0.25, 0, 0]])
    np.testing.assert_array_equal(decode_boxes(deltas[:1], rows[:1]), [[0, 0, 0, 0]])


@pytest.mark.parametrize("op", [encode_boxes, decode_boxes])
def test_jit_vmap_padding_and_empty(op):
    first, anchors = (random_boxes(seed, 3 * 6).reshape(3, 6, 4) / 50 for seed in (0, 1))
    jitted, batched = jax.jit(op), jax.jit(jax.vmap(op))(first, anchors)
    np.testing.assert_allclose(op(first[0], anchors[0]), jitted(first[0], anchors[0]), atol=1e-5)
    for i in range(3):
        np.testing.assert_allclose(batched[i], jitted(first[i], anchors[i]), atol=1e-5)
    padded = jitted(*(jnp.pad(x[0], ((0, 2), (0, 0))) for x in (first, anchors)))
    np.testing.assert_allclose(padded[:6], jitted(first[0], anchors[0]), rtol=1e-6)
    assert jnp.isfinite(padded).all()
    assert jitted(first[0, :0], anchors[0, :0]).shape == (0, 4)


def test_dtypes():
    boxes, half = random_boxes(0, 4), random_boxes(0, 4).astype(jnp.bfloat16)
    assert jax.eval_shape(encode_boxes, half, half).dtype == jnp.bfloat16
    assert jax.eval_shape(decode_boxes, half, half).dtype == jnp.bfloat16
    decoded = decode_boxes(half / 100, boxes)
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(decoded, decode_boxes((half / 100).astype(jnp.float32), boxes))


@pytest.mark.parametrize("op", [encode_boxes, decode_boxes])
def test_errors(op):
    boxes = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"weights must be four positive numbers, got \(1, 1, 0, 1\)"):
        op(boxes, boxes, weights=(1, 1, 0, 1))
    with pytest.raises(Exception, match="anchors"):
        op(boxes, jnp.ones((3, 4)))
