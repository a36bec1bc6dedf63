"""Resizing: torch's bilinear rule between two sizes that are not known at compile time."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import resize_image, resized_size


def _reference(image, output_size, canvas, offset=(0, 0), flip=False):
    """Bilinear interpolation at pixel centres, pixel by pixel, in float64."""
    (h, w), (oh, ow) = image.shape[:2], output_size
    resized = np.zeros((oh, ow, image.shape[2]))
    for y in range(oh):
        for x in range(ow):
            sy, sx = max((y + 0.5) * h / oh - 0.5, 0), max((x + 0.5) * w / ow - 0.5, 0)
            y0, x0 = min(int(sy), h - 1), min(int(sx), w - 1)
            y1, x1, fy, fx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), sy - y0, sx - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            resized[y, x] = top * (1 - fy) + (image[y1, x0] * (1 - fx) + image[y1, x1] * fx) * fy
    if flip:
        resized = resized[:, ::-1]
    out = np.zeros((*canvas, image.shape[2]))
    for y in range(canvas[0]):
        for x in range(canvas[1]):
            sy, sx = y + offset[0], x + offset[1]
            if 0 <= sy < oh and 0 <= sx < ow:
                out[y, x] = resized[sy, sx]
    return out


CASES = [
    ((5, 7), (9, 12), (0, 0), False),
    ((9, 12), (5, 7), (0, 0), False),
    ((6, 6), (6, 6), (0, 0), True),
    ((5, 7), (14, 15), (3, 2), False),
    ((5, 7), (8, 9), (-2, -3), True),
    ((1, 1), (4, 4), (0, 0), False),
]


@pytest.mark.parametrize("size, output, offset, flip", CASES)
def test_agrees_with_a_naive_loop(getkey, size, output, offset, flip):
    image = jr.uniform(getkey(), (*size, 3))
    padded = jnp.pad(image, ((0, 4), (0, 2), (0, 0)), constant_values=99.0)  # must not be read
    resize = jax.jit(resize_image, static_argnames="canvas")
    out = resize(
        padded,
        image_size=jnp.array(size),
        output_size=jnp.array(output),
        canvas=(12, 16),
        offset=jnp.array(offset),
        flip=jnp.array(flip),
    )
    expected = _reference(np.asarray(image, np.float64), output, (12, 16), offset, flip)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_one_program_serves_all_sizes_and_vmaps(getkey):
    images = jr.uniform(getkey(), (2, 8, 8, 1))
    sizes, outputs = jnp.array([[8, 5], [3, 8]]), jnp.array([[10, 7], [6, 12]])

    def resize(image, size, output):
        return resize_image(image, image_size=size, output_size=output, canvas=(12, 12))

    batched = jax.vmap(resize)(images, sizes, outputs)
    for i in range(2):
        np.testing.assert_allclose(batched[i], resize(images[i], sizes[i], outputs[i]), atol=1e-6)


def test_gradient_is_the_transpose(getkey):
    image, cotangent = jr.uniform(getkey(), (4, 5, 1)), jr.normal(getkey(), (8, 8, 1))

    def weighed(image):
        out = resize_image(image, image_size=jnp.array([4, 5]), output_size=jnp.array([7, 8]), canvas=(8, 8))
        return (out * cotangent).sum()

    # Resizing is linear: its value is the product of its gradient with the image.
    np.testing.assert_allclose(weighed(image), (jax.grad(weighed)(image) * image).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "size, options, expected",
    [
        ((480, 640), {"min_size": 800, "max_size": 1333}, (800, 1066)),
        ((334, 500), {"min_size": 800, "max_size": 1333}, (799, 1197)),  # in float64, just short of 800
        ((640, 200), {"min_size": 800, "max_size": 1333}, (1333, 416)),
        ((100, 100), {"min_size": 800, "max_size": 1333, "canvas": (640, 960)}, (640, 640)),
        ((10_000, 1), {"min_size": 32, "max_size": 32}, (32, 1)),
    ],
)
def test_resized_size(size, options, expected):
    assert resized_size(size, **options) == expected


@pytest.mark.parametrize("size, low, high", [((0, 5), 800, 1333), ((5, 5), 0, 1333), ((5, 5), 800, -1)])
def test_resized_size_refuses(size, low, high):
    with pytest.raises(ValueError, match="positive"):
        resized_size(size, min_size=low, max_size=high)
