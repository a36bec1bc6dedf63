"""RF-DETR: its own results on tiny detectors, stored by tests/parity/make_rf_detr_reference.py, and its parts.

With the package rfdetr installed, `make parity` compares with whole detectors on real images.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, nn, weights, zoo
from detectax_eqx.models import _mask_points, _rf_detr, _rf_detr_seg, _set_loss
from detectax_eqx.weights import load_rf_detr, to_rf_detr

from . import rf_detr_tiny as tiny
from .set_losses import check_padding, compare_losses


DATA = Path(__file__).parent / "data"
NAMES = json.loads((DATA / "rf_detr_names.json").read_text(encoding="utf-8"))


@cache
def stored(kind):
    with np.load(DATA / f"rf_detr_{kind}.npz") as arrays:
        return dict(arrays)


@cache
def made(kind):
    """The tiny detector with the parameters of RF-DETR's."""
    arrays = tiny.random_arrays(kind)
    if kind == "masks":
        arrays["segmentation_head.spatial_features_proj.bias"] = stored(kind)["bias"]
    return load_rf_detr(tiny.build(kind), arrays)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_detections(kind):
    """From the image as decoded: resize, detection, and boxes and masks scaled back."""
    model, detect, expected = made(kind), eqx.filter_jit(models.detect), stored(kind)
    for i, image in enumerate(tiny.images()):
        found = detect(model, image)
        assert np.asarray(found.valid).all()
        np.testing.assert_array_equal(found.labels, expected[f"{i}.labels"])
        np.testing.assert_allclose(found.scores, expected[f"{i}.scores"], atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected[f"{i}.boxes"], atol=1e-3)
        if kind == "masks":
            pasted = model.paste(found.masks, found.frames, image_size=image.shape[:2], threshold=0.5)
            theirs = np.unpackbits(expected[f"{i}.masks"], count=pasted.size).reshape(pasted.shape) > 0
            assert 0.2 < theirs.mean() < 0.8
            ious = (pasted & theirs).sum(axis=(1, 2)) / (pasted | theirs).sum(axis=(1, 2))
            assert ious.min() > 0.999


@pytest.mark.parametrize("canvas", tiny.CANVASES, ids=str)
def test_canvases(canvas):
    """Positions are resized to other canvases, square or not, and cells near the edge of a large map are not used."""
    model, name = made("boxes"), "x".join(map(str, canvas))
    pixels = np.random.default_rng(canvas[0]).normal(size=(3, *canvas)).astype(np.float32)
    raw = replace(model, preprocessing=replace(model.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3))
    size = jnp.array(canvas, jnp.int32)
    predicted = eqx.filter_jit(_rf_detr.predict_queries)(raw, jnp.asarray(pixels.transpose(1, 2, 0)), size)[2]
    np.testing.assert_allclose(predicted.logits[-1, 0], stored("boxes")[f"{name}.logits"], atol=3e-5)
    np.testing.assert_allclose(predicted.boxes_cxcywh[-1, 0], stored("boxes")[f"{name}.boxes"], atol=3e-6)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_losses(kind, monkeypatch):
    """Every loss of a batch with no, one, some, and more objects than queries, and gradients of parts everywhere.

    In double precision: in single, the least certain points of a mask, and so its loss, depend on rounding.
    """
    for module in (_mask_points, _rf_detr_seg):
        monkeypatch.setattr(module, "draw_points", lambda _, count: jnp.asarray(tiny.points(count), jnp.float64))
    with jax.enable_x64(True):
        pixels, boxes, labels, masks, valid = (jnp.asarray(x) for x in tiny.targets())
        frames = jnp.broadcast_to(jnp.array([0, 0, tiny.SIZE, tiny.SIZE], boxes.dtype)[None, None], boxes.shape)
        targets = Targets(boxes.astype(jnp.float64), labels, valid, masks, frames.astype(jnp.float64))
        sizes = jnp.full((len(pixels), 2), tiny.SIZE, jnp.int32)
        compare_losses(made(kind), pixels, sizes, targets, stored(kind), to_rf_detr)


@pytest.mark.parametrize("name, count", [("rf_detr_nano", 30_467_298), ("rf_detr_seg_nano", 33_577_475)])
def test_real_names_shapes_and_counts(name, count):
    """Those of rfdetr, which also counts a token that it does not use."""
    shapes = eqx.filter_eval_shape(zoo.build, name, 91, key=jr.key(0))
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    assert {key: list(x.shape) for key, x in to_rf_detr(blank).items()} == NAMES[name]
    assert models.num_parameters(shapes) == count - 384


