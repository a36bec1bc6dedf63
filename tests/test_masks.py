"""Cropping and pasting masks against naive loops in float64 and hand-computed tables."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import crop_masks, paste_masks


# Compiled, unless a test is about running eagerly or about errors.
fast_crop = jax.jit(crop_masks, static_argnames=("output_size", "sampling_ratio", "aligned"))
fast_paste = jax.jit(paste_masks, static_argnames=("image_size",))


def _crop_axis(frame, span, size, bins, ratio, aligned):
    """Weight of each mask pixel in each bin along an axis, sample by sample."""
    weights = np.zeros((bins, size))
    start, end = span[0] - 0.5 * aligned, span[1] - 0.5 * aligned
    length = end - start if aligned else max(end - start, 1.0)
    samples = ratio or math.ceil(length / bins)
    if not frame[1] > frame[0]:
        return weights
    for p in range(bins):
        for i in range(samples):
            position = start + p * length / bins + (i + 0.5) * length / bins / samples
            position = (position + 0.5 - frame[0]) / (frame[1] - frame[0]) * size - 0.5
            if position < -1 or position > size:
                continue
            position = min(max(position, 0), size - 1)
            below = int(position)
            weights[p, below] += (1 - position + below) / samples
            weights[p, min(below + 1, size - 1)] += (position - below) / samples
    return weights


def _crop(masks, frames, rois, *, output_size, sampling_ratio, aligned):
    out = []
    for mask, frame, roi in zip(np.asarray(masks, np.float64), np.asarray(frames, np.float64), rois, strict=True):
        roi = np.asarray(roi, np.float64)
        rows = _crop_axis(frame[1::2], roi[1::2], mask.shape[0], output_size[0], sampling_ratio, aligned)
        columns = _crop_axis(frame[0::2], roi[0::2], mask.shape[1], output_size[1], sampling_ratio, aligned)
        out.append(rows @ mask @ columns.T)
    return np.stack(out)


# Frames of masks, and the regions to crop, in pixels.
CROPS = [
    ((0, 0, 9, 8), (1.25, 2.5, 7.75, 6.5)),  # a mask of the image's size
    ((0, 0, 9, 8), (-4.25, -3.5, 12.75, 11.5)),
    ((10.25, 12.5, 40.75, 30.5), (8.25, 14.75, 50.5, 29.25)),  # small masks, large boxes
    ((10.25, 12.5, 12.75, 14.5), (10.375, 12.25, 12.5, 14.75)),  # and tiny ones
    ((-20, -30, 60, 50), (0, 0, 40, 50)),  # the object reaches beyond the image
    ((3, 3, 90, 80), (100, 100, 120, 110)),  # no overlap
    ((3, 3, 20, 20), (5.125, 6.25, 5.125, 6.25)),  # a point
    ((3, 3, 3, 30), (2, 2, 9, 9)),  # a mask of zero width
    ((0, 0, 9, 8), (7.5, 6, 3.5, 1)),  # corners swapped
    ((0.5, 0.25, 99, 88), (-3000.5, -2000, 4000.5, 6000)),
    ((0, 0, 0, 0), (0, 0, 0, 0)),
]


def _crop_boxes():
    return jnp.array([frame for frame, _ in CROPS], jnp.float32), jnp.array([roi for _, roi in CROPS], jnp.float32)


@pytest.mark.parametrize("sampling_ratio, aligned", [(0, False), (0, True), (1, False), (2, True), (3, False)])
def test_crop_agrees_with_a_naive_loop(getkey, sampling_ratio, aligned):
    masks = jr.uniform(getkey(), (len(CROPS), 8, 9))
    frames, rois = _crop_boxes()
    options = {"output_size": (4, 5), "sampling_ratio": sampling_ratio, "aligned": aligned}
    out = fast_crop(masks, frames, rois, **options)
    np.testing.assert_allclose(out, _crop(masks, frames, rois, **options), atol=1e-5)


def test_crop_tables():
    mask = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4) / 16
    frame = jnp.array([[0.0, 0, 4, 4]])

    def crop(box, **options):
        return fast_crop(mask, frame, jnp.array([box], jnp.float32), output_size=2, **options)[0] * 16

    # torchvision's convention: per side, the samples at 0.5 and 1.5 average to index 1, and those at 2.5 and 3.5
    # (clamped to 3) to 2.75.
    np.testing.assert_allclose(crop((0, 0, 4, 4)), [[5, 6.75], [12, 13.75]], atol=1e-5)
    # Aligned, the samples are the pixels themselves: means of blocks of four.
    np.testing.assert_allclose(crop((0, 0, 4, 4), aligned=True), [[2.5, 4.5], [10.5, 12.5]], atol=1e-5)
    np.testing.assert_allclose(
        crop((0, 0, 4, 4), aligned=True, sampling_ratio=1), [[2.5, 4.5], [10.5, 12.5]], atol=1e-5
    )
    # Far outside the frame, the mask reads 0.
    np.testing.assert_array_equal(crop((9, 0, 13, 4)), 0)


def test_crop_of_the_whole_frame_is_the_mask(getkey):
    masks, frames = jr.uniform(getkey(), (2, 6, 7)), jnp.array([[3.5, 4, 10.5, 10], [0, 0, 70, 60]])
    out = fast_crop(masks, frames, frames, output_size=(6, 7), sampling_ratio=1, aligned=True)
    np.testing.assert_allclose(out, masks, atol=1e-5)


@pytest.mark.parametrize("dtype, full", [(jnp.uint8, 255), (jnp.bool_, 1), (jnp.float32, 1), (jnp.bfloat16, 1)])
def test_crop_dtypes(getkey, dtype, full):
    masks = jr.bernoulli(getkey(), 0.5, (3, 8, 8))
    frames = jnp.tile(jnp.array([[1.0, 2, 30, 40]]), (3, 1))
    rois = frames + jnp.array([[1.0, -2, 3, 4]])
    out = fast_crop((masks.astype(jnp.int32) * full).astype(dtype), frames, rois, output_size=4)
    assert out.dtype == (dtype if dtype == jnp.bfloat16 else jnp.float32)
    expected = fast_crop(masks.astype(jnp.float32), frames, rois, output_size=4)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2**-9 if dtype == jnp.bfloat16 else 1e-6)
    assert float(out.min()) >= 0 and float(out.max()) <= 1


def test_crop_gradients(getkey):
    masks = jr.uniform(getkey(), (len(CROPS), 8, 9))
    frames, rois = _crop_boxes()
    broken = jnp.array([[jnp.nan] * 4, [0, 0, jnp.inf, 9], [-3e38, 0, 3e38, 9]])
    rois = rois + jnp.array([[0.013, 0.017, 0.029, 0.031]])  # no sample on a kink
    masks = jnp.concatenate([masks, masks[:6]])
    frames = jnp.concatenate([frames, broken, jnp.tile(frames[:1], (3, 1))])
    rois = jnp.concatenate([rois, jnp.tile(rois[:1], (3, 1)), broken])
    cotangent = jr.normal(getkey(), (len(masks), 3, 3))
    for ratio in (0, 2):

        @jax.jit
        def run(masks, frames, rois, ratio=ratio):
            def crop(*args):
                return crop_masks(*args, output_size=3, sampling_ratio=ratio)

            out, pull = jax.vjp(crop, masks, frames, rois)
            return out, *pull(cotangent)

        results = run(masks, frames, rois)
        assert all(jnp.isfinite(x).all() for x in results)
        out, mask_gradient, _, roi_gradient = results
        np.testing.assert_allclose((mask_gradient * masks).sum(), (out * cotangent).sum(), rtol=1e-4)
        np.testing.assert_array_equal(out[np.r_[-6:-4, -3:0]], 0)
        options = {"output_size": (3, 3), "sampling_ratio": ratio, "aligned": False}
        for axis in range(4):
            shift = 1e-6 * np.eye(4)[axis]
            m, f, r = (np.asarray(x[2:4], np.float64) for x in (masks, frames, rois))
            difference = _crop(m, f, r + shift, **options) - _crop(m, f, r - shift, **options)
            expected = (difference * np.asarray(cotangent[2:4])).sum(axis=(1, 2)) / 2e-6
            np.testing.assert_allclose(roi_gradient[2:4, axis], expected, atol=1e-4)


def test_crop_eager_batched_and_empty(getkey):
    masks = jr.uniform(getkey(), (len(CROPS), 8, 9))
    frames, rois = _crop_boxes()

    def crop(masks, frames, rois):
        return crop_masks(masks, frames, rois, output_size=3)

    expected = jax.jit(crop)(masks, frames, rois)
    np.testing.assert_allclose(crop(masks, frames, rois), expected, atol=1e-6)
    batched = jax.jit(jax.vmap(crop))(*(jnp.stack([x, x[::-1]]) for x in (masks, frames, rois)))
    np.testing.assert_allclose(batched, jnp.stack([expected, expected[::-1]]), atol=1e-6)
    assert crop(masks[:0], frames[:0], rois[:0]).shape == (0, 3, 3)


def _paste_axis(low, high, size, canvas):
    """Weight of each mask pixel in each image pixel along an axis, image pixel by image pixel."""
    weights = np.zeros((canvas, size + 2))
    half = np.float32((high - low) * np.float32(0.5) * np.float32((size + 2) / size))
    middle = np.float32((high + low) * np.float32(0.5))
    first, last = int(middle - half), int(middle + half)
    extent = max(last - first + 1, 1)
    for x in range(max(first, 0), min(last + 1, canvas)):
        source = max((x - first + 0.5) * (size + 2) / extent - 0.5, 0)
        below = min(int(source), size + 1)
        weights[x, below] += 1 - source + below
        weights[x, min(below + 1, size + 1)] += source - below
    return weights[:, 1:-1]  # the margin is 0


def _paste(masks, boxes, image_size):
    out = []
    for mask, (x0, y0, x1, y1) in zip(np.asarray(masks, np.float64), np.asarray(boxes, np.float32), strict=True):
        rows = _paste_axis(y0, y1, mask.shape[0], image_size[0])
        out.append(rows @ mask @ _paste_axis(x0, x1, mask.shape[1], image_size[1]).T)
    return np.stack(out)


PASTES = [
    (2.0, 1.0, 9.5, 12.25),
    (0, 0, 18, 14),
    (-3.75, -5.5, 6.25, 4.5),  # negative and positive coordinates both round towards zero
    (12.5, 9.25, 30.5, 25),
    (5.25, 6.5, 5.25, 6.5),  # a point
    (4, 3, 4.25, 9),
    (3.5, 3.5, 4.5, 4.5),
    (40, 40, 60, 60),
    (-30, -30, -20, -20),
    (9, 8, 4, 3),  # corners swapped
    (-300, -200, 400, 500),
]


@pytest.mark.parametrize("size", [5, 1, 6])
def test_paste_agrees_with_a_naive_loop(getkey, size):
    masks, boxes = jr.uniform(getkey(), (len(PASTES), size, size)), jnp.array(PASTES, jnp.float32)
    out = fast_paste(masks, boxes, image_size=(14, 18))
    np.testing.assert_allclose(out, _paste(masks, boxes, (14, 18)), atol=1e-5)
    np.testing.assert_array_equal(out[7:10], 0)


def test_paste_table():
    # With its margin, a 2×2 mask has 4×4 pixels. On 4 pixels the scale is 1; on 5, samples start at -0.1, 0.8 apart.
    mask = jnp.array([[[1.0, 0.5], [0.25, 0.75]]])
    out = fast_paste(mask, jnp.array([[2.0, 1.0, 3.5, 2.5]]), image_size=(3, 5))[0]
    np.testing.assert_allclose(out, [[0, 0, 0, 0, 0], [0, 0, 1, 0.5, 0], [0, 0, 0.25, 0.75, 0]], atol=1e-6)
    out = fast_paste(jnp.ones((1, 2, 2)), jnp.array([[1.0, 1, 3, 3]]), image_size=(3, 6))[0, 2]
    np.testing.assert_allclose(out, [0, 0.7, 1, 0.7, 0, 0], atol=1e-6)


def test_cropping_undoes_pasting(getkey):
    """Detectron2's round trip: a blob is pasted, thresholded, cropped and thresholded again, with IoU > 0.94."""
    y, x = np.mgrid[0:28, 0:28] / 27 - 0.5
    angles = np.linspace(0, np.pi, 4, endpoint=False)
    blobs = [
        1 / (1 + np.exp(12 * (np.hypot(x * np.cos(a) + y * np.sin(a), 1.6 * (y * np.cos(a) - x * np.sin(a))) - 0.4)))
        for a in angles
    ]
    masks, boxes = jnp.array(blobs, jnp.float32), jnp.array([[20.3, 10.6, 140.2, 121.9]] * 4)
    pasted = fast_paste(masks, boxes, image_size=(150, 160)) >= 0.5
    frames = jnp.array([[0.0, 0, 160, 150]] * 4)
    back = np.asarray(fast_crop(pasted, frames, boxes, output_size=28, aligned=True) >= 0.5)
    original = np.asarray(masks >= 0.5)
    iou = (back & original).sum(axis=(1, 2)) / (back | original).sum(axis=(1, 2))
    assert original.mean() > 0.2 and iou.min() > 0.94


