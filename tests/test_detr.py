"""DETR: Hugging Face's results on a tiny detector, stored by tests/parity/make_detr_reference.py, and its parts.

With torch and transformers installed, `make parity` compares with a whole detector on real images.
"""

import json
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
from detectax_eqx.models import _maps, _queries, _set_loss
from detectax_eqx.weights import load_detr, read_detr, to_detr

from . import detr_tiny as tiny, tiny_detector
from .set_losses import check_files_in_the_zoo, check_padding, compare_losses


DATA = Path(__file__).parent / "data"
NAMES = json.loads((DATA / "detr_names.json").read_text(encoding="utf-8"))


@cache
def stored():
    with np.load(DATA / "detr.npz") as arrays:
        return dict(arrays)


@cache
def made():
    """The tiny detector with the parameters of Hugging Face's."""
    adjusted = {key.removeprefix("adjusted."): x for key, x in stored().items() if key.startswith("adjusted.")}
    return load_detr(tiny.build(), tiny.random_arrays(adjusted))


@pytest.mark.parametrize("kind, canvas", [("alone", None), ("padded", tiny.CANVAS)])
def test_detections(kind, canvas):
    """From the image as decoded: resize, detection, and boxes scaled back, without and with padding."""
    model, expected = made(), stored()
    detect = eqx.filter_jit(lambda model, image: models.detect(model, image, canvas=canvas))
    classes = set()
    for i, image in enumerate(tiny.images()):
        found = detect(model, image)
        assert np.asarray(found.valid).all()
        np.testing.assert_array_equal(found.labels, expected[f"{i}.{kind}.labels"])
        np.testing.assert_allclose(found.scores, expected[f"{i}.{kind}.scores"], atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected[f"{i}.{kind}.boxes"], atol=1e-2)
        classes |= set(found.labels.tolist())
        assert np.ptp(np.asarray(found.boxes), axis=0).min() > 5
    assert len(classes) > 2


def test_losses():
    """Every loss of a batch with no, one, some, and more objects than queries, and gradients of parts everywhere."""
    with jax.enable_x64(True):
        pixels, boxes, labels, valid = (jnp.asarray(x) for x in tiny.targets())
        targets, sizes = Targets(boxes.astype(jnp.float64), labels, valid), jnp.array(tiny.SIZES, jnp.int32)
        compare_losses(made(), pixels, sizes, targets, stored(), lambda grads: read_detr(to_detr(grads)))


