"""Deformable DETR: Hugging Face's results on tiny detectors, stored by tests/parity/make_detr_reference.py; its parts.

With torch and transformers installed, `make parity` compares with whole detectors on real images.
"""

import json
import math
import re
from functools import cache, partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, nn, weights, zoo
from detectax_eqx.models import _deformable_queries, _maps, _set_loss
from detectax_eqx.weights import load_detr, read_detr, to_detr

from . import detr_tiny as tiny, tiny_detector
from .set_losses import check_files_in_the_zoo, check_padding, compare_losses
from .test_detr import hugging_face


DATA = Path(__file__).parent / "data"
SLOW = pytest.param("deformable_detr", marks=pytest.mark.slow)  # the simplest of them
KINDS = pytest.mark.parametrize("kind", [SLOW, "deformable_detr_refine", "deformable_detr_two_stage"])


@cache
def stored(kind):
    with np.load(DATA / f"{kind}.npz") as arrays:
        return dict(arrays)


@cache
def made(kind):
    """The tiny detector with the parameters of Hugging Face's."""
    adjusted = {key.removeprefix("adjusted."): x for key, x in stored(kind).items() if key.startswith("adjusted.")}
    return load_detr(tiny.build(kind), tiny.random_arrays(adjusted, kind))


@KINDS
@pytest.mark.parametrize("place, canvas", [("alone", None), ("padded", tiny.CANVAS)], ids=["alone", "padded"])
def test_detections(kind, place, canvas):
    """From the image as decoded: resize, detection, and boxes scaled back, without and with padding."""
    model, expected = made(kind), stored(kind)
    detect = eqx.filter_jit(lambda model, image: models.detect(model, image, canvas=canvas))
    for i, image in enumerate(tiny.images()):
        found = detect(model, image)
        assert np.asarray(found.valid).all()
        labels, scores, boxes = (expected[f"{i}.{place}.{name}"] for name in ("labels", "scores", "boxes"))
        order = np.arange(len(labels))
        for k in np.flatnonzero(scores[:-1] - scores[1:] < 1e-5):  # two that rounding may exchange
            if labels[k] != found.labels[k]:
                order[[k, k + 1]] = order[[k + 1, k]]
        np.testing.assert_array_equal(found.labels, labels[order])
        np.testing.assert_allclose(found.scores, scores[order], atol=1e-4)
        np.testing.assert_allclose(found.boxes, boxes[order], atol=1e-2)
        assert set(found.labels.tolist()) == set(range(tiny.CLASSES))
        assert np.ptp(np.asarray(found.boxes), axis=0).min() > 5


@KINDS
def test_losses(kind):
    """Every loss of a batch with no, one, some, and more objects than queries, and gradients of parts everywhere."""
    with jax.enable_x64(True):
        pixels, boxes, labels, valid = (jnp.asarray(x) for x in tiny.targets())
        targets, sizes = Targets(boxes.astype(jnp.float64), labels, valid), jnp.array(tiny.SIZES, jnp.int32)
        compare_losses(made(kind), pixels, sizes, targets, stored(kind), lambda grads: read_detr(to_detr(grads)))


