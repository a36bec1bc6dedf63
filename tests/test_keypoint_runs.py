"""A keypoint detector from training to prediction and export, with another number of points than persons have."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import data, evaluate, export, models, zoo
from detectax_eqx.weights import WeightsError, load_torchvision

from . import tiny_train


NAME = "keypoint_rcnn_resnet50_fpn"
CATEGORIES = (data.Category(3, "cat", ("nose", "left_ear", "right_ear"), ((0, 1), (0, 2))),)
SELECTION = models.TwoStageSelection(score_threshold=0.0, max_detections=4)


@pytest.fixture(scope="module")
def predictor() -> Any:
    model = tiny_train.build(NAME, 1, "group", num_keypoints=3)
    preprocessing = models.Preprocessing(models.ShortestEdge(64, 64))
    model = replace(model, preprocessing=preprocessing, selection=SELECTION)
    return zoo.Predictor(model, CATEGORIES, ((64, 64),), zoo.Architecture(NAME, "group", num_keypoints=3))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_predictions_have_keypoints(predictor, image):
    prediction = predictor(image)
    keypoints = prediction.detections.keypoints
    assert keypoints is not None and keypoints.shape == (4, 3, 3)
    x0, y0, x1, y1 = np.asarray(prediction.detections.boxes).T[..., None]
    # A side below a pixel counts as one.
    assert (keypoints[..., 0] >= x0).all() and (keypoints[..., 0] <= np.maximum(x1, x0 + 1)).all()
    assert (keypoints[..., 1] >= y0).all() and (keypoints[..., 1] <= np.maximum(y1, y0 + 1)).all()
    rows, results = prediction.rows(), prediction.to_coco(image_id=8)
    for row, result, points in zip(rows, results, keypoints, strict=True):
        np.testing.assert_allclose(row["keypoints"], points, rtol=1e-6)
        np.testing.assert_allclose(np.reshape(result["keypoints"], (3, 3)), points, rtol=1e-5)
    without = replace(prediction, detections=replace(prediction.detections, keypoints=None))
    options = {"score_threshold": 0.0, "keypoint_threshold": -np.inf}
    assert np.asarray(prediction.draw(**options)).tolist() != np.asarray(without.draw(**options)).tolist()
    assert prediction.skeletons == (((0, 1), (0, 2)),)


def test_the_number_of_keypoints_travels(predictor, image, tmp_path, monkeypatch):
    tiny_train.shrink(monkeypatch)
    predictor.save(tmp_path / "mine")
    loaded: Any = zoo.Predictor.load(tmp_path / "mine")
    assert (loaded.architecture, loaded.categories) == (predictor.architecture, CATEGORIES)
    options: Any = {"selection": SELECTION}
    np.testing.assert_allclose(
        loaded(image, **options).detections.keypoints, predictor(image).detections.keypoints, atol=1e-3
    )
    file = tmp_path / "weights.safetensors"
    predictor.save_weights(file)
    loaded = zoo.Predictor.from_weights(NAME, file, norm="group")
    assert loaded.categories == CATEGORIES and loaded.model.num_keypoints == 3
    again, notes = zoo.initialize(predictor.model, predictor.architecture, file)
    assert not notes
    for one, other in zip(*map(jax.tree.leaves, (again, predictor.model)), strict=True):
        np.testing.assert_array_equal(one, other)
    persons = tiny_train.build(NAME, 1, "group", seed=1)
    with pytest.raises(
        WeightsError, match=r"2 outputs and 3 keypoints, but the model is .* 2 outputs and 17 keypoints"
    ):
        load_torchvision(persons, file)
    zoo.Predictor(persons, None, ((64, 64),), zoo.Architecture(NAME, "group")).save_weights(file)
    initialised: Any
    initialised, notes = zoo.initialize(predictor.model, predictor.architecture, file)
    assert len(notes) == 1 and notes[0].endswith(
        "another number of keypoints: the layers that depend on it start at random."
    )
    np.testing.assert_array_equal(initialised.rpn.objectness.weight, persons.rpn.objectness.weight)
    np.testing.assert_array_equal(
        initialised.keypoint_head.heatmaps.weight, predictor.model.keypoint_head.heatmaps.weight
    )


def test_parts_that_a_detector_lacks_are_refused():
    with pytest.raises(ValueError, match=r"faster_rcnn_resnet18_fpn does not take num_keypoints\. Omit it"):
        zoo.Architecture("faster_rcnn_resnet18_fpn", num_keypoints=3).shapes(1)
    with pytest.raises(ValueError, match="num_keypoints must be at least 1, got 0"):
        zoo.Architecture(NAME, num_keypoints=0).shapes(1)


def test_stablehlo_names_its_outputs(predictor, image, tmp_path):
    shape, path = export.Shape(1, (64, 64), (64, 64)), tmp_path / "detector.npz"
    options: Any = {"class_names": ["cat"], "selection": SELECTION}
    export.save_stablehlo(predictor.model, path, shapes=[shape], platforms=["cpu"], **options)
    file = np.load(path)
    about = json.loads(file["about"].tobytes())
    assert about["outputs"] == ["boxes", "scores", "labels", "valid", "keypoints"]
    program = jax.export.deserialize(bytearray(file[f"programs/{shape.name}"].tobytes()))
    padded, sizes = export.pad_images([image], shape)
    outputs = program.call([file[f"weights/{i}"] for i in range(about["num_weights"])], padded, sizes)
    expected = jax.jit(export.detection_program(predictor.model, shape, SELECTION))(jnp.asarray(padded), sizes)
    assert expected.valid.any()
    for output, wanted in zip(outputs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-4)


def test_other_formats_are_refused(predictor, image, tmp_path, monkeypatch):
    for module in (export._onnx, export._edge):
        monkeypatch.setattr(module, "require", lambda extra: None)
    monkeypatch.setitem(sys.modules, "onnx", object())
    shape = export.Shape(1, (64, 64), (64, 64))
    options: Any = {"shape": shape, "images": [image], "class_names": ["cat"]}
    with pytest.raises(ValueError, match="model must not predict keypoints, got a KeypointRCNN"):
        export.save_onnx(predictor.model, tmp_path / "detector.onnx", **options)
    with pytest.raises(ValueError, match="must be a two-stage detector of boxes alone"):
        export.save_tflite(predictor.model, tmp_path / "tflite", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_and_evaluation(tmp_path, monkeypatch):
    """Two steps of train.py on shapes with four points, an evaluation by OKS, and the checkpoint as a predictor."""
    for kind in ("train", "val"):
        data.write_shapes_dataset(tmp_path / kind, num_images=3, image_size=(64, 64), keypoints=True)
    command = tiny_train.command(tmp_path, tmp_path / "run", "--model", NAME, "--steps", "2", "--warmup-steps", "1")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss_keypoint"]) for line in lines if "loss" in line)
    assert {"bbox_AP", "keypoints_AP", "keypoints_ARl"} <= lines[-1].keys()
    tiny_train.shrink(monkeypatch)
    predictor: Any = zoo.Predictor.from_checkpoint(tmp_path / "run")
    assert predictor.architecture.num_keypoints == predictor.model.num_keypoints == 4
    assert predictor.categories[0].keypoints == ("top", "right", "bottom", "left")
    results = evaluate.read_results(tmp_path / "run" / "evaluation" / "detections.json")
    assert all(len(result["keypoints"]) == 12 for result in results)


def test_training_refuses_data_without_keypoints(tmp_path, monkeypatch):
    data.write_shapes_dataset(tmp_path / "train", num_images=2, image_size=(64, 64))
    tiny_train.shrink(monkeypatch)
    options = tiny_train.grouped(
        train_annotations=str(tmp_path / "train" / "annotations.json"), train_images=str(tmp_path / "train" / "images"),
        model=NAME, output=tmp_path / "run", anchor_sizes=(8.0, 16.0, 32.0, 48.0, 64.0),
    )  # fmt: skip
    with pytest.raises(
        SystemExit, match=r"no category that names keypoints, and keypoint_rcnn.* use --model faster_rcnn"
    ):
        tiny_train.script.main(options)


def test_results_of_keypoints_alone(tmp_path, capsys):
    """They are evaluated by OKS, without a report; annotations without keypoints are refused."""
    from evaluate import Options, main

    for name, keypoints in (("points", True), ("boxes", False)):
        data.write_shapes_dataset(tmp_path / name, num_images=2, image_size=(64, 64), keypoints=keypoints)
    dataset = data.load_coco(tmp_path / "points" / "annotations.json", tmp_path / "points" / "images")
    points = dataset.objects(0).keypoints
    assert points is not None
    result = {"image_id": dataset.images[0].id, "category_id": 1, "score": 0.5, "keypoints": points[0].ravel().tolist()}
    evaluate.write_results([result], tmp_path / "detections.json")
    options = {"output": tmp_path / "out", "detections": tmp_path / "detections.json", "report": True}
    files = {
        name: (str(tmp_path / name / "annotations.json"), str(tmp_path / name / "images"))
        for name in ("points", "boxes")
    }
    main(Options(*files["points"], **options))
    assert "no report.html" in capsys.readouterr().out and not (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()).keys() == {"keypoints"}
    with pytest.raises(SystemExit, match=r"the results have keypoints alone, and .*boxes.annotations\.json has none"):
        main(Options(*files["boxes"], **options))
