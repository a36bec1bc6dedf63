"""`ops.resize_masks` against a naive loop in float64 and a hand-computed table."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import resize_masks


SIZE = (9, 14)
fast_resize = jax.jit(resize_masks, static_argnames=("image_size",))


def naive(mask, box, size):
    """Interpolates the logits at the centre of each pixel in the box, one by one."""
    mask = np.clip(np.asarray(mask, np.float64), np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).epsneg)
    logits, result = np.log(mask / (1 - mask)), np.zeros(size)
    rows, columns = logits.shape
    x0, y0, x1, y1 = (float(side) for side in box)
    if not (x1 > x0 and y1 > y0 and all(math.isfinite(side) for side in box)):
        return result
    for i in range(size[0]):
        for j in range(size[1]):
            if not (y0 <= i + 0.5 <= y1 and x0 <= j + 0.5 <= x1):
                continue
            y = min(max((i + 0.5 - y0) / (y1 - y0) * rows - 0.5, 0), rows - 1)
            x = min(max((j + 0.5 - x0) / (x1 - x0) * columns - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            value = sum(
                logits[min(top + a, rows - 1), min(left + b, columns - 1)]
                * (y - top if a else 1 - y + top)
                * (x - left if b else 1 - x + left)
                for a in (0, 1)
                for b in (0, 1)
            )
            result[i, j] = 1 / (1 + math.exp(-value))
    return result


BOXES = jnp.array(
    [
        [0.0, 0.0, 14.0, 9.0],  # the image
        [-5.0, -3.0, 30.0, 12.0],  # more than the image
        [2.25, 1.5, 9.75, 7.0],
        [20.0, 1.0, 30.0, 5.0],  # outside
        [5.0, 5.0, 5.0, 8.0],  # without extent
        [9.0, 6.0, 3.0, 2.0],  # inverted
        [jnp.nan, 0.0, 3.0, 3.0],
        [0.0, 0.0, jnp.inf, 3.0],
    ]
)


def test_it_agrees_with_a_naive_loop(getkey):
    masks = jr.uniform(getkey(), (len(BOXES), 4, 5)).at[0, 0, :2].set(jnp.array([0.0, 1.0]))
    resized = fast_resize(masks, BOXES, image_size=SIZE)
    for mask, box, image in zip(masks, np.asarray(BOXES), resized, strict=True):
        np.testing.assert_allclose(image, naive(mask, box, SIZE), atol=1e-5)
    assert (np.asarray(resized[3:]) == 0).all() and (np.asarray(resized[1]) > 0).all()
    above = resize_masks(masks, BOXES, image_size=SIZE, threshold=0.4)
    assert above.dtype == bool and bool((above == (resized > 0.4)).all())


def test_eager_batched_empty_and_dtypes(getkey):
    masks, boxes = jr.uniform(getkey(), (3, 4, 5)), BOXES[:3]
    whole = fast_resize(masks, boxes, image_size=SIZE)
    np.testing.assert_allclose(resize_masks(masks, boxes, image_size=SIZE), whole, atol=1e-6)
    one = jax.vmap(lambda m, b: resize_masks(m[None], b[None], image_size=SIZE)[0])(masks, boxes)
    np.testing.assert_allclose(one, whole, atol=1e-6)
    assert resize_masks(masks[:0], boxes[:0], image_size=SIZE).shape == (0, *SIZE)
    assert resize_masks(masks.astype(jnp.bfloat16), boxes, image_size=SIZE).dtype == jnp.bfloat16


def test_gradient(getkey):
    """With respect to the masks, by finite differences; boxes have none."""
    masks = jr.uniform(getkey(), (3, 4, 5), minval=0.2, maxval=0.8)
    weights = jr.normal(getkey(), (3, *SIZE))

    def weighted(masks, boxes):
        return (resize_masks(masks, boxes, image_size=SIZE) * weights).sum()

    gradient, of_boxes = jax.grad(weighted, argnums=(0, 1))(masks, BOXES[:3])
    direction, step = jr.normal(getkey(), masks.shape), 1e-3
    difference = weighted(masks + step * direction, BOXES[:3]) - weighted(masks - step * direction, BOXES[:3])
    np.testing.assert_allclose(difference / (2 * step), (gradient * direction).sum(), rtol=2e-3)
    assert (np.asarray(of_boxes) == 0).all()


@pytest.mark.parametrize(
    "masks, size, message", [((2, 0, 3), SIZE, "at least one row"), ((2, 2, 3), (0, 4), "image_size")]
)
def test_it_refuses(masks, size, message):
    with pytest.raises(ValueError, match=message):
        resize_masks(jnp.zeros(masks), jnp.zeros((2, 4)), image_size=size)
