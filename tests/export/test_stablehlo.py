"""Detectors in StableHLO give the detections of the model, without this package."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import export, models

from .detectors import NAMES, SELECTION, SHAPE, SQUARE, Brightest, Cells, dense, rf_detr


ROOT = Path(__file__).parents[2]
RUN = ROOT / "experiments" / "run_stablehlo.py"


def lines_of(command, folder):
    """The lines that a command prints, run without the environment variables of the tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_"))}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder)
    return output.stdout.splitlines()


@pytest.mark.timeout(900)
def test_stablehlo_runs_without_the_package(model, images, expected, tmp_path, monkeypatch):
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(RUN.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"jax", "numpy", "PIL"}

    file = tmp_path / "detector.npz"
    export.save_stablehlo(model, file, shapes=[SHAPE], class_names=NAMES, selection=SELECTION)
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])

    def run():
        command = [sys.executable, str(RUN), str(file), *map(str, paths)]
        return [json.loads(line) for line in lines_of(command, tmp_path)]

    lines = run()
    for i, line in enumerate(lines):
        valid = np.asarray(expected.valid[i])
        assert valid.sum() > 3
        np.testing.assert_allclose(line["boxes"], expected.boxes[i][valid], rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(line["scores"], expected.scores[i][valid], rtol=1e-6, atol=1e-6)
        assert line["labels"] == [NAMES[label] for label in expected.labels[i][valid]]

    # The second process loads the compiled program and adds none.
    compiled = sorted(path.name for path in Path(f"{file}.compiled").iterdir())
    assert run() == lines
    assert compiled and sorted(path.name for path in Path(f"{file}.compiled").iterdir()) == compiled


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stablehlo_of_any_batch(model, images, expected, tmp_path):
    path, image = tmp_path / "detector.npz", tmp_path / "0.png"
    export.save_stablehlo(model, path, shapes=[SHAPE], class_names=NAMES, selection=SELECTION, any_batch=True)
    file = np.load(path)
    program = jax.export.deserialize(bytearray(file[f"programs/{SHAPE.name}"].tobytes()))
    weights = [file[f"weights/{i}"] for i in range(json.loads(file["about"].tobytes())["num_weights"])]
    padded, sizes = export.pad_images(images, SHAPE)
    for rows in ([0, 1], [1, 0, 1]):
        for found, wanted in zip(
            program.call(weights, padded[rows], sizes[rows]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(found, wanted[np.array(rows)], rtol=1e-5, atol=1e-4)
    Image.fromarray(images[1]).save(image)
    (line,) = lines_of([sys.executable, str(RUN), str(path), str(image)], tmp_path)
    np.testing.assert_allclose(json.loads(line)["scores"], expected.scores[1][expected.valid[1]], atol=1e-6)


def test_stablehlo_is_refused_outside_the_window(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    from run_stablehlo import check_version

    now = {"jax": jax.__version__, "calling_convention": jax.export.maximum_supported_calling_convention_version}
    check_version(now)
    check_version(now | {"jax": "0.9.1"})
    for other in ({"jax": "0.99.0"}, {"calling_convention": 1}, {"calling_convention": 99}):
        with pytest.raises(ValueError, match=r"written by jax .* reads conventions"):
            check_version(now | other)


def test_classes_need_names(model, tmp_path):
    with pytest.raises(ValueError, match="class_names must name the model's 3 classes, got 2"):
        export.save_stablehlo(model, tmp_path / "x.npz", shapes=[SHAPE], class_names=NAMES[:2])
    with pytest.raises(ValueError, match="shapes must hold"):
        export.save_stablehlo(model, tmp_path / "x.npz", shapes=[], class_names=NAMES)
    assert not list(tmp_path.iterdir())


def test_a_detector_of_ones_own_in_stablehlo(tmp_path):
    """A custom detector only has to be traceable. This one takes one-channel images and sides in multiples of 8."""
    shape = export.Shape(1, (48, 64), (64, 104), channels=1)
    model, file = Brightest(Cells(jnp.ones(()))), tmp_path / "own.npz"
    export.save_stablehlo(model, file, shapes=[shape], class_names=NAMES)
    saved = np.load(file)
    program = jax.export.deserialize(bytearray(saved[f"programs/{shape.name}"].tobytes()))
    image = np.zeros((48, 64, 1), np.uint8)
    image[12:18, 30:36] = 200
    padded, sizes = export.pad_images([image], shape)
    expected = jax.jit(export.detection_program(model, shape))(padded, sizes)
    assert expected.valid.any()
    for found, wanted in zip(program.call([saved["weights/0"]], padded, sizes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    x0, y0, x1, y1 = expected.boxes[0, 0].tolist()
    assert 24 < x0 < x1 < 42 and 6 < y0 < y1 < 24
    with pytest.raises(ValueError, match="the shape's 1 channels, got one of 3"):
        export.pad_images([np.zeros((8, 8, 3), np.uint8)], shape)


def test_a_model_that_is_no_detector_is_refused(tmp_path):
    with pytest.raises(TypeError, match="parameter 'model' has a wrong type"):
        export.save_stablehlo(
            lambda *_, **__: None,  # pyright: ignore[reportArgumentType]
            tmp_path / "x.npz",
            shapes=[SHAPE],
            class_names=NAMES,
        )


@pytest.mark.timeout(600)
def test_rf_detr_in_stablehlo(images, tmp_path):
    model, path = rf_detr("masks"), tmp_path / "detector.npz"
    export.save_stablehlo(model, path, shapes=[SQUARE], class_names=[*"abcde"], platforms=["cpu"])
    file = np.load(path)
    about = json.loads(file["about"].tobytes())
    assert models.QuerySelection(**about["selection"]) == model.selection
    program = jax.export.deserialize(bytearray(file[f"programs/{SQUARE.name}"].tobytes()))
    padded, sizes = export.pad_images(images, SQUARE)
    outputs = program.call([file[f"weights/{i}"] for i in range(about["num_weights"])], padded, sizes)
    expected = jax.jit(export.detection_program(model, SQUARE))(padded, sizes)
    assert expected.masks is not None and expected.mask_boxes is not None
    for output, wanted in zip(outputs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["fcos", *(pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet", "retinanet_v2"))]
)
def test_dense_detectors_in_stablehlo(name, images, tmp_path):
    model, path = dense(name), tmp_path / "detector.npz"
    export.save_stablehlo(model, path, shapes=[SHAPE], class_names=NAMES, platforms=["cpu"])
    file = np.load(path)
    about = json.loads(file["about"].tobytes())
    assert models.DenseSelection(**about["selection"]) == model.selection
    program = jax.export.deserialize(bytearray(file[f"programs/{SHAPE.name}"].tobytes()))
    padded, sizes = export.pad_images(images, SHAPE)
    outputs = program.call([file[f"weights/{i}"] for i in range(about["num_weights"])], padded, sizes)
    expected = jax.jit(export.detection_program(model, SHAPE))(padded, sizes)
    assert expected.valid.any(axis=1).all() and expected.masks is None
    for output, wanted in zip(outputs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-4)
