"""The exported program gives the detections of the model; options out of range are refused."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import export, models, nn, ops
from detectax_eqx.export import _extras, _program

from .detectors import SHAPE, Brightest, Cells, with_statistics


def test_sizes_are_looked_up_as_they_are_computed(model):
    shape, preprocessing = export.Shape(1, (400, 520), (96, 128)), models.Preprocessing(models.ShortestEdge(80, 133))
    rule = _program.resize_rule(replace(model, preprocessing=preprocessing), shape)
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, [401, 521], (300, 2)), [[334, 500], [1, 1], [400, 520], [1, 520]]])
    resized = jax.vmap(rule)(jnp.asarray(sizes, jnp.int32)).tolist()
    for (height, width), size in zip(sizes.tolist(), resized, strict=True):
        assert tuple(size) == ops.resized_size((height, width), min_size=80, max_size=133, canvas=(96, 128))


def test_the_program_gives_what_detect_gives(model, images, expected):
    for i, image in enumerate(images):
        alone = eqx.filter_jit(models.detect)(model, jnp.asarray(image), canvas=SHAPE.canvas, max_detections=20)
        assert alone.valid.any()
        assert np.array_equal(alone.valid, expected.valid[i])
        np.testing.assert_allclose(alone.boxes, expected.boxes[i], atol=1e-3)


def test_folded_norms_change_nothing(model):
    folded = export.fold_norms(model)
    assert not any(
        isinstance(n, nn.FrozenBatchNorm) for n in jax.tree.leaves(folded, is_leaf=lambda n: hasattr(n, "eps"))
    )
    image = jr.normal(jr.key(1), (3, 64, 64))
    for wanted, found in zip(*(eqx.filter_jit(m.backbone)(image) for m in (model, folded)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_norms_of_pyramid_and_heads_are_folded_too():
    keys = jr.split(jr.key(0), 4)
    backbone = nn.BackboneWithFPN(nn.resnet18(key=keys[0], width=8), key=keys[1], channels=16, norm=nn.FrozenBatchNorm)
    head = partial(models.ConvBoxHead, hidden_channels=16)
    parts = {"hidden_size": 32, "hidden_channels": 16, "box_head": head, "mask_norm": nn.FrozenBatchNorm}
    model = with_statistics(models.mask_rcnn(backbone, 3, key=keys[2], **parts), keys[3])
    folded = export.fold_norms(model)
    leaves = jax.tree.leaves((model, folded), is_leaf=lambda n: isinstance(n, nn.FrozenBatchNorm))
    norms = [leaf for leaf in leaves if isinstance(leaf, nn.FrozenBatchNorm)]
    assert len(norms) == 20 + 8 + 4 + 4  # of the model alone: ResNet-18, pyramid, box head, mask head
    image, features = jr.normal(jr.key(1), (3, 64, 64)), jr.normal(jr.key(2), (2, 16, 7, 7))

    @eqx.filter_jit
    def run(model):
        masks = model.mask_head(features, jnp.array([0, 2]))
        return model.backbone(image), model.box_head(features), masks

    for wanted, found in zip(jax.tree.leaves(run(model)), jax.tree.leaves(run(folded)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"score_threshold": 1.7}, "score_threshold must be in 0..1, got 1.7"),
        ({"nms_threshold": float("nan")}, "nms_threshold must be in 0..1, got nan"),
        ({"rpn_nms_threshold": -1.0}, "rpn_nms_threshold must be in 0..1, got -1"),
        ({"max_detections": 0}, "max_detections must be positive, got 0"),
        ({"post_nms_top_n": -1}, "post_nms_top_n must be positive, got -1"),
    ],
)
def test_selections_out_of_range(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        export.detection_program(model, SHAPE, models.selected(model, **wrong))


def test_a_canvas_is_a_multiple_of_the_backbones_divisor(model):
    with pytest.raises(ValueError, match=r"canvas must be a multiple of 32 in height and width, got \(64, 100\)"):
        export.detection_program(model, export.Shape(1, (48, 64), (64, 100)))
    with pytest.raises(ValueError, match=r"canvas must be a multiple of 8 in height and width, got \(64, 100\)"):
        export.detection_program(Brightest(Cells(jnp.ones(()))), export.Shape(1, (48, 64), (64, 100)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch": 0}, "must be positive"),
        ({"source": (0, 64)}, "must be positive"),
        ({"canvas": (32768, 64)}, "canvas must be at most 32767"),
        ({"channels": 0}, "must be positive"),
    ],
)
def test_shapes_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        export.Shape(**{"batch": 1, "source": (48, 64), "canvas": (64, 96)} | wrong)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnxruntime is missing.*'detectax_eqx\[onnx\]'"):
        _extras.require("onnx")
