"""Detectors in ONNX give the detections of the model; files that differ are refused by an error that names why."""
# pyright: reportMissingImports=false

import json
from collections import Counter
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import data, export, models, zoo

from .. import detr_tiny, lw_detr_tiny, rf_detr_tiny
from ..parity import compare_exports
from .detectors import (
    NAMES,
    SELECTION,
    SHAPE,
    SQUARE,
    Brightest,
    Cells,
    dense,
    detr,
    needs,
    rf_detr,
    transformer,
    with_statistics,
)


@pytest.fixture(scope="module")
def onnx_file(model, images, tmp_path_factory):
    needs("onnx")
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export.save_onnx(model, path, shape=SHAPE, images=images, class_names=NAMES, selection=SELECTION)
    return path


@pytest.mark.timeout(600)
def test_onnx_gives_the_models_detections(onnx_file, images, expected):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    padded, sizes = export.pad_images(images, SHAPE)
    outputs = session.run(None, {"images": padded, "image_sizes": sizes})
    for output, wanted in zip(outputs, jax.tree.leaves(expected), strict=True):
        assert output.dtype == wanted.dtype
        np.testing.assert_allclose(output, wanted, atol=1e-3)
    assert {node.name for node in session.get_outputs()} == {"boxes", "scores", "labels", "valid", "masks"}
    proto, about = export.read_onnx(onnx_file)
    assert (about["class_names"], about["shape"]) == (NAMES, SHAPE)
    assert models.TwoStageSelection(**about["selection"]) == SELECTION
    assert about["preprocessing"]["resize"] == {
        "min_size": 64,
        "max_size": 96,
        "rounded": False,
        "rounded_short": False,
    }
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert "box_head.fc6.weight" in {tensor.name for tensor in proto.graph.initializer}


@pytest.mark.timeout(600)
def test_proposals_of_low_scores_keep_their_ranks_in_onnx(caplog):
    """Most proposals of a trained detector have logits far below 0, where scores differ by 1e-8."""
    needs("onnx")
    import onnxruntime

    from detectax_eqx.export._onnx import convert

    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 150, (1500, 2))
    anchors = jnp.asarray(np.concatenate([corners, corners + rng.uniform(8, 60, (1500, 2))], axis=1), jnp.float32)
    logits = rng.uniform(-17, -9, 1500).astype(np.float32)

    def run(logits, deltas):
        output = models.RPNOutput((logits,), (deltas,), (anchors,))
        proposals = models.propose(output, jnp.array([200.0, 200.0]), post_nms_top_n=300)
        return {"boxes": proposals.boxes, "scores": proposals.scores, "valid": proposals.valid}

    deltas = np.zeros((1500, 4), np.float32)
    specs = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in (("logits", logits), ("deltas", deltas))}
    proto = convert(run, specs, Brightest(Cells(jnp.ones(()))))
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    boxes, scores, valid = session.run(["boxes", "scores", "valid"], {"logits": logits, "deltas": deltas})
    expected = jax.jit(run)(logits, deltas)
    assert valid.all() and expected["valid"].all()
    np.testing.assert_array_equal(boxes, expected["boxes"])
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_batch_of_four_in_onnx_with_nothing_in_one(tmp_path):
    """A full-width ResNet-18 with masks, and four images of different sizes, one with no score above the threshold."""
    needs("onnx")
    import onnxruntime

    def build(key):
        keys = jr.split(key)
        model = zoo.build("mask_rcnn_resnet18_fpn", 3, key=keys[0])
        preprocessing = models.Preprocessing(models.ShortestEdge(160, 224))
        return with_statistics(replace(model, preprocessing=preprocessing), keys[1])

    model, shape = eqx.filter_jit(build)(jr.key(0)), export.Shape(4, (120, 160), (160, 224))
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
        for height, width in ((120, 160), (80, 160), (120, 60), (100, 100))
    ]
    padded, sizes = export.pad_images(images, shape)
    best = np.asarray(jax.jit(export.detection_program(model, shape))(padded, sizes).scores)
    nothing, least = np.sort(best[:, 0])[:2]
    assert least - nothing > 1e-3  # far more than the runtimes differ
    selection = models.selected(model, score_threshold=float(nothing + least) / 2)

    path = tmp_path / "detector.onnx"
    export.save_onnx(model, path, shape=shape, images=images, class_names=NAMES, selection=selection)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["boxes", "scores", "valid", "masks"]
    boxes, scores, valid, masks = session.run(names, {"images": padded, "image_sizes": sizes})
    assert masks.shape == (4, 100, 28, 28)
    assert sorted(valid.any(axis=1)) == [False, True, True, True]
    assert not boxes[~valid].any() and not scores[~valid].any()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_int8_costs_a_detector_that_was_trained(tmp_path):
    """A shorter version of the comparison behind BENCHMARKS.md, on generated shapes."""
    needs("onnx")
    annotations, _ = data.write_shapes_dataset(tmp_path, num_images=240, image_size=(160, 224))
    content = json.loads(annotations.read_text())
    for name, wanted in (("train", range(1, 201)), ("test", range(201, 241))):
        part = {
            "images": [image for image in content["images"] if image["id"] in wanted],
            "annotations": [one for one in content["annotations"] if one["image_id"] in wanted],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content | part))
    compare_exports.main(compare_exports.Options(tmp_path, tmp_path / "exports", steps=120))
    rows = json.loads((tmp_path / "exports" / "exports.json").read_text())
    assert rows["jax"]["AP"] > 0.2  # otherwise int8 would have nothing to lose
    assert abs(rows["onnx"]["AP"] - rows["jax"]["AP"]) < 1e-3
    assert rows["onnx int8"]["AP"] > rows["onnx"]["AP"] - 0.01
    assert rows["onnx int8"]["MB"] < 0.3 * rows["onnx"]["MB"]