def named(arrays, *, former):
    """Arrays under Hugging Face's names: the former ones, which the hub has, or those of transformers 5.24."""
    result = {}
    for name, array in arrays.items():
        new = name
        for pattern, replacement in (
            (r"^input_proj\.", "model.input_proj."),
            (r"^transformer\.(level_embed|reference_points|enc_output|pos_trans)", r"model.\1"),
            (r"\.cross_attn\.", ".encoder_attn."),
            (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
            (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
        ):
            new = re.sub(pattern, replacement, new)
        result[new] = array
    return hugging_face(result, former=former)


def repeated(arrays):
    """The same with the predictions of the first layer under the names of six layers."""
    predictions = {name: x for name, x in arrays.items() if name.startswith(("class_embed.0.", "bbox_embed.0."))}
    return arrays | {name.replace(".0.", f".{i}.", 1): x for i in range(1, 6) for name, x in predictions.items()}


def in_decoder(arrays, *parts):
    """Predictions under the names that they have in the decoder."""
    return {f"transformer.decoder.{name}": x for name, x in arrays.items() if name.startswith(parts)}


@pytest.mark.parametrize("name, count", [("", 40_069_665), ("_refine", 40_849_660), ("_two_stage", 41_181_529)])
def test_real_names_shapes_and_counts(name, count):
    """Those of Hugging Face."""
    shapes = eqx.filter_eval_shape(zoo.build, f"deformable_detr{name}_resnet50", 91, key=jr.key(0))
    assert models.num_parameters(shapes) == count
    blank = to_detr(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes))
    two_stage = name == "_two_stage"
    blank |= in_decoder(blank, "class_embed", "bbox_embed") if two_stage else {}
    theirs = named(blank if name else repeated(blank), former=False)
    file = DATA / f"deformable_detr{name if two_stage else ''}_names.json"
    expected = json.loads(file.read_text(encoding="utf-8"))
    assert {key: list(x.shape) for key, x in theirs.items()} == expected


@KINDS
def test_weights_round_trip(kind, tmp_path):
    """By names of the authors and by both of Hugging Face's, with what files hold twice, and from files in the zoo."""
    model, shapes = made(kind), tiny.build(kind)
    arrays = to_detr(model)
    refined, parts = kind != "deformable_detr", ("class_embed", "bbox_embed")
    twice = arrays if refined else repeated(arrays)
    copies = in_decoder(arrays, *parts[1 - kind.endswith("two_stage") :]) if refined else {}
    assert len(copies) == {"deformable_detr": 0, "deformable_detr_refine": 12, "deformable_detr_two_stage": 24}[kind]
    assert eqx.tree_equal(load_detr(shapes, twice | copies), model)
    assert eqx.tree_equal(load_detr(shapes, copies | twice), model)
    for former in (False, True):
        assert eqx.tree_equal(load_detr(shapes, named(twice | copies, former=former)), model)
    weights.save_safetensors(named(arrays, former=True), tmp_path / "model.safetensors")
    assert eqx.tree_equal(load_detr(shapes, tmp_path / "model.safetensors"), model)
    assert weights.describe(arrays) == "a Deformable DETR on a ResNet of 1-1-1-1 blocks of width 4 with 5 outputs"


def test_weights_that_do_not_fit():
    """Predictions that differ where a detector has one are not dropped, nor are copies that differ."""
    kind = "deformable_detr"
    arrays, shapes = to_detr(made(kind)), tiny.build(kind)
    other = arrays["class_embed.0.bias"] + 1
    for changed, message in (
        ({"class_embed.1.bias": other}, r"class_embed\.1\.bias"),
        ({"transformer.decoder.class_embed.0.bias": other}, r"transformer\.decoder\.class_embed\.0\.bias"),
        ({"transformer.level_embed": np.zeros((3, 32), np.float32)}, r"levels is .*\(3, 32\)"),
        ({"transformer.enc_output.weight": np.zeros((32, 32), np.float32)}, r"enc_output"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            load_detr(shapes, arrays | changed)


@KINDS
def test_files_in_the_zoo(kind, tmp_path):
    parts = {"layers": 2, "queries": 2, "hidden_size": 8}
    check_files_in_the_zoo(f"{kind}_resnet50", partial(named, former=True), tmp_path, **parts)


def test_proposals_of_cells():
    """Boxes of a twentieth of the image around the cells that it fills, twice as large on the next map."""
    levels = [jnp.zeros((4, 4, 4)), jnp.zeros((4, 2, 2))]
    placed = _maps.place(levels, (32, 32), jnp.array([16, 24], jnp.int32), jnp.zeros((2, 4)))
    boxes, used = placed.proposals()
    np.testing.assert_array_equal(used, [1, 1, 1, 0, 1, 1, 1, 0, *[0] * 8, 1, 1, 0, 0])
    np.testing.assert_allclose(boxes[6], [2.5 / 3, 0.75, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(boxes[17], [0.75, 0.5, 0.1, 0.1], rtol=1e-6)
    wide = _maps.place([jnp.zeros((4, 1, 64))], (8, 512), jnp.array([8, 512], jnp.int32), jnp.zeros((1, 4)))
    assert np.flatnonzero(~wide.proposals()[1]).tolist() == [0, 63]  # nearer than a hundredth to the border


def test_queries_of_few_cells():
    """There are as many queries as cells; without the second stage's refinement there is no first."""
    stage = _deformable_queries.CellQueries(8, 3, 10, key=jr.key(0))
    placed = _maps.place([jr.normal(jr.key(1), (8, 2, 3))], (16, 24), jnp.array([16, 24], jnp.int32), jnp.zeros((1, 8)))
    start = stage(placed, placed.cells)
    assert (start.positions.shape, start.features.shape, start.boxes.shape) == ((6, 8), (6, 8), (6, 4))
    backbone = nn.ProjectedLevels(nn.resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    with pytest.raises(ValueError, match="two_stage needs refine=True"):
        models.deformable_detr(backbone, 3, key=jr.key(0), two_stage=True)


def test_boxes_move_by_their_logits():
    """Against plain Python, near the borders too; the logits of a point's sides are the deltas."""
    draw = np.random.default_rng(0)
    boxes, deltas = draw.uniform(size=(5, 4)), draw.normal(size=(5, 4))
    boxes[0] = (0, 1, 1e-7, 0.5)
    for references in (boxes, boxes[:, :2]):
        found = _deformable_queries.move_boxes(jnp.asarray(references, jnp.float32), jnp.asarray(deltas, jnp.float32))
        for i, row in enumerate(np.asarray(found)):
            for k, value in enumerate(row):
                logit = deltas[i, k]
                if k < references.shape[1]:
                    x = references[i, k]
                    logit += math.log(max(x, 1e-5) / max(1 - x, 1e-5))
                assert math.isclose(value, 1 / (1 + math.exp(-logit)), rel_tol=1e-4)


def test_places_of_cells():
    """A hand-computed table: an image of 2 × 3 of 4 × 4 cells of a map, and of 1 × 2 of 2 × 2 cells of the next."""
    maps = [jnp.arange(32.0).reshape(2, 4, 4), jnp.arange(8.0).reshape(2, 2, 2)]
    levels = [jnp.concatenate([x, x]) for x in maps]  # 4 channels
    placed = _maps.place(levels, (32, 32), jnp.array([16, 24], jnp.int32), jnp.zeros((2, 4)))
    assert [mask.sum() for mask in placed.valid] == [6, 2]
    np.testing.assert_allclose(placed.shares, [[0.75, 0.5], [1.0, 0.5]])
    # The middle of a cell relative to the image, times the image's share of each map.
    for cell, (x, y) in {0: (0.5 / 3, 0.25), 6: (2.5 / 3, 0.75), 16: (0.25, 0.5), 17: (0.75, 0.5)}.items():
        np.testing.assert_allclose(placed.references[cell], [[x * 0.75, y * 0.5], [x, y * 0.5]], rtol=1e-6)
    for x, other in zip(levels, placed.split(placed.cells), strict=True):
        np.testing.assert_array_equal(x, other)
    expected = nn.sine_positions((4, 4), 4, size=jnp.array([2, 3], jnp.int32), centred=True)
    np.testing.assert_allclose(placed.positions[:16], expected.reshape(4, 16).T)
    np.testing.assert_allclose(expected[0, 1, 0], math.sin(2 * math.pi * 1.5 / 2), atol=1e-5)


def test_padding_is_not_attended_to():
    """Cells of the padding change nothing, whatever is in them; those of the image do."""
    keys = jr.split(jr.key(0), 4)
    layer = nn.DeformableAttention(8, 2, key=keys[0], levels=2, points=3)
    queries, references = jr.normal(keys[1], (5, 8)), jr.uniform(keys[2], (5, 1, 2))
    maps = [jr.normal(keys[3], (8, 4, 6)), jr.normal(keys[3], (8, 2, 3))]
    valid = [jnp.arange(6)[None] < jnp.array([4, 4, 0, 0])[:, None], jnp.arange(3)[None] < jnp.array([2, 0])[:, None]]
    attend = eqx.filter_jit(lambda maps, valid: layer(queries, references, maps, valid))
    other = [jnp.where(mask[None], x, 1e4) for x, mask in zip(maps, valid, strict=True)]
    np.testing.assert_array_equal(attend(maps, valid), attend(other, valid))
    assert np.abs(attend(maps, valid) - attend(maps, None)).max() > 1e-3


def test_loss_of_classes():
    """Against a loop: matched queries have their target's class, all other pairs are negative."""
    draw = np.random.default_rng(0)
    logits, queries, labels = draw.normal(size=(6, 4)), [3, -1, 0], [2, 0, 1]
    expected = 0.0
    for i, row in enumerate(logits):
        for k, x in enumerate(row):
            p = 1 / (1 + math.exp(-x))
            positive = {3: 2, 0: 1}.get(i) == k
            expected += -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)
    arrays = jnp.asarray(logits, jnp.float32), jnp.array(queries, jnp.int32), jnp.array(labels, jnp.int32)
    np.testing.assert_allclose(_set_loss.binary_focal_loss(*arrays, jnp.zeros(3)), expected, rtol=1e-6)


@KINDS
def test_padding_of_targets(kind):
    pixels, boxes, labels, _ = tiny.targets()
    check_padding(made(kind), pixels[2], jnp.array(tiny.CANVAS, jnp.int32), boxes[2], labels[2])


def test_backbone():
    """Sides are rounded up; further maps are of the ResNet's last map, and of the one before."""

    def make(levels):
        body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=jr.key(0), width=4)
        return nn.ProjectedLevels(body, key=jr.key(1), channels=8, levels=levels)

    backbone = tiny_detector.random_arrays(eqx.filter_eval_shape(make, 5))
    image = np.random.default_rng(0).normal(size=(3, 140, 70)).astype(np.float32)
    maps, features = eqx.filter_jit(lambda x: (backbone(x), backbone.body(x)))(image)
    assert [x.shape[1:] for x in maps] == [(18, 9), (9, 5), (5, 3), (3, 2), (2, 1)]
    assert backbone.strides == (8, 16, 32, 64, 128) and backbone.divisor == 1
    for i, source in enumerate((*features[1:], features[-1], maps[3])):
        expected = backbone.norms[i](backbone.projections[i](source))
        np.testing.assert_allclose(maps[i], expected, atol=1e-4, err_msg=str(i))
    with pytest.raises(ValueError, match="levels must be 3 or more, got 2"):
        make(2)