def test_paste_eager_batched_gradient_and_dtype(getkey):
    masks, boxes = jr.uniform(getkey(), (len(PASTES), 5, 5)), jnp.array(PASTES, jnp.float32)
    broken = jnp.array([[jnp.nan] * 4, [0, 0, jnp.inf, 9], [-3e38, 0, 3e38, 9]])

    def paste(masks, boxes):
        return paste_masks(masks, boxes, image_size=(14, 18))

    expected = jax.jit(paste)(masks, boxes)
    np.testing.assert_allclose(paste(masks, boxes), expected, atol=1e-6)
    batched = jax.jit(jax.vmap(paste))(jnp.stack([masks, masks[::-1]]), jnp.stack([boxes, boxes[::-1]]))
    np.testing.assert_allclose(batched, jnp.stack([expected, expected[::-1]]), atol=1e-6)
    assert paste(masks[:0], boxes[:0]).shape == (0, 14, 18)

    # Pasting is linear in the masks, and appended rows change nothing.
    more = jnp.concatenate([boxes, broken]), jnp.concatenate([masks, masks[:3]])
    cotangent = jr.normal(getkey(), (len(more[0]), 14, 18))

    @jax.jit
    def run(masks, boxes):
        out, pull = jax.vjp(paste, masks, boxes)
        return out, *pull(cotangent)

    out, mask_gradient, box_gradient = run(more[1], more[0])
    np.testing.assert_allclose(out[:-3], expected, atol=1e-6)
    np.testing.assert_array_equal(out[-3:-1], 0)
    np.testing.assert_allclose((mask_gradient * more[1]).sum(), (out * cotangent).sum(), rtol=1e-4)
    assert jnp.isfinite(box_gradient).all()

    above = paste_masks(masks, boxes, image_size=(14, 18), threshold=0.25)
    assert above.dtype == bool
    np.testing.assert_array_equal(above, np.asarray(expected) > 0.25)
    half = fast_paste(masks.astype(jnp.bfloat16), boxes, image_size=(14, 18))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=2**-7)


