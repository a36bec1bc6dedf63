"""Detectron2's detectors by name: files, classes, licences, fine-tuning, and masks in results."""

import pickle
import re
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Detections, Images, evaluate, models, nn, ops, zoo
from detectax_eqx.weights import WeightsError, detectron2_shapes, named_leaves
from detectax_eqx.zoo import _detectors


NAME = "faster_rcnn_resnet50_fpn_detectron2"


def small(num_classes, *, key, checkpoint, norm=nn.FrozenBatchNorm, **parts):
    keys = jr.split(key, 3)
    body = nn.ResNet(nn.Bottleneck, (1, 1, 1, 1), key=keys[0], width=4, norm=norm, stride_in_1x1=True)
    backbone = nn.BackboneWithFPN(body, key=keys[1], channels=8)
    return models.faster_rcnn_detectron2(backbone, num_classes, key=keys[2], hidden_size=16, **parts)


@pytest.fixture(autouse=True)
def tiny_zoo(monkeypatch):
    monkeypatch.setattr(_detectors, "_DETECTORS", {NAME: small})


def arrays(num_classes, seed=0):
    """Random parameters by Detectron2's names."""
    draw = np.random.default_rng(seed)
    shapes = detectron2_shapes(zoo.Architecture(NAME).shapes(num_classes))
    return {name: draw.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, content):
    path.write_bytes(pickle.dumps({"model": content, "__author__": "Detectron2 Model Zoo"}, 2))
    return path


def test_a_file_of_the_model_zoo(tmp_path, capsys):
    """Its name tells its categories and its licence."""
    file = write(tmp_path / "model_final_280758.pkl", arrays(80))
    predictor: Any = zoo.Predictor.from_weights(NAME, file)
    assert predictor.categories is not None and len(predictor.categories) == predictor.model.num_classes == 80
    assert (predictor.categories[0].name, predictor.categories[79].id) == ("person", 90)
    assert "CC-BY-SA-3.0" in capsys.readouterr().err
    np.testing.assert_array_equal(predictor.model.box_head.fc6.weight, arrays(80)["roi_heads.box_head.fc1.weight"])


def test_a_file_of_ones_own_and_back_from_safetensors(tmp_path, capsys):
    predictor: Any = zoo.Predictor.from_weights(NAME, write(tmp_path / "model_final.pkl", arrays(5)))
    assert predictor.model.num_classes == 5 and predictor.categories is None
    assert "CC-BY-SA" not in capsys.readouterr().err
    predictor.save_weights(tmp_path / "own.safetensors")
    again: Any = zoo.Predictor.from_weights(NAME, tmp_path / "own.safetensors")
    assert again.model.preprocessing == predictor.model.preprocessing
    assert again.model.preprocessing.pillow and again.model.preprocessing.resize.rounded
    for name, array in named_leaves(predictor.model).items():
        np.testing.assert_array_equal(named_leaves(again.model)[name], array)


def test_another_model(tmp_path):
    file = write(tmp_path / "other.pkl", {"conv.weight": np.ones((3, 3, 1, 1), np.float32)})
    with pytest.raises(WeightsError, match=r"no model of torchvision, Detectron2, .* does not hold a faster_rcnn"):
        zoo.Predictor.from_weights(NAME, file)


def test_fine_tuning_from_a_detector_of_other_classes(tmp_path):
    model: Any = eqx.filter_jit(zoo.Architecture(NAME).build)(3, key=jr.key(1))
    file = write(tmp_path / "model_final.pkl", arrays(5))
    tuned: Any
    tuned, notes = zoo.initialize(model, zoo.Architecture(NAME), file)
    assert len(notes) == 1 and "5 classes and this model 3" in notes[0]
    np.testing.assert_array_equal(tuned.box_head.fc6.weight, arrays(5)["roi_heads.box_head.fc1.weight"])
    np.testing.assert_array_equal(tuned.box_head.class_logits.weight, model.box_head.class_logits.weight)


