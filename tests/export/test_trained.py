"""Detectors on transformers that were trained keep their AP as ONNX files: in float32, in float16 and in INT8."""

import jax
import pytest

from detectax_eqx import data, export

from ..learning import CANVAS, KINDS, learn
from ..parity.compare_exports import CALIBRATION_IMAGES, Setup, measured, onnx_rows
from .detectors import needs


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ap_of_files(kind, tmp_path):
    needs("onnx")
    model, train_set, test_set = learn(kind, tmp_path)
    setup = Setup(
        tmp_path,
        test_set,
        export.Shape(1, CANVAS, CANVAS),
        [category.name for category in test_set.categories],
        [data.read_image(image.path) for image in train_set.images[:CALIBRATION_IMAGES]],
    )
    expected = measured(jax.jit(export.detection_program(model, setup.shape)), setup)
    rows = onnx_rows(model, setup)
    for name, row in [("jax", expected), *rows.items()]:
        print(f"{kind} {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
    assert expected["AP50"] >= 0.7
    for name, most in (("onnx", 0.001), ("onnx float16", 0.002), ("onnx int8", 0.01)):
        assert rows[name]["AP"] >= expected["AP"] - most, name
