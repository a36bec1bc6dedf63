"""Resizing by Pillow's rule inside a program, compared with Pillow itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from detectax_eqx.models import Preprocessing, ShortestEdge
from detectax_eqx.ops import resize_image_pillow


SOURCE, CANVAS = (200, 240), (256, 288)
resize = jax.jit(resize_image_pillow, static_argnames="canvas")


def random_image(rng, size):
    """Noise on a gradient, so that coarse and fine detail is there, with values at both ends of the range."""
    ramp = np.linspace(-40, 295, size[0] * size[1] * 3).reshape(*size, 3)
    return np.clip(ramp + rng.normal(0, 60, (*size, 3)), 0, 255).astype(np.uint8)


def pillow(image, size):
    """Columns first, then rows, as in one call of Pillow before version 13."""
    columns = Image.fromarray(image).resize((size[1], image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(columns.resize(size[::-1], Image.Resampling.BILINEAR))


def ours(image, size, **options):
    padded = np.full((*SOURCE, 3), 255, np.uint8)  # what is outside of the image must not be read
    padded[: image.shape[0], : image.shape[1]] = image
    sizes = {"image_size": jnp.array(image.shape[:2]), "output_size": jnp.array(size)}
    return np.array(resize(jnp.asarray(padded), **sizes, canvas=CANVAS, **options))


@pytest.fixture(scope="module")
def pairs():
    """50 pairs of sizes, up and down by factors from a twentieth to twenty, each axis by its own."""
    rng = np.random.default_rng(0)
    sides = [np.exp(rng.uniform(np.log(5), np.log(side), 50)).astype(int) for side in (*SOURCE, *CANVAS)]
    fixed = [(200, 240, 256, 288), (1, 1, 7, 9), (200, 240, 1, 1), (31, 40, 31, 40), (64, 96, 128, 192)]
    return [((a, b), (c, d)) for a, b, c, d in [*np.stack(sides, axis=1).tolist(), *fixed]]


def test_equals_pillow(pairs):
    rng = np.random.default_rng(1)
    differences, factors = [], []
    for size, resized in pairs:
        image = random_image(rng, size)
        result = ours(image, resized)
        expected = pillow(image, resized)
        differences.append(np.abs(result[: resized[0], : resized[1]].astype(int) - expected).ravel())
        factors += [resized[0] / size[0], resized[1] / size[1]]
        result[: resized[0], : resized[1]] = 0
        assert not result.any(), "pixels outside of the resized image"
    assert min(factors) < 0.1 and max(factors) > 10
    everything = np.concatenate(differences)
    assert everything.max() <= 1
    assert (everything == 0).mean() >= 0.9999
    assert all((difference == 0).mean() >= 0.999 for difference in differences)


def test_one_call_of_pillow(pairs):
    """Since version 13, Pillow resizes rows first if that removes over twice as many of them as columns."""
    rng, orders = np.random.default_rng(5), []
    for size, resized in pairs:
        image = random_image(rng, size)
        one_call = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
        difference = np.abs(ours(image, resized)[: resized[0], : resized[1]].astype(int) - one_call)
        removed = np.subtract(size, resized)
        orders.append(bool(removed[0] > max(0, 2 * removed[1])))
        assert difference.max() <= 1
        assert orders[-1] or (difference == 0).mean() >= 0.999
    assert {*orders} == {False, True}


def test_it_is_not_the_rule_of_torchvision():
    """Halving a checkerboard by columns gives gray, which a resize without antialiasing would not."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, ::2] = 255
    result = ours(image, (8, 4))[:8, :4]
    np.testing.assert_array_equal(result, pillow(image, (8, 4)))
    assert result[:, 1:3].min() > 100 and result[:, 1:3].max() < 155


def test_offset_and_flip():
    rng = np.random.default_rng(2)
    image, size = random_image(rng, (50, 70)), (90, 120)
    expected = np.zeros((*CANVAS, 3), np.uint8)
    mirrored = pillow(image, size)[:, ::-1]
    expected[3 : 3 + 90, : 120 - 11] = mirrored[:, 11:]
    np.testing.assert_array_equal(ours(image, size, offset=jnp.array([-3, 11]), flip=jnp.array(True)), expected)


def test_vmap_equals_a_loop():
    """One program for images of several sizes, some enlarged and some shrunk."""
    rng = np.random.default_rng(3)
    images = jnp.asarray(rng.integers(0, 256, (3, 40, 50, 3), np.uint8))
    sizes, outputs = jnp.array([[40, 50], [9, 50], [40, 7]]), jnp.array([[20, 60], [30, 8], [5, 60]])

    def one(image, size, output):
        return resize_image_pillow(image, image_size=size, output_size=output, canvas=(32, 64))

    batched = jax.jit(jax.vmap(one))(images, sizes, outputs)
    for i in range(3):
        np.testing.assert_array_equal(batched[i], jax.jit(one)(images[i], sizes[i], outputs[i]))


def detectron2_size(height, width, short, long):
    """Detectron2's `ResizeShortestEdge.get_output_shape`, in plain Python."""
    scale = short * 1.0 / min(height, width)
    sides = (short * 1.0, scale * width) if height < width else (scale * height, short * 1.0)
    if max(sides) > long:
        scale = long * 1.0 / max(sides)
        sides = sides[0] * scale, sides[1] * scale
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def test_sides_are_rounded_as_in_detectron2():
    rule, canvas = ShortestEdge(80, 133, rounded=True), (160, 160)
    table = rule.table((150, 170), canvas=canvas)
    expected = [[detectron2_size(h, w, 80, 133) for w in range(1, 171)] for h in range(1, 151)]
    np.testing.assert_array_equal(table, np.maximum(expected, 1))
    for size in [(1, 1), (149, 13), (40, 41), (97, 97), (150, 170)]:
        assert rule(size) == tuple(table[size[0] - 1, size[1] - 1])
    assert (table != ShortestEdge(80, 133).table((150, 170), canvas=canvas)).any()


@pytest.mark.parametrize("canvas", [(64, 96), (80, 128), (96, 64)])
def test_a_rounded_size_fits_the_canvas(canvas):
    rule = ShortestEdge(80, 133, rounded=True)
    table = rule.table((60, 60), canvas=canvas)
    assert (table <= np.array(canvas)).all() and (table >= 1).all()
    assert (table == np.array(canvas)).any(axis=2).mean() > 0.5
    assert rule((17, 50), canvas=canvas) == tuple(table[16, 49])


def test_preprocessing_chooses_the_rule():
    rng = np.random.default_rng(4)
    image = jnp.asarray(random_image(rng, (60, 80)))
    sizes = {"image_size": jnp.array([60, 80]), "output_size": jnp.array([30, 40])}
    placed = jax.jit(lambda image: Preprocessing(pillow=True).place(image, **sizes, canvas=(32, 64)))(image)
    assert placed.dtype == jnp.float32
    np.testing.assert_array_equal(placed[:30, :40], pillow(np.asarray(image), (30, 40)))
    other = jax.jit(lambda image: Preprocessing().place(image, **sizes, canvas=(32, 64)))(image)
    assert np.abs(other - placed).max() > 20