def test_fine_tuning_from_a_backbone(tmp_path):
    prefix = "backbone.bottom_up."
    body = {name.removeprefix(prefix): x for name, x in arrays(5).items() if name.startswith(prefix)}
    model: Any = eqx.filter_jit(zoo.Architecture(NAME).build)(3, key=jr.key(1))
    tuned: Any
    tuned, notes = zoo.initialize(model, zoo.Architecture(NAME), write(tmp_path / "R-50.pkl", body))
    assert notes == ()
    np.testing.assert_array_equal(tuned.backbone.body.conv1.weight[:, 0], body["stem.conv1.weight"][:, 2])
    np.testing.assert_array_equal(tuned.box_head.fc6.weight, model.box_head.fc6.weight)


def test_published_weights():
    rows = [zoo.published(name) for name in zoo.published_names() if zoo.published(name).source == "Detectron2"]
    assert len(rows) == 31 and {row.licence for row in rows} == {"CC-BY-SA-3.0"}
    for row in rows:
        assert re.fullmatch(
            r"https://dl\.fbaipublicfiles\.com/detectron2/[\w/-]+/\w+/f?\d+/model_final_\w{6}\.pkl", row.url
        )
        schedule = row.name.removeprefix(row.architecture.name)
        assert schedule in ("", "_1x", "_100ep", "_200ep")
        assert row.architecture.name.endswith("_detectron2") == ("ViTDet" not in row.url)
        assert (row.mask_ap is not None) == ("mask_rcnn" in row.name)
        assert len(row.categories) == (80 if row.keypoint_ap is None else 1)
    assert len({row.url for row in rows}) == len(rows)
    assert zoo.published(f"{NAME}_1x").box_ap == 37.9


def test_results_are_pasted_as_the_model_says():
    """Masks of exactly one half: above the threshold for Detectron2, not for torchvision."""
    pixels, sizes, one = np.zeros((1, 16, 16, 3), np.uint8), np.array([[16, 16]], np.int32), np.ones(1, np.int32)
    images = Images(pixels, sizes, sizes, one * 0, one > 0, canvas=(16, 16))
    found = Detections(
        np.array([[[4, 4, 12, 12]]], np.float32), one[None] * np.float32(0.9), one[None] * 0, one[None] > 0
    )
    found = replace(found, masks=np.full((1, 1, 4, 4), 0.5, np.float32))
    areas = {}
    for paste in (ops.paste_masks, ops.paste_masks_at_centers):
        (result,) = evaluate.to_coco_results(found, images, image_ids=[1], category_ids=[1], paste=paste)
        areas[paste.__name__] = evaluate_area(result["segmentation"])
    assert areas == {"paste_masks": 0, "paste_masks_at_centers": 36}
    assert models.FasterRCNN.paste is ops.paste_masks
    prediction = zoo.Prediction(
        Detections(*(np.asarray(x)[0] for x in (found.boxes, found.scores, found.labels, found.valid, found.masks))),
        (16, 16), None, ("a",), (1,), None, ops.paste_masks_at_centers,
    )  # fmt: skip
    masks = prediction.masks()
    assert masks is not None and masks.sum() == 36


def evaluate_area(segmentation):
    from pycocotools import mask

    return int(mask.area({"size": segmentation["size"], "counts": segmentation["counts"].encode()}))


def test_the_model_decides_how_masks_are_pasted():
    shapes = eqx.filter_eval_shape(
        lambda: models.mask_rcnn_detectron2(
            nn.BackboneWithFPN(nn.resnet50(key=jr.key(0), width=4), key=jr.key(1), channels=8),
            3, key=jr.key(2), hidden_size=8, hidden_channels=8,
        )
    )  # fmt: skip
    masks, boxes = jnp.full((1, 2, 2), 0.5), jnp.array([[0.0, 0.0, 4.0, 4.0]])
    assert shapes.paste(masks, boxes, image_size=(4, 4), threshold=0.5)[0, 1:3, 1:3].all()
