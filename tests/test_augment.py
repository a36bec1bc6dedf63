"""Augmentation: pixels, boxes and masks move together for every random draw."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets
from detectax_eqx.train import augment, jitter_colors


CANVAS = (48, 64)
SIZE = (20, 30)


def scene(box=(6, 4, 18, 14), masks=True):
    """A white rectangle in a black image of 20×30 pixels on a 24×40 source canvas; the left half of its mask is set."""
    x0, y0, x1, y1 = box
    image = np.zeros((24, 40, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    image[SIZE[0] :], image[:, SIZE[1] :] = 99, 99  # outside the image: must not show
    boxes = jnp.array([box, (0, 0, 0, 0)], jnp.float32)
    mask = jnp.zeros((2, 6, 6), jnp.uint8).at[0, :, :3].set(255)
    targets = Targets(
        boxes,
        jnp.array([2, 0], jnp.int32),
        jnp.array([True, False]),
        mask if masks else None,
        boxes if masks else None,
    )
    return jnp.asarray(image), jnp.array(SIZE), targets


augment_jit = jax.jit(augment, static_argnames=("canvas", "min_sizes", "max_size", "flip_probability", "scale_range"))


def check_pixels(image, size, box):
    """Checks that pixels are white well inside the box, black well outside it, and 0 outside the image."""
    x0, y0, x1, y1 = (float(v) for v in box)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    distance = np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y))
    margin = 2.5  # pixels; wider than the blur of an edge at these scales
    red = np.asarray(image[..., 0])
    assert (red[distance > margin] > 254).all()
    assert (red[distance < -margin] < 1).all()
    assert (red[(y > int(size[0])) | (x > int(size[1]))] == 0).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("min_size, max_size, expected", [(40, 100, (40, 60)), (30, 40, (26, 40)), (90, 900, (42, 64))])
def test_resize_and_flip_move_all_together(getkey, flip, min_size, max_size, expected):
    image, size, targets = augment_jit(
        *scene(), canvas=CANVAS, min_sizes=(min_size,), max_size=max_size, flip_probability=flip, key=getkey()
    )
    assert image.shape == (*CANVAS, 3) and tuple(size.tolist()) == expected
    sy, sx = expected[0] / 20, expected[1] / 30
    box = np.array([6 * sx, 4 * sy, 18 * sx, 14 * sy])
    if flip:
        box[[0, 2]] = expected[1] - box[[2, 0]]
    np.testing.assert_allclose(targets.boxes[0], box, atol=1e-4)
    np.testing.assert_allclose(targets.mask_boxes[0], box, atol=1e-4)
    check_pixels(image, size, box)
    left = bool(targets.masks[0, 0, 0] == 255)
    assert left == (flip == 0.0) and int(targets.masks[0].sum()) == 18 * 255
    assert targets.valid.tolist() == [True, False] and targets.labels.tolist() == [2, 0]


def test_flipping_twice_is_the_identity(getkey):
    options = {"canvas": (24, 40), "min_sizes": (20,), "max_size": 30, "flip_probability": 1.0}
    image, size, targets = scene()
    once = augment_jit(image, size, targets, key=getkey(), **options)
    twice = augment_jit(once[0].astype(jnp.uint8), once[1], once[2], key=getkey(), **options)
    inside = jnp.zeros((24, 40, 1), bool).at[: SIZE[0], : SIZE[1]].set(True)
    np.testing.assert_array_equal(twice[0], jnp.where(inside, image.astype(jnp.float32), 0.0))
    np.testing.assert_array_equal(twice[1], size)
    for a, b in zip(jax.tree.leaves(twice[2])[1:], jax.tree.leaves(targets)[1:], strict=True):
        if a.shape != (2, 4):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(twice[2].boxes[0], targets.boxes[0], atol=1e-5)
    assert not (once[0] == twice[0]).all()


def test_sizes_are_drawn_and_follow_the_rule(getkey):
    """The scale is the smallest of four integer ratios, and each side is rounded down exactly."""
    random = np.random.default_rng(0)
    image, _, targets = scene(masks=False)
    seen = set()
    keys = jr.split(getkey(), 60)
    sizes = random.integers(1, 25, size=(60, 2)).astype(np.int32)
    run = jax.jit(
        jax.vmap(
            lambda size, key: augment(image, size, targets, canvas=CANVAS, min_sizes=(12, 40), max_size=60, key=key)[1]
        )
    )
    for (height, width), output in zip(sizes.tolist(), run(jnp.asarray(sizes), keys).tolist(), strict=True):
        expected = []
        for min_size in (12, 40):
            ratios = [(min_size, min(height, width)), (60, max(height, width)), (48, height), (64, width)]
            n, d = min(ratios, key=lambda r: r[0] / r[1])
            expected.append([max(1, height * n // d), max(1, width * n // d)])
        assert output in expected
        seen.add(expected.index(output))
    assert seen == {0, 1}


def test_large_scale_jitter_keeps_boxes_inside_and_all_together(getkey):
    image, size, targets = scene()
    keys = jr.split(getkey(), 64)
    run = jax.jit(
        jax.vmap(
            lambda key: augment(
                image, size, targets, canvas=CANVAS, min_sizes=(1,), max_size=1, scale_range=(0.1, 2.0), key=key
            )
        )
    )
    images, sizes, moved = run(keys)
    visible = np.asarray(moved.valid[:, 0])
    assert not moved.valid[:, 1].any() and 0.5 < visible.mean() <= 1
    scales = np.asarray(moved.mask_boxes[:, 0, 3] - moved.mask_boxes[:, 0, 1]) / 10
    assert scales.min() < 0.7 and scales.max() > 3  # the scale that fits the canvas is 2.13
    cropped = 0
    for k in np.flatnonzero(visible):
        height, width = (int(v) for v in sizes[k])
        x0, y0, x1, y1 = (float(v) for v in moved.boxes[k, 0])
        assert 0 <= x0 < x1 <= width <= CANVAS[1] and 0 <= y0 < y1 <= height <= CANVAS[0]
        check_pixels(images[k], sizes[k], moved.mask_boxes[k, 0])
        frame = np.asarray(moved.mask_boxes[k, 0])
        clipped = np.clip(frame, 0, [width, height, width, height])
        np.testing.assert_allclose(moved.boxes[k, 0], clipped, atol=1e-4)
        cropped += bool((frame != clipped).any())
    assert cropped > 3


def test_a_box_that_is_cropped_away_is_not_valid(getkey):
    image, size, targets = scene(box=(0, 0, 2, 2))
    keys = jr.split(getkey(), 32)
    moved = jax.vmap(
        lambda key: augment(
            image, size, targets, canvas=CANVAS, min_sizes=(1,), max_size=1, scale_range=(2.0, 2.0), key=key
        )[2]
    )(keys)
    frames = moved.mask_boxes
    assert frames is not None
    gone = np.asarray((frames[:, 0, 2] <= 0) | (frames[:, 0, 3] <= 0) | (frames[:, 0, 0] >= 64))
    assert gone.any() and not gone.all()
    np.testing.assert_array_equal(np.asarray(moved.valid[:, 0]), ~gone)


def test_square_stretches_both_sides():
    """Boxes and pixels follow the scale of each axis, as in a detector that resizes by `Square`."""
    boxes = jnp.array([[10.0, 5.0, 30.0, 25.0]])
    targets = Targets(boxes, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    image = jnp.broadcast_to(jnp.arange(60, dtype=jnp.uint8)[None, :, None], (40, 60, 3))
    options: dict[str, Any] = {"canvas": (30, 30), "min_sizes": (30,), "max_size": 5, "flip_probability": 0.0}
    options |= {"key": jr.key(0), "square": True}
    pixels, size, moved = augment(image, jnp.array([40, 60]), targets, **options)
    assert size.tolist() == [30, 30]
    np.testing.assert_allclose(moved.boxes, boxes * jnp.array([[0.5, 0.75, 0.5, 0.75]]), atol=1e-5)
    np.testing.assert_allclose(pixels[7, :, 0], np.arange(30) * 2 + 0.5, atol=1e-4)
    _, size, moved = augment(image, jnp.array([40, 60]), targets, scale_range=(0.5, 0.5), **options)
    assert size.tolist() == [15, 15]
    np.testing.assert_allclose(moved.boxes, boxes * jnp.array([[0.25, 0.375, 0.25, 0.375]]), atol=1e-5)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_keypoints_move_with_their_boxes(getkey, flip):
    image, size, targets = scene(box=(10, 4, 18, 14))
    places = jnp.array([[10, 4], [18, 14], [1, 19]], jnp.float32)
    points = jnp.stack([jnp.concatenate([places, jnp.array([[2], [1], [0]], jnp.float32)], axis=1)] * 2)
    targets = Targets(targets.boxes, targets.labels, targets.valid, keypoints=points)
    options = {"canvas": CANVAS, "min_sizes": (40,), "max_size": 100, "flip_probability": flip, "key": getkey()}
    _, _, moved = augment(image, size, targets, keypoint_pairs=[(0, 1)], **options)
    assert moved.keypoints is not None
    expected = [[20, 8, 2], [36, 28, 1], [2, 38, 0]]  # at twice the size, 40×60
    if flip:  # the points of a pair are swapped: the second lies where the first is mirrored to
        expected = [[24, 28, 1], [40, 8, 2], [58, 38, 0]]
    np.testing.assert_allclose(moved.keypoints[0], expected, atol=1e-4)
    x0, _, x1, _ = moved.boxes[0].tolist()
    assert sorted([x0, x1]) == sorted(moved.keypoints[0, :2, 0].tolist())
    _, _, alone = augment(image, size, targets, **options)  # without pairs
    assert alone.keypoints is not None
    np.testing.assert_allclose(alone.keypoints[0], [expected[1], expected[0], expected[2]] if flip else expected)


def test_keypoints_beyond_a_crop_are_not_visible(getkey):
    image, size, targets = scene(masks=False)
    points = jnp.array([[[1, 1, 2], [29, 19, 2], [15, 10, 1]], [[0, 0, 0]] * 3], jnp.float32)
    targets = Targets(targets.boxes, targets.labels, targets.valid, keypoints=points)
    keys = jr.split(getkey(), 40)
    sizes, moved = jax.vmap(
        lambda key: augment(
            image, size, targets, canvas=CANVAS, min_sizes=(1,), max_size=1, scale_range=(0.9, 2.0), key=key
        )[1:]
    )(keys)
    assert moved.keypoints is not None
    x, y, visibility = (np.asarray(part) for part in jnp.unstack(moved.keypoints[:, 0], axis=-1))
    inside = (x >= 0) & (y >= 0) & (x <= np.asarray(sizes)[:, 1:]) & (y <= np.asarray(sizes)[:, :1])
    np.testing.assert_array_equal(visibility, np.where(inside, [2, 2, 1], 0))
    assert inside.any(0).all() and not inside[:, :2].all(0).any()


def test_without_objects_or_image(getkey):
    image, _, _ = scene()
    none = Targets(jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32), jnp.zeros(0, bool))
    for scale_range in (None, (0.1, 2.0)):
        out, size, targets = augment(
            image, jnp.zeros(2, jnp.int32), none, canvas=CANVAS, min_sizes=(8,), max_size=9, scale_range=scale_range,
            key=getkey(),
        )  # fmt: skip
        assert targets.boxes.shape == (0, 4) and np.isfinite(out).all() and (size >= 1).all()


def _reference_jitter(image, factors):
    def gray(x):
        return (x @ np.array([0.299, 0.587, 0.114]))[..., None]

    x = np.clip(image * factors[0], 0, 255)
    mean = gray(x).mean()
    x = np.clip(mean + factors[1] * (x - mean), 0, 255)
    return np.clip(gray(x) + factors[2] * (x - gray(x)), 0, 255)


def test_colours(getkey):
    image = np.zeros((12, 16, 3))
    image[:7, :9] = np.random.default_rng(0).uniform(0, 255, (7, 9, 3))
    key = getkey()
    factors = 1 + 0.5 * np.asarray(jr.uniform(key, (3,), minval=-1.0, maxval=1.0), np.float64)
    out = jitter_colors(
        jnp.asarray(image, jnp.float32), jnp.array([7, 9]), brightness=0.5, contrast=0.5, saturation=0.5, key=key
    )
    np.testing.assert_allclose(out[:7, :9], _reference_jitter(image[:7, :9], factors), atol=1e-3)
    assert (out[7:] == 0).all() and (out[:, 9:] == 0).all()
    same = jitter_colors(
        jnp.asarray(image, jnp.float32), jnp.array([7, 9]), brightness=0, contrast=0, saturation=0, key=key
    )
    np.testing.assert_allclose(same, image, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_sizes": ()}, "min_sizes must hold"),
        ({"max_size": 0}, "max_size must be positive, got 0"),
        ({"flip_probability": 1.5}, "flip_probability must be in 0..1, got 1.5"),
        ({"scale_range": (2.0, 1.0)}, r"scale_range must be positive and ascending, got \(2.0, 1.0\)"),
        ({"keypoint_pairs": [(0, 1)]}, r"keypoint_pairs must name each of the 0 points at most once, got \[\(0, 1\)\]"),
    ],
)
def test_refusals(getkey, options, message):
    with pytest.raises(ValueError, match=message):
        augment(*scene(), **{"canvas": CANVAS, "min_sizes": (8,), "max_size": 9, "key": getkey()} | options)


def test_masks_need_their_frames(getkey):
    image, size, targets = scene()
    bare = Targets(targets.boxes, targets.labels, targets.valid, targets.masks)
    with pytest.raises(ValueError, match="masks but no mask_boxes"):
        augment(image, size, bare, canvas=CANVAS, min_sizes=(8,), max_size=9, key=getkey())
    with pytest.raises(ValueError, match=r"contrast must be in 0..1, got 2"):
        jitter_colors(jnp.zeros((2, 2, 3)), size, contrast=2.0, key=getkey())