@pytest.mark.parametrize("part, output", [("mask_head", "masks"), ("box_head.class_logits", "scores|labels|valid")])
def test_another_models_detections_are_refused_by_name(onnx_file, model, images, part, output):
    def weights(model):
        for name in part.split("."):
            model = getattr(model, name)
        return (model.mask_logits if part == "mask_head" else model).bias

    other = eqx.tree_at(weights, model, jnp.linspace(0.0, 0.5, weights(model).size))
    with pytest.raises(export.ExportError, match=output):
        export.compare_onnx(other, onnx_file, shape=SHAPE, images=images, selection=SELECTION)


def test_int8_keeps_predictors_in_float(onnx_file, images, tmp_path, capfd, caplog):
    import onnxruntime
    from onnx import TensorProto

    path = tmp_path / "int8.onnx"
    export.quantize_onnx(onnx_file, path, images=images)
    assert not caplog.records and capfd.readouterr() == ("", "")  # users do not see advice of the libraries
    proto, about = export.read_onnx(path)
    assert about["class_names"] == NAMES
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types["box_head.fc6.weight_quantized"] == TensorProto.INT8
    assert types["backbone.body.conv1.weight_quantized"] == TensorProto.INT8
    assert types["box_head.class_logits.weight"] == TensorProto.FLOAT
    assert path.stat().st_size < onnx_file.stat().st_size
    padded, sizes = export.pad_images(images, SHAPE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(["valid"], {"images": padded, "image_sizes": sizes})[0].any()


HALVES = {
    "mask_rcnn": lambda model: (model, SHAPE, SELECTION),
    "vit": lambda _: (transformer("vit"), SHAPE, SELECTION),
    "rf_detr": lambda _: (rf_detr("boxes"), SQUARE, None),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", HALVES)
def test_half_precision(kind, model, images, tmp_path):
    """The file is compared with the model in float32. Its kernels are in float16, its boxes in float32."""
    needs("onnx")
    from onnx import TensorProto

    (model, shape, selection), path = HALVES[kind](model), tmp_path / "detector.half.onnx"
    names, options = [str(i) for i in range(model.num_classes)], {"shape": shape, "selection": selection}
    export.save_onnx(model, path, images=images, class_names=names, half=True, unmatched_score=0.2, **options)
    proto, _ = export.read_onnx(path)
    kernels = [x for x in proto.graph.initializer if x.name.endswith(".weight") and len(x.dims) > 1]
    assert len(kernels) > 10 and {x.data_type for x in kernels} == {TensorProto.FLOAT16}
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    logits = lambda m: (m.class_logits if kind == "rf_detr" else m.box_head.class_logits).bias  # noqa: E731
    other = eqx.tree_at(logits, model, jnp.linspace(0.0, 3.0, logits(model).size))
    with pytest.raises(export.ExportError):
        export.compare_onnx(other, path, images=images, half=True, **options)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["retinanet", "retinanet_v2", "fcos"])
def test_dense_detectors_in_onnx(name, images, tmp_path):
    """`save_onnx` compares the float file itself. The int8 file keeps the last layers of the heads in float."""
    needs("onnx")
    from onnx import TensorProto

    model, path = dense(name), tmp_path / "detector.onnx"
    export.save_onnx(model, path, shape=SHAPE, images=images, class_names=NAMES)
    int8 = tmp_path / "int8.onnx"
    export.quantize_onnx(path, int8, images=images)
    proto, about = export.read_onnx(int8)
    assert models.DenseSelection(**about["selection"]) == model.selection
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types["backbone.body.conv1.weight_quantized"] == TensorProto.INT8
    assert types["class_tower.convs.0.weight_quantized"] == TensorProto.INT8
    last = ["class_logits", "distances", "centerness"] if name == "fcos" else ["class_logits", "deltas"]
    assert all(types[f"{layer}.weight"] == TensorProto.FLOAT for layer in last)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", rf_detr_tiny.KINDS)
def test_rf_detr_in_onnx(kind, images, tmp_path):
    """`save_onnx` compares the file itself. Masks come with their frames."""
    needs("onnx")

    model, path = rf_detr(kind), tmp_path / "detector.onnx"
    export.save_onnx(model, path, shape=SQUARE, images=images, class_names=[*"abcde"])
    proto, about = export.read_onnx(path)
    assert about["selection"] == {"score_threshold": 0.0, "max_detections": rf_detr_tiny.QUERIES}
    names = ["boxes", "scores", "labels", "valid"] + (["masks", "mask_boxes"] if kind == "masks" else [])
    assert [output.name for output in proto.graph.output] == names
    counts = Counter(node.op_type for node in proto.graph.node)
    assert counts["Softmax"] + counts["Erf"] >= 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind, side", [*((kind, 192) for kind in detr_tiny.KINDS), *((kind, 64) for kind in lw_detr_tiny.KINDS)]
)
def test_detr_in_onnx(kind, side, images, tmp_path):
    needs("onnx")

    shape = export.Shape(2, (48, 64), (side, side))
    export.save_onnx(detr(kind), tmp_path / "detector.onnx", shape=shape, images=images, class_names=[*"abcde"])
    proto, about = export.read_onnx(tmp_path / "detector.onnx")
    detections = 100 if "deformable" in kind else detr_tiny.QUERIES
    assert about["selection"] == {"score_threshold": 0.0, "max_detections": detections}
    assert [output.name for output in proto.graph.output] == ["boxes", "scores", "labels", "valid"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_transformers_in_onnx(kind, images, tmp_path):
    """Each norm is one operator, and projections and MLPs are operators whose weights can be quantised."""
    needs("onnx")
    from onnx import TensorProto

    model, path = transformer(kind), tmp_path / "detector.onnx"
    export.save_onnx(model, path, shape=SHAPE, images=images, class_names=NAMES, selection=SELECTION)
    proto, _ = export.read_onnx(path)
    counts = Counter(node.op_type for node in proto.graph.node)
    # Each head has a norm per convolution, and those of the RPN and the box head none here.
    blocks = {"vit": 2, "swin": 5}[kind]
    of_backbone = {"vit": 1 + 2 * 4, "swin": 1 + 3 + 4 + 2 * 4}[kind]
    assert counts["LayerNormalization"] == 2 * blocks + of_backbone + 4
    assert counts["Softmax"] == 0 and counts["Erf"] == blocks + (kind == "vit")
    int8 = tmp_path / "int8.onnx"
    export.quantize_onnx(path, int8, images=images)
    proto, _ = export.read_onnx(int8)
    integers = [tuple(x.dims) for x in proto.graph.initializer if x.data_type == TensorProto.INT8]
    channels = {"vit": 16, "swin": 8}[kind]
    for shape in ((3 * channels, channels), (channels, channels), (4 * channels, channels), (channels, 4 * channels)):
        assert shape in integers
