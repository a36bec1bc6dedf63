"""Encoding boxes as offsets from anchors, and back."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import decode_boxes, encode_boxes


WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)]


def random_boxes(key, n):
    corner, size = jr.split(key)
    x0y0 = jr.uniform(corner, (n, 2), minval=-50, maxval=100)
    return jnp.concatenate([x0y0, x0y0 + jr.uniform(size, (n, 2), minval=1, maxval=80)], axis=1)


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
def test_equal_naive_reference(weights, getkey):
    boxes, anchors, deltas = random_boxes(getkey(), 50), random_boxes(getkey(), 50), 2 * jr.normal(getkey(), (50, 4))
    rows = [np.asarray(x, np.float64) for x in (boxes, anchors, deltas)]
    encoded = np.stack([naive_encode(b, a, weights) for b, a, _ in zip(*rows, strict=True)])
    decoded = np.stack([naive_decode(d, a, weights) for _, a, d in zip(*rows, strict=True)])
    np.testing.assert_allclose(encode_boxes(boxes, anchors, weights=weights), encoded, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode_boxes(deltas, anchors, weights=weights), decoded, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(
        encode_boxes(boxes, anchors, weights=weights), encode_boxes(boxes, anchors, weights=jnp.array(weights))
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_inverts_encode(weights, getkey):
    boxes, anchors = random_boxes(getkey(), 50), random_boxes(getkey(), 50)
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
    assert jnp.isfinite(encode_boxes(boxes, anchors)).all()
    for gradient in jax.grad(lambda b, a: encode_boxes(b, a).sum(), argnums=(0, 1))(boxes, anchors):
        assert jnp.isfinite(gradient).all()
    deltas = jnp.full_like(anchors, 0.3)
    for gradient in jax.grad(lambda d, a: decode_boxes(d, a).sum(), argnums=(0, 1))(deltas, anchors):
        assert jnp.isfinite(gradient).all()
    # A line keeps what its length says: only the side that it lacks is 0.
    np.testing.assert_allclose(encode_boxes(rows[1:2], rows[3:4]), [[0.25, -0.25, 0, 0]])
    np.testing.assert_array_equal(decode_boxes(deltas[:1], rows[:1]), [[0, 0, 0, 0]])


@pytest.mark.parametrize("op", [encode_boxes, decode_boxes])
def test_jit_vmap_padding_and_empty(op, getkey):
    first, anchors = (jnp.stack([random_boxes(getkey(), 6) / 50 for _ in range(3)]) for _ in range(2))
    batched = jax.vmap(op)(first, anchors)
    for i in range(3):
        np.testing.assert_allclose(jax.jit(op)(first[i], anchors[i]), op(first[i], anchors[i]), atol=1e-5)
        np.testing.assert_allclose(batched[i], op(first[i], anchors[i]), atol=1e-5)
    padded = op(*(jnp.pad(x[0], ((0, 2), (0, 0))) for x in (first, anchors)))
    np.testing.assert_array_equal(padded[:6], op(first[0], anchors[0]))
    assert jnp.isfinite(padded).all()
    assert op(first[0, :0], anchors[0, :0]).shape == (0, 4)


def test_dtypes(getkey):
    boxes, anchors = random_boxes(getkey(), 4), random_boxes(getkey(), 4)
    half = jnp.bfloat16
    assert encode_boxes(boxes.astype(half), anchors.astype(half)).dtype == half
    assert decode_boxes(boxes.astype(half), anchors.astype(half)).dtype == half
    assert decode_boxes(boxes.astype(half), anchors).dtype == jnp.float32


@pytest.mark.parametrize("op", [encode_boxes, decode_boxes])
def test_errors(op):
    boxes = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"weights must be four positive numbers, got \(1, 1, 0, 1\)"):
        op(boxes, boxes, weights=(1, 1, 0, 1))
    with pytest.raises(Exception, match="anchors"):
        op(boxes, jnp.ones((3, 4)))
