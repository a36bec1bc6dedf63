"""Detectors in two files, with suppression on the host: in ONNX, and in integers as TFLite."""
# pyright: reportMissingImports=false

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import export, models, ops

from .detectors import NAMES, SELECTION, SHAPE, dense, needs


def test_two_files_need_two_stages_and_boxes_alone(model, images, tmp_path):
    shape = export.Shape(1, SHAPE.source, SHAPE.canvas)
    for other, name in ((dense("fcos"), "FCOS"), (model, "MaskRCNN")):
        message = f"model must be a two-stage detector of boxes alone, .* got a {name}. save_onnx and save_stablehlo"
        if find_spec("onnx"):
            with pytest.raises(ValueError, match=message):
                export.save_onnx_parts(other, tmp_path / "parts", shape=shape, class_names=NAMES)
        if find_spec("ai_edge_litert"):
            with pytest.raises(ValueError, match=message):
                export.save_tflite(other, tmp_path / "parts", shape=shape, images=images, class_names=NAMES)
    assert not (tmp_path / "parts").exists()
    if find_spec("onnx"):
        head = models.CascadeHead(16, 3, key=jax.random.key(0), hidden_size=8)
        cascade = models.FasterRCNN(model.backbone, model.rpn, head, preprocessing=model.preprocessing)
        with pytest.raises(ValueError, match="must have one box head, got a CascadeHead of 3"):
            export.save_onnx_parts(cascade, tmp_path / "parts", shape=shape, class_names=NAMES)


@pytest.mark.timeout(600)
def test_suppression_on_the_host_gives_the_same(box_detector, images, tmp_path):
    needs("onnx")
    import onnxruntime

    detector = box_detector
    shape = export.Shape(1, SHAPE.source, SHAPE.canvas)
    export.save_onnx_parts(detector, tmp_path, shape=shape, class_names=NAMES, selection=SELECTION)

    def runner(name):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        inputs, outputs = ([node.name for node in nodes()] for nodes in (session.get_inputs, session.get_outputs))
        return lambda feeds: dict(zip(outputs, session.run(None, {name: feeds[name] for name in inputs}), strict=True))

    run = jax.jit(export.detection_program(detector, shape, SELECTION))
    parts = runner("proposals"), runner("detections")
    for image in images:
        padded, sizes = export.pad_images([image], shape)
        wanted = run(padded, sizes)
        found = export.host_detections(*parts, image, shape=shape, selection=SELECTION)
        assert found["labels"].tolist() == wanted.labels[wanted.valid].tolist()
        np.testing.assert_allclose(found["boxes"], wanted.boxes[wanted.valid], atol=1e-3)
        np.testing.assert_allclose(found["scores"], wanted.scores[wanted.valid], atol=1e-5)


def test_host_nms_keeps_what_nms_keeps():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 40, (300, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 12, (300, 2))], axis=1).astype(np.float32)
    scores = (rng.integers(0, 50, 300) / 50).astype(np.float32)  # with ties
    labels, valid = rng.integers(0, 3, 300).astype(np.int32), rng.random(300) < 0.8
    for threshold, most in ((0.3, 300), (0.5, 20), (0.0, 300), (1.0, 300)):
        options = {"iou_threshold": threshold, "max_outputs": most}
        indices, selected = ops.nms_indices(
            *map(jnp.asarray, (boxes, scores, valid)), labels=jnp.asarray(labels), **options
        )
        found = export.host_nms(boxes, scores, labels, valid, **options)
        assert found.tolist() == indices[selected].tolist()
    assert export.host_nms(boxes, scores, labels, valid & False, iou_threshold=0.5, max_outputs=3).tolist() == []


@pytest.mark.timeout(600)
def test_tflite_is_integer_throughout(box_detector, images, tmp_path):
    needs("edge")
    from ai_edge_litert.interpreter import Interpreter

    detector, shape = box_detector, export.Shape(1, SHAPE.source, SHAPE.canvas)
    # Nothing is cut by rank or suppressed, because precision does not decide which of two near-equal boxes stays.
    everything = {"pre_nms_top_n": 2000, "post_nms_top_n": 2000, "rpn_nms_threshold": 1.0, "nms_threshold": 1.0}
    selection = replace(SELECTION, max_detections=100, **everything)
    export.save_tflite(detector, tmp_path, shape=shape, images=images, class_names=NAMES, selection=selection)
    for file in ("network.tflite", "box_head.tflite"):
        interpreter = Interpreter(str(tmp_path / file))
        details = interpreter.get_input_details() + interpreter.get_output_details()
        assert {detail["dtype"] for detail in details} == {np.int8}
    other = replace(detector, preprocessing=models.Preprocessing())
    with pytest.raises(ValueError, match="is of a model with the preprocessing"):
        export.TFLiteDetector(other, tmp_path)
    run = export.TFLiteDetector(detector, tmp_path)
    operators = run.operators()
    assert "CONV_2D" in operators and "TRANSPOSE" not in operators
    program = jax.jit(export.detection_program(detector, shape, selection))
    for image in images:
        wanted = jax.tree.map(lambda x: x[0], program(*export.pad_images([image], shape)))
        found = run(image)
        assert run.operators() == operators
        # Integer arithmetic moves boxes a little, but the detections with the highest scores are still found.
        iou = ops.pairwise_iou(wanted.boxes[:20], found.boxes[found.valid])
        assert float(iou.max(axis=1).min()) > 0.95
        nearest = iou.argmax(axis=1)
        assert found.labels[nearest].tolist() == wanted.labels[:20].tolist()
        np.testing.assert_allclose(found.scores[nearest], wanted.scores[:20], atol=0.02)