def test_paste_of_many_rows_is_linear(getkey):
    """The tangent, which computes all rows, equals the pasted masks, which compute only the rows of their boxes."""
    masks, low = jr.uniform(getkey(), (20, 7, 7)), jr.uniform(getkey(), (20, 2), minval=-30, maxval=100)
    boxes = jnp.concatenate([low, low + jr.uniform(getkey(), (20, 2), maxval=90)], axis=1)

    def paste(masks):
        return paste_masks(masks, boxes, image_size=(100, 90))

    pasted, tangent = jax.jit(lambda x: jax.jvp(paste, (x,), (x,)))(masks)
    assert (pasted > 0).any(axis=2).sum(axis=1).max() > 64  # rows per mask
    np.testing.assert_allclose(pasted, tangent, atol=1e-6)


def test_paste_draws_in_the_memory_of_a_result_given_away(getkey):
    masks, boxes = jr.uniform(getkey(), (len(PASTES), 5, 5)), jnp.array(PASTES, jnp.float32)
    last = jnp.full((len(PASTES), 14, 18), 7.0)
    memory = last.unsafe_buffer_pointer()

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def redraw(last, masks, boxes):
        return paste_masks(masks, boxes, image_size=last.shape[1:])

    pasted = redraw(last, masks, boxes)
    assert last.is_deleted() and pasted.unsafe_buffer_pointer() == memory
    np.testing.assert_allclose(pasted, _paste(masks, boxes, (14, 18)), atol=1e-5)


