"""The scripts as a user runs them: two steps of training, evaluation, prediction, export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data, nn, weights

from .tiny_train import COMPILE_FAST


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "experiments").glob("[!_]*.py"))
SMALL = ["--min-sizes", "64", "--max-size", "64", "--canvases", "64", "64"]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """One device, wide output, and compiled programs kept from one run of a script to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", COMPILE_FAST)
        patch.setenv("DETECTAX_TYPECHECK", "0")  # a third of a script's start
        patch.setenv("COLUMNS", "200")
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run(script, *arguments, status=0):
    """What a script prints, after a check of its exit status."""
    command = [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Annotation file and image folder of a few small images."""
    return data.write_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_images=6, seed=0, image_size=(64, 64))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    text = run(script, "--help")
    assert "usage" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train_evaluate_predict_export(shapes, tmp_path):
    annotations, images = shapes
    common = ["--train-annotations", annotations, "--train-images", images, "--model", "faster_rcnn_resnet18_fpn"]
    common += ["--norm", "group", "--batch-size", "2", "--checkpoint-every", "1", "--log-every", "1", *SMALL]

    run("train.py", *common, "--steps", "2", "--output", tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)

    output = run(
        "evaluate.py", "--checkpoint", tmp_path / "whole", "--annotations", annotations, "--images", images,
        "--output", tmp_path / "evaluation", "--report",
    )  # fmt: skip
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 10_000
    again = run(
        "evaluate.py", "--detections", tmp_path / "evaluation" / "detections.json", "--annotations", annotations,
        "--images", images, "--output", tmp_path / "again",
    )  # fmt: skip
    numbers = [(tmp_path / name / "metrics.json").read_text() for name in ("evaluation", "again")]
    assert numbers[0] == numbers[1] and "Average Precision" in again
    both = ["--detections", tmp_path / "evaluation" / "detections.json", "--checkpoint", tmp_path / "whole"]
    refused = run(
        "evaluate.py", *both, "--annotations", annotations, "--images", images, "--output", tmp_path, status=1
    )
    assert "either a detector" in refused
    assert "Average Precision  (AP) @[ IoU=0.50:0.95" in output
    assert "triangle" in output
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert len(metrics["bbox"]["numbers"]) == 12

    # One file is broken; the others are done all the same, and the status says so.
    broken = tmp_path / "pictures" / "broken.jpg"
    broken.parent.mkdir()
    broken.write_bytes(b"no image")
    shutil.copy(sorted(images.iterdir())[0], tmp_path / "pictures" / "good.png")
    arguments = ["--checkpoint", tmp_path / "whole", "--output", tmp_path / "out", tmp_path / "pictures"]
    output = run("predict.py", *arguments, "--score-threshold", "0.0", status=1)
    assert "broken.jpg" in output
    assert "1 of 2 files failed" in output
    assert _size(tmp_path / "out" / "good.png.png") == (64, 64)
    assert json.loads((tmp_path / "out" / "images.json").read_text())[0]["height"] == 64
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {result["category_id"] for result in results} <= {1, 3, 4, 7}

    exported = tmp_path / "detector.npz"
    run("export.py", "--checkpoint", tmp_path / "whole", "--output", exported, "--source", "64", "64")
    assert "triangle" in json.loads(np.load(exported)["about"].tobytes())["class_names"]


def _size(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_runs(tmp_path):
    run(
        "quickstart.py", "--output", tmp_path, "--steps", "2", "--train-images", "4", "--test-images", "8",
        "--batch-size", "2",
    )  # fmt: skip
    assert _size(tmp_path / "demo.png")[0] > 1000
    assert {"bbox", "segm"} == json.loads((tmp_path / "metrics.json").read_text()).keys()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_training_refuses_bad_data(shapes, tmp_path):
    annotations, images = shapes
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = 99
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    text = run("train.py", "--train-annotations", bad, "--train-images", images, "--output", tmp_path / "o", status=1)
    assert "99" in text
    assert "bad.json" in text
    assert "jax/_src" not in text


def test_a_detector_of_other_classes_gives_all_but_its_predictors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from detectax_eqx import zoo

    name = "faster_rcnn_resnet18_fpn"
    parts = zoo.Architecture(name)
    source, model = parts.build(90, key=jr.key(0)), parts.build(3, key=jr.key(1))
    weights.save_safetensors(source, tmp_path / "source.safetensors")
    loaded, notes = zoo.initialize(model, parts, tmp_path / "source.safetensors")
    assert "has 90 classes and this model 3" in notes[0] and len(notes) == 1
    theirs, before, after = map(weights.to_torchvision, (source, model, loaded))
    for key, array in after.items():
        expected = before if key.startswith("roi_heads.box_predictor.") else theirs
        assert np.array_equal(array, expected[key]), key


def test_weights_of_another_detector_are_refused_by_name(shapes, tmp_path):
    annotations, images = shapes
    path = tmp_path / "resnet18.safetensors"
    weights.save_safetensors(nn.resnet18(key=jr.key(0), width=8), path)
    common = ["--train-annotations", annotations, "--train-images", images, "--output", tmp_path, "--init", path]
    text = run("train.py", *common, "--model", "faster_rcnn_resnet18_fpn", status=1)
    assert "resnet18.safetensors" in text and "Traceback" not in text
