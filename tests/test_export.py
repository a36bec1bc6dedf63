"""Exported detectors give the detections of the model; files that differ are rejected by an error that names why."""
# pyright: reportMissingImports=false

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import Detections, data, export, models, nn, ops, zoo
from detectax_eqx.export import _extras, _program

from .parity import compare_exports


ROOT = Path(__file__).parents[1]
RUN = ROOT / "experiments" / "run_stablehlo.py"
PREPROCESSING = models.Preprocessing(models.ShortestEdge(64, 96))
SELECTION = models.TwoStageSelection(max_detections=20)
SHAPE = export.Shape(2, (48, 64), (64, 96))
NAMES = ["cat", "dog", "owl"]


def with_statistics(model, key):
    """Replaces the statistics of frozen norms by random ones, so that the norms are not the identity."""

    def norms(model):
        return [n for n in jax.tree.leaves(model, is_leaf=is_norm) if is_norm(n)]

    def is_norm(node):
        return isinstance(node, nn.FrozenBatchNorm)

    def measured(norm, key):
        keys = jr.split(key, 4)
        values = [jr.uniform(k, norm.weight.shape, minval=0.5, maxval=1.5) for k in keys]
        return eqx.tree_at(lambda n: (n.weight, n.bias, n.running_mean, n.running_var), norm, values)

    frozen = norms(model)
    return eqx.tree_at(norms, model, [measured(n, k) for n, k in zip(frozen, jr.split(key, len(frozen)), strict=True)])


@pytest.fixture(scope="module")
def model():
    keys = jr.split(jr.key(0), 5)
    backbone = nn.ResNetFPN(nn.resnet18(key=keys[0], width=8), key=keys[1], channels=16)
    sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (96.0,))
    detector = models.mask_rcnn(backbone, 3, key=keys[2], hidden_size=32, anchor_sizes=sizes, hidden_channels=8)
    return with_statistics(replace(detector, preprocessing=PREPROCESSING), keys[4])


@pytest.fixture(scope="module")
def box_detector(model):
    """The same detector without masks."""
    return models.FasterRCNN(model.backbone, model.rpn, model.box_head, preprocessing=PREPROCESSING)


def dense(name):
    """A tiny one-stage detector that detects something in noise."""
    keys = jr.split(jr.key(0), 5)
    top = nn.ConvolvedTop(64, 16, key=keys[0])
    backbone = nn.ResNetFPN(nn.resnet18(key=keys[1], width=8), key=keys[2], channels=16, finest=3, top=top)
    if name == "fcos":
        model = models.fcos(backbone, 3, key=keys[3])
    else:
        norm = nn.GroupNorm if name == "retinanet_v2" else None
        sizes = tuple((float(side), 1.5 * side) for side in (8, 16, 32, 64, 96))
        model = models.retinanet(backbone, 3, key=keys[3], anchor_sizes=sizes, head_norm=norm)
    model = replace(model, preprocessing=PREPROCESSING)
    logits = model.class_logits
    assert logits.bias is not None
    # Scores range from nearly 0 to nearly 1. With the usual initialisation they would all be about 0.01.
    wide = 40 * logits.weight, jnp.linspace(-1.0, 0.5, logits.bias.size)
    model = eqx.tree_at(lambda m: (m.class_logits.weight, m.class_logits.bias), model, wide)
    return with_statistics(model, keys[4])


@pytest.fixture(scope="module")
def images():
    """Blocky noise, in images of two sizes."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return [blocks, blocks[:40, 10:61].copy()]


@pytest.fixture(scope="module")
def expected(model, images):
    padded, sizes = export.pad_images(images, SHAPE)
    return jax.jit(export.detection_program(model, SHAPE, SELECTION))(padded, sizes)


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


class Cells(eqx.Module):
    """A minimal backbone: the means of 8×8 pixels."""

    weight: jax.Array
    channels, strides, stages, divisor = 1, (8,), (), 8

    def __call__(self, image):
        _, height, width = image.shape
        return ((image * self.weight).reshape(1, height // 8, 8, width // 8, 8).mean((2, 4)),)


@dataclass(frozen=True)
class Few:
    """A minimal selection."""

    score_threshold: float = 0.05
    max_detections: int = 5


class Brightest(models.AbstractDetector):
    """A custom detector: a box around each of the brightest cells of a one-channel image."""

    backbone: nn.Backbone
    preprocessing: models.Preprocessing = eqx.field(
        static=True, default=models.Preprocessing(models.ShortestEdge(64, 96), (0.0,), (255.0,))
    )
    selection: Few = eqx.field(static=True, default=Few())
    num_classes: int = eqx.field(static=True, default=3)  # pyright: ignore[reportIncompatibleMethodOverride]
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def loss(self, image, canvas_size, targets, *, key):
        return {}

    def __call__(self, image, canvas_size, *, selection=None):
        image_size, selection = canvas_size, selection or self.selection
        (cells,) = self.backbone(self.preprocessing.normalize(image, canvas_size))
        cells = cells[0]
        scores, at = jax.lax.top_k(cells.reshape(-1), selection.max_detections)
        corner = 8.0 * jnp.stack([at % cells.shape[1], at // cells.shape[1]], axis=1).astype(jnp.float32)
        inside = corner < image_size[None, ::-1].astype(jnp.float32)
        valid = (scores > selection.score_threshold) & inside.all(axis=1)
        return Detections(jnp.concatenate([corner, corner + 8], axis=1), scores, (at % 3).astype(jnp.int32), valid)


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


def needs(extra):
    """Skips the test if a package of the extra is not installed."""
    if any(find_spec(module) is None for module in _extras.EXTRAS[extra]):
        pytest.skip(f"needs the extra {extra}")


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
    assert about["preprocessing"]["resize"] == {"min_size": 64, "max_size": 96}
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


DENSE = ["retinanet", "retinanet_v2", "fcos"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", DENSE)
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", DENSE)
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