def test_paste_thresholds(getkey):
    masks, boxes = jr.uniform(getkey(), (3, 2, 5, 5)), jnp.array([[2.0, 3, 9, 50], [-4, -4, 20, 9]])

    def above(masks, threshold):
        return paste_masks(masks, boxes, image_size=(60, 18), threshold=threshold)

    thresholds = jnp.array([-0.5, 0.0, 0.6])
    pasted = jax.vmap(lambda x: paste_masks(x, boxes, image_size=(60, 18)))(masks)
    np.testing.assert_array_equal(jax.vmap(above)(masks, thresholds), pasted > thresholds[:, None, None, None])
    gradient = jax.grad(lambda x: jnp.where(above(x, x.mean()), 2.0, 1.0).sum())(masks[0])
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("options", [{"output_size": 0}, {"output_size": (2, -1)}, {"sampling_ratio": -1}])
def test_crop_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        crop_masks(jnp.ones((1, 4, 4)), jnp.zeros((1, 4)), jnp.zeros((1, 4)), **{"output_size": 2, **options})


def test_paste_refuses():
    with pytest.raises(ValueError, match="image_size"):
        paste_masks(jnp.ones((1, 4, 4)), jnp.zeros((1, 4)), image_size=(0, 4))
    with pytest.raises(ValueError, match="masks"):
        paste_masks(jnp.ones((1, 0, 4)), jnp.zeros((1, 4)), image_size=(4, 4))