def hugging_face(arrays, *, former):
    """Arrays under Hugging Face's names: the former ones, which the hub has, or those of transformers 5.24."""
    result = {}
    for name, array in arrays.items():
        new = name
        for pattern, replacement in (
            (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model." if former else "model.backbone.model."),
            (r"^input_proj\.", "model.input_projection."),
            (r"^query_embed\.", "model.query_position_embeddings."),
            (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
            (r"^transformer\.", "model."),
            (r"^class_embed\.(?!\d)", "class_labels_classifier."),
            (r"^bbox_embed\.(?!\d)", "bbox_predictor."),
            (r"\.multihead_attn\.", ".encoder_attn."),
            (r"\.out_proj\.", ".out_proj." if former else ".o_proj."),
            (r"\.linear([12])\.", r".fc\1." if former else r".mlp.fc\1."),
            (r"\.norm1\.", ".self_attn_layer_norm."),
            (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
            (r"\.norm2\.", ".encoder_attn_layer_norm."),
            (r"\.norm3\.", ".final_layer_norm."),
        ):
            new = re.sub(pattern, replacement, new)
        if match := re.fullmatch(r"(.*)in_proj_(weight|bias)", new):
            parts = np.split(array, 3)
            result |= {f"{match[1]}{part}_proj.{match[2]}": x for part, x in zip("qkv", parts, strict=True)}
        else:
            result[new] = array
    return result


@pytest.mark.parametrize("name, count", [("detr_resnet50", 41_524_768), ("detr_resnet101", 60_464_672)])
def test_real_names_shapes_and_counts(name, count):
    """Those of Hugging Face, and the parameters that DETR's authors count."""
    shapes = eqx.filter_eval_shape(zoo.build, name, 91, key=jr.key(0))
    assert models.num_parameters(shapes) == count
    if name == "detr_resnet50":
        blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
        theirs = hugging_face(to_detr(blank), former=False)
        assert {key: list(x.shape) for key, x in theirs.items()} == NAMES


def test_weights_round_trip(tmp_path):
    """By names of DETR's authors and by both of Hugging Face's, and from files in the zoo."""
    model = made()
    arrays = to_detr(model)
    assert eqx.tree_equal(load_detr(tiny.build(), arrays), model)
    assert eqx.tree_equal(load_detr(tiny.build(), {f"module.{name}": x for name, x in arrays.items()}), model)
    counters = {"model.backbone.conv_encoder.model.bn1.num_batches_tracked": np.array(3)}
    for former in (False, True):
        theirs = hugging_face(arrays, former=former) | counters
        assert eqx.tree_equal(load_detr(tiny.build(), theirs), model)
    weights.save_safetensors(hugging_face(arrays, former=True), tmp_path / "model.safetensors")
    assert eqx.tree_equal(load_detr(tiny.build(), tmp_path / "model.safetensors"), model)
    assert weights.describe(arrays) == "a DETR on a ResNet of 1-1-1-1 blocks of width 4 with 6 outputs"


def test_weights_that_do_not_fit():
    arrays, shapes = to_detr(made()), tiny.build()
    for name, changed, message in (
        ("class_embed.bias", np.zeros(7, np.float32), r"class_logits\.bias"),
        ("query_embed.weight", np.full((20, 32), np.nan, np.float32), r"query_embed\.weight"),
        ("transformer.decoder.layers.0.self_attn.in_proj_bias", np.float32(0), "self_attention"),
        ("mask_head.lay1.weight", np.zeros(1, np.float32), r"mask_head\.lay1"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            load_detr(shapes, arrays | {name: changed})
    theirs = hugging_face(arrays, former=True)
    del theirs["model.decoder.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(weights.WeightsError, match=r"self_attn\.k_proj\.weight"):
        load_detr(shapes, theirs)


def test_files_in_the_zoo(tmp_path):
    check_files_in_the_zoo(
        "detr_resnet50", partial(hugging_face, former=True), tmp_path, layers=1, queries=2, hidden_size=8
    )


def test_sizes_after_the_resize():
    """Hugging Face's rule in plain Python, for images that the longest side limits and others."""

    def expected(height, width, short=80, long=133):
        low, high = min(height, width), max(height, width)
        exact = long * low / high if high / low * short > long else short
        rounded = round(exact)
        if rounded == low:
            return height, width
        other = int(exact * high / low)
        return (rounded, other) if height <= width else (other, rounded)

    rule = models.ShortestEdge(80, 133, rounded_short=True)
    table = rule.table((150, 170), canvas=(170, 170))
    wanted = np.array([[expected(h, w) for w in range(1, 171)] for h in range(1, 151)])
    fits = (wanted <= 170).all(axis=2)
    np.testing.assert_array_equal(table[fits], np.maximum(wanted, 1)[fits])
    assert rule((150, 60)) == tuple(table[149, 59]) == expected(150, 60)
    small = rule.table((60, 60), canvas=(64, 96))
    assert (small <= np.array([64, 96])).all() and (small == np.array([64, 96])).any(axis=2).mean() > 0.5
    assert rule((17, 50), canvas=(64, 96)) == tuple(small[16, 49])
    with pytest.raises(ValueError, match="exclude each other"):
        models.ShortestEdge(rounded=True, rounded_short=True)


def test_cells_of_an_image():
    """A hand-computed table: cells of 32 pixels, whose first pixel is in the image or not; and 65 pixels in 3 cells."""
    for canvas, size, grid, expected in (
        ((96, 64), (96, 64), (3, 2), (3, 2)),
        ((96, 64), (65, 32), (3, 2), (3, 1)),
        ((96, 64), (64, 33), (3, 2), (2, 2)),
        ((65, 64), (43, 1), (3, 2), (2, 1)),  # first pixels are 0, 21 and 43
        ((65, 64), (44, 1), (3, 2), (3, 1)),
    ):
        valid, found = _maps.cells_of(canvas, jnp.array(size, jnp.int32), grid)
        assert tuple(found.tolist()) == expected
        assert valid[: expected[0], : expected[1]].all() and valid.sum() == expected[0] * expected[1]


def test_padding_is_not_attended_to():
    """Cells of the padding change nothing, whatever is in them; those of the image do."""
    keys = jr.split(jr.key(0), 3)
    layer = nn.QueryAttention(8, 2, key=keys[0])
    queries, cells = jr.normal(keys[1], (3, 8)), jr.normal(keys[2], (5, 8))
    valid = jnp.array([True, True, False, True, False])
    attend = eqx.filter_jit(lambda cells, valid: layer(queries, cells, cells, valid))
    found = attend(cells, valid)
    np.testing.assert_allclose(found, layer(queries, cells[valid], cells[valid]), atol=1e-6)
    np.testing.assert_array_equal(found, attend(jnp.where(valid[:, None], cells, 1e4), valid))
    assert np.abs(found - attend(cells, jnp.ones(5, bool))).max() > 1e-3


def test_loss_of_classes():
    """Against a loop: matched queries have their target's class, the others the last, with its weight."""
    draw = np.random.default_rng(0)
    logits, queries, labels = draw.normal(size=(6, 4)), [3, -1, 0], [2, 0, 1]
    expected = 0.0
    for i, row in enumerate(logits):
        target = {3: 2, 0: 1}.get(i, 3)
        expected += (0.1 if target == 3 else 1.0) * (np.log(np.exp(row).sum()) - row[target])
    arrays = jnp.asarray(logits, jnp.float32), jnp.array(queries, jnp.int32), jnp.array(labels, jnp.int32)
    found = _set_loss.no_object_loss(*arrays, jnp.zeros(3), no_object=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_best_queries():
    """Each query once, with its most probable class but the last; all of them if there are fewer than wanted."""
    logits = jnp.array([[1.0, 2.0, 9.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scores, queries, labels = _queries.best_queries(logits, 10)
    assert queries.tolist() == [1, 2, 3, 0] and labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(scores, np.exp([3, 3, 1, 2]) / np.exp(np.asarray(logits)[queries]).sum(axis=1))
    assert _queries.best_queries(logits, 2)[1].tolist() == [1, 2]


def test_padding_of_targets():
    pixels, boxes, labels, _ = tiny.targets()
    check_padding(made(), pixels[2], jnp.array(tiny.CANVAS, jnp.int32), boxes[2], labels[2])


def test_backbone():
    """Sides that are not multiples of 32 are rounded up; a detector takes a backbone of one level only."""

    def make():
        body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=jr.key(0), width=4)
        return nn.ProjectedResNet(body, key=jr.key(1), channels=8)

    backbone = tiny_detector.random_arrays(eqx.filter_eval_shape(make))
    image = np.random.default_rng(0).normal(size=(3, 40, 70)).astype(np.float32)
    found, expected = eqx.filter_jit(lambda x: (backbone(x)[0], backbone.body(x)[-1]))(image)
    weight, bias = backbone.projection.weight[:, :, 0, 0], backbone.projection.bias
    assert found.shape == (8, 2, 3) and backbone.strides == (32,) and backbone.divisor == 1
    np.testing.assert_allclose(found, np.einsum("oi,ihw->ohw", weight, expected) + bias[:, None, None], atol=1e-5)
    with pytest.raises(ValueError, match="backbone must have one level, got 3"):
        models.detr(tiny_detector.Pyramid(key=jr.key(0)), 3, key=jr.key(2))
