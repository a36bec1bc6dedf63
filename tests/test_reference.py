"""torchvision's own results, stored by tests/parity/make_reference.py. Indices are exact, the rest is within 1e-5.

`make parity` compares with torchvision itself on many more inputs.
"""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import ops


@cache
def _stored():
    with np.load(Path(__file__).parent / "data" / "torchvision_ops.npz") as arrays:
        return dict(arrays)


def _group(name):
    """The arrays `name.*` as a function of what follows the dot."""
    return lambda key: _stored()[f"{name}.{key}"]


def _jitted(op, **options):
    """`op` compiled as one program instead of one per operation."""
    return jax.jit(partial(op, **options))


def _check(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["iou", "giou", "diou", "ciou"])
def test_pairwise(name):
    stored = _group("overlaps")
    _check(_jitted(getattr(ops, f"pairwise_{name}"))(stored("a"), stored("b")), stored(name))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms(threshold):
    stored = _group("suppression")
    boxes, scores, expected = jnp.asarray(stored("boxes")), jnp.asarray(stored("tied")), stored(f"nms.{threshold}")
    keep = ops.nms(boxes, scores, iou_threshold=threshold)
    assert np.flatnonzero(keep).tolist() == sorted(expected.tolist())
    indices, valid = ops.nms_indices(boxes, scores, iou_threshold=threshold, max_outputs=len(boxes))
    assert np.asarray(indices)[np.asarray(valid)].tolist() == expected.tolist()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_class_aware_nms(threshold):
    stored = _group("suppression")
    boxes, scores, labels = (jnp.asarray(stored(name)) for name in ("boxes", "scores", "labels"))
    expected = stored(f"batched.{threshold}").tolist()
    keep = ops.class_aware_nms(boxes, scores, labels.astype(jnp.int32), iou_threshold=threshold)
    assert np.flatnonzero(keep).tolist() == sorted(expected)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align(aligned, sampling_ratio):
    stored = _group("pooling")
    options = {"output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": sampling_ratio, "aligned": aligned}
    ours = _jitted(ops.roi_align, **options)(stored("features"), stored("boxes"))
    _check(ours, stored(f"{aligned}.{sampling_ratio}"))


def test_multilevel_roi_align():
    stored = _group("pyramid_pooling")
    align = _jitted(ops.multilevel_roi_align, output_size=3, strides=(4, 8, 16, 32), aligned=False, canonical_size=56)
    ours = align([stored(f"features.{i}") for i in range(4)], stored("boxes"))
    _check(ours, stored("pooled"))


@pytest.mark.parametrize("name, weights", [("rpn", (1, 1, 1, 1)), ("box", (10, 10, 5, 5))])
def test_coders(name, weights):
    stored = _group("coding")
    encode, decode = _jitted(ops.encode_boxes, weights=weights), _jitted(ops.decode_boxes, weights=weights)
    _check(encode(stored("boxes"), stored("anchors")), stored(f"encoded.{name}"))
    _check(decode(stored("deltas"), stored("anchors")), stored(f"decoded.{name}"))


@pytest.mark.parametrize("level", range(5))
def test_anchor_grid(level):
    stored = _group("anchors")
    height, width = stored(f"size.{level}").tolist()
    # As in torchvision, the stride is the canvas's size over the map's: 61 and 64 on the last level.
    stride = 800 // height, 1088 // width
    ours = ops.anchor_grid((height, width), stride=stride, sizes=(2.0 ** (5 + level),), aspect_ratios=(0.5, 1.0, 2.0))
    ours = np.asarray(ours)
    np.testing.assert_array_equal(ours[::997], stored(f"samples.{level}"))
    whole = ours.astype(np.int64)
    sums = np.stack([whole.sum(axis=0), (whole * np.arange(len(whole))[:, None]).sum(axis=0)])
    np.testing.assert_array_equal(sums, stored(f"sums.{level}"))
    assert (whole == ours).all()


@pytest.mark.parametrize("high, low, allow_low_quality", [(0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False)])
def test_match_boxes(high, low, allow_low_quality):
    stored = _group("matching")
    indices, positive, negative = ops.match_boxes(
        jnp.asarray(stored("quality")), low_threshold=low, high_threshold=high, allow_low_quality=allow_low_quality
    )
    below, between = -1, -2
    ours = np.where(positive, indices, np.where(negative, below, between))
    expected = stored(f"{high}.{low}.{allow_low_quality}")
    assert {below, *range(5)} <= set(expected.tolist())
    np.testing.assert_array_equal(ours, expected)


def test_paste_masks():
    stored = _group("masks")
    expected = stored("pasted")
    paste = _jitted(ops.paste_masks, image_size=expected.shape[1:])
    _check(paste(stored("small"), stored("boxes")), expected)


def test_crop_masks():
    stored = _group("masks")
    whole, rois = stored("whole")[stored("matched")], stored("rois")
    frames = np.tile(np.array([0, 0, whole.shape[2], whole.shape[1]], np.float32), (len(rois), 1))
    _check(_jitted(ops.crop_masks, output_size=6)(whole, frames, rois), stored("cropped"))


@pytest.mark.parametrize("name", ["giou", "diou", "ciou"])
def test_box_losses(name):
    stored = _group("losses")
    _check(_jitted(getattr(ops, f"{name}_loss"))(stored("a"), stored("b")), stored(name))


@pytest.mark.parametrize(
    "name, loss, options",
    [
        ("focal", ops.sigmoid_focal_loss, {}),
        ("focal_unweighted", ops.sigmoid_focal_loss, {"alpha": None, "gamma": 1.5}),
        ("smooth_l1", ops.smooth_l1_loss, {"beta": 1 / 9}),
    ],
)
def test_losses(name, loss, options):
    stored = _group("losses")
    _check(_jitted(loss, **options)(stored("logits"), stored("targets")), stored(name))