def test_weights_round_trip(tmp_path):
    """By names of either library; with fewer groups, the first are taken."""
    model = made("masks")
    arrays = to_rf_detr(model)
    assert eqx.tree_equal(load_rf_detr(tiny.build("masks"), arrays), model)
    weights.save_safetensors(arrays, tmp_path / "theirs.safetensors")
    assert eqx.tree_equal(load_rf_detr(tiny.build("masks"), tmp_path / "theirs.safetensors"), model)
    extra = {"_kp_active_mask": np.zeros((0, 0), bool), "a.mask_token": np.zeros((1, 8), np.float32)}
    assert eqx.tree_equal(load_rf_detr(model, {f"module.{k}": x for k, x in (arrays | extra).items()}), model)

    def one_group(tree):
        first = jax.tree.map(lambda x: x[:1], (tree.first_stage, tree.queries))
        return eqx.tree_at(lambda t: (t.first_stage, t.queries), tree, first)

    one = load_rf_detr(eqx.filter_eval_shape(one_group, model), arrays)
    image = tiny.images()[0]
    detect = eqx.filter_jit(models.detect)
    assert eqx.tree_equal(detect(one, image), detect(model, image))


def test_weights_that_do_not_fit():
    arrays = to_rf_detr(made("boxes"))
    shapes = tiny.build("boxes")
    for name, changed, message in (
        ("class_embed.bias", np.zeros(7, np.float32), r"class_embed\.bias is float32 \(7,\)|class_logits\.bias"),
        ("query_feat.weight", arrays["query_feat.weight"][:-1], r"59"),
        ("refpoint_embed.weight", np.float32(0), r"refpoint_embed|queries"),
        ("transformer.decoder.norm.bias", np.full(tiny.WIDTH, np.nan, np.float32), r"decoder\.norm\.bias"),
        ("segmentation_head.bias", np.zeros(1, np.float32), r"segmentation_head\.bias"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            load_rf_detr(shapes, arrays | {name: changed})
    missing = {name: array for name, array in arrays.items() if ".query." not in name}
    with pytest.raises(weights.WeightsError, match=r"unused .*attention\.attention\.key"):
        load_rf_detr(shapes, missing)
    with pytest.raises(weights.WeightsError, match="RF-DETR"):
        models_of_other = eqx.filter_eval_shape(zoo.build, "faster_rcnn_resnet18_fpn", 3, key=jr.key(0))
        weights.load_torchvision(models_of_other, arrays)


def test_windows():
    """A token attends to its own window, and in the global blocks to all of them."""
    body = nn.WindowedViT(8, 2, key=jr.key(0), patch_size=2, side=4, windows=2, taps=(1, 2))
    image = jr.normal(jr.key(1), (3, 8, 8))
    changed = image.at[:, 7, 7].add(1.0)  # in the last of four windows
    first, second = (np.abs(a - b).max(axis=0) > 1e-6 for a, b in zip(body(image), body(changed), strict=True))
    assert first[2:, 2:].all() and not first[:2].any() and not first[:, :2].any()
    assert second.all()
    with pytest.raises(ValueError, match="multiple of 4 in height and width, got 8×10"):
        nn.ProjectedViT(body, key=jr.key(2), channels=8)(jnp.zeros((3, 8, 10)))
    for doublings in ((), (2,), (0, -2)):
        with pytest.raises(ValueError, match="doublings must be -1, 0 or 1 for each level"):
            nn.ProjectedViT(body, key=jr.key(2), channels=8, doublings=doublings)
    for taps in ((), (2, 1), (0, 1)):
        with pytest.raises(ValueError, match="taps must be increasing"):
            nn.WindowedViT(8, 2, key=jr.key(0), patch_size=2, side=4, windows=2, taps=taps)


def test_groups_do_not_see_each_other():
    """The predictions of a group do not depend on the parameters of another."""
    model, size = made("boxes"), jnp.array([tiny.SIZE, tiny.SIZE], jnp.int32)
    image = jnp.asarray(tiny.targets()[0][0])
    predict = eqx.filter_jit(lambda model: _rf_detr.predict_queries(model, image, size, groups=3)[1:])
    before = predict(model)
    other = eqx.tree_at(lambda m: m.queries.features, model, model.queries.features.at[1].add(1.0))
    chosen, decoded = (
        jax.tree.map(lambda a, b: np.abs(a - b).max(), x, y) for x, y in zip(before, predict(other), strict=True)
    )
    assert chosen.logits == 0 and decoded.logits > 0.1
    change = np.abs(before[1].logits - predict(other)[1].logits).max(axis=(0, 2, 3))
    assert change[0] == 0 and change[1] > 0.1 and change[2] == 0


def test_fewer_cells_than_queries():
    """The queries without a cell have the boxes of their own, whose sides count as 0 where they are negative."""
    size, image = tiny.SIZE // 2, tiny.images()[0]
    model = replace(made("boxes"), preprocessing=models.Preprocessing(models.Square(size)))
    pixels = jnp.asarray(tiny.small_targets()[0][0])
    _, chosen, decoded = eqx.filter_jit(_rf_detr.predict_queries)(model, pixels, jnp.array([size, size], jnp.int32))
    assert chosen.logits.shape == (1, 16, tiny.CLASSES) and decoded.logits.shape[2] == tiny.QUERIES
    assert (decoded.boxes_cxcywh[..., 2:] < 0).any()
    expected = {name.removeprefix("small."): x for name, x in stored("boxes").items() if name.startswith("small.")}
    found = eqx.filter_jit(models.detect)(model, image)
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    np.testing.assert_array_equal(found.labels, expected["labels"])
    np.testing.assert_allclose(found.scores, expected["scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected["boxes"], atol=1e-3)
    with jax.enable_x64(True):
        pixels, boxes, labels, _, valid = (jnp.asarray(x) for x in tiny.small_targets())
        targets = Targets(boxes.astype(jnp.float64), labels, valid)
        sizes = jnp.full((len(pixels), 2), size, jnp.int32)
        one_group = load_rf_detr(tiny.build("boxes", groups=1), tiny.random_arrays("boxes"))
        compare_losses(one_group, pixels, sizes, targets, expected, to_rf_detr)


def test_padding_of_targets():
    pixels, boxes, labels, _, _ = tiny.targets()
    check_padding(made("boxes"), pixels[2], jnp.array([tiny.SIZE, tiny.SIZE], jnp.int32), boxes[2], labels[2])


def test_matching_is_optimal():
    """Against all assignments, for sets of different sizes in one call."""
    draw = np.random.default_rng(0)
    costs = [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((3, 3, 5), (2, 3, 2))]
    valid = np.array([True, False, True])
    targets = Targets(np.zeros((3, 4), np.float32), np.zeros(3, np.int32), valid)
    matched = _set_loss.match_sets(costs, targets)
    for cost, rows in zip(costs, matched, strict=True):
        assert (np.asarray(rows)[:, 1] == -1).all()
        for one, (a, _, b) in zip(np.asarray(cost), np.asarray(rows), strict=True):
            best = min(one[0, i] + one[2, j] for i in range(one.shape[1]) for j in range(one.shape[1]) if i != j)
            assert a != b and one[0, a] + one[2, b] == pytest.approx(best, rel=1e-6)
    few = _set_loss.match_sets([costs[1][:, :, :1]], targets)[0]
    assert (np.sort(np.asarray(few), axis=1) == [[-1, -1, 0]] * 2).all()  # one query for two targets


def test_points_of_masks():
    """A hand-computed table: masks in the frame of their box, and points inside, outside and on the edge."""
    masks = jnp.array([[[0, 255], [255, 0]]], jnp.uint8)
    targets = Targets(
        jnp.array([[2.0, 2.0, 6.0, 6.0]]),
        jnp.zeros(1, jnp.int32),
        jnp.ones(1, bool),
        masks,
        jnp.array([[2.0, 2.0, 6.0, 6.0]]),
    )
    points = jnp.array([[[3.0, 3.0], [5.0, 3.0], [3.0, 5.0], [5.9, 5.9], [1.0, 3.0], [5.0, 6.5]]]) / 8
    values = [0, 1, 1, 0, 0, 0]
    assert _mask_points.targets_at(targets, points, (8, 8))[0].tolist() == values
    for other in (masks > 0, (masks > 0).astype(jnp.float32)):
        same = eqx.tree_at(lambda t: t.masks, targets, other)
        assert _mask_points.targets_at(same, points, (8, 8))[0].tolist() == values
    with pytest.raises(ValueError, match="targets have no masks"):
        _mask_points.targets_at(replace(targets, masks=None), points, (8, 8))


def test_uncertain_points():
    """Most points lie where the logits change their sign."""
    columns = jnp.arange(32.0)
    logits = jnp.broadcast_to(columns[None] - 15.5, (32, 32))
    points = _mask_points.uncertain_points(logits, 40, key=jr.key(0))
    distance = np.sort(np.abs(np.asarray(points)[:, 0] - 0.5))
    assert points.shape == (40, 2) and distance[:30].max() < 0.18 and distance.max() > 0.3
    assert not eqx.tree_equal(points, _mask_points.uncertain_points(logits, 40, key=jr.key(1)))
