"""Exports a box detector's network to full-integer TFLite files; decoding, NMS and RoIAlign run on the host."""
# pyright: reportMissingImports=false

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from .._types import Detections
from ..models import (
    AbstractDetector,
    Preprocessing,
    Proposals,
    RPNOutput,
    Selection,
    TwoStageSelection,
    box_detections,
    propose,
    roi_features,
)
from ..nn import relu
from ._extras import require
from ._fold import fold_constants, fold_norms, trace
from ._parts import two_stage_parts
from ._program import Shape, about_model, resize_rule


NETWORK, BOX_HEAD = "network.tflite", "box_head.tflite"
SIGNATURE = "serving_default"
# TFLite names of the operators that the Coral Edge TPU supports, from the table "Supported operations" of
# coral.ai/docs/edgetpu/models-intro. Each operator has further conditions there; the Edge TPU compiler decides.
EDGE_TPU_OPERATORS = {
    "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "EXPAND_DIMS", "FULLY_CONNECTED",
    "L2_NORMALIZATION", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MUL", "PACK", "PAD", "PRELU",
    "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE", "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SQUEEZE", "STRIDED_SLICE",
    "SUB", "SUM", "SQUARED_DIFFERENCE", "TANH", "TRANSPOSE", "TRANSPOSE_CONV",
}  # fmt: skip


def save_tflite(
    model: AbstractDetector,
    folder: str | os.PathLike,
    *,
    shape: Shape,
    images: Sequence[UInt8[np.ndarray, "_ _ c"]],
    class_names: Sequence[str],
    selection: Selection | None = None,
) -> None:
    """Writes `network.tflite`, `box_head.tflite` and `about.json` to a folder, with int8 weights and activations.

    - The network maps a normalised image on its canvas, `(1, h, w, c)`, to `features0`, …, `logits0`, … and
      `deltas0`, … of the pyramid levels, channels last.
    - The box head maps the pooled features of all proposals, `(n, c * s * s)`, to `logits` and `deltas`.

    All inputs and outputs are int8; the files hold their quantisation scales. `TFLiteDetector` runs the steps before,
    between and after the two networks.

    - `model`: a two-stage detector that predicts boxes only.
    - `selection`: which detections are kept, a `TwoStageSelection`; default `model.selection`.
    - `images`: a few dozen representative images, used to calibrate the quantisation ranges.

    Raises a `ValueError` for any other detector, for a batch other than 1, and if there are no images. Raises an
    `ImportError` that names the extra `edge` if it is not installed.
    """
    require("edge")
    if shape.batch != 1 or not images:
        raise ValueError(
            f"batch must be 1 and images must hold at least one image, got {shape.batch} and {len(images)}."
        )
    about = about_model(model, class_names, selection) | {"shape": asdict(shape)}
    host = _Host(model, selection, shape)
    detector, head, _ = two_stage_parts(fold_norms(model), selection)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def network(image: Float[Array, "1 h w c"]) -> dict[str, Array]:
        features = detector.backbone(image[0].transpose(2, 0, 1))
        outputs = {f"features{i}": feature for i, feature in enumerate(features[:-1])}
        for i, feature in enumerate(features):
            for conv in detector.rpn.convs:
                feature = relu(conv(feature))
            outputs |= {f"logits{i}": detector.rpn.objectness(feature), f"deltas{i}": detector.rpn.deltas(feature)}
        return {name: output.transpose(1, 2, 0)[None] for name, output in outputs.items()}

    def box_head(pooled: Float[Array, "n i"]) -> dict[str, Array]:
        logits, deltas = head(pooled.reshape(len(pooled), -1, head.pool_size, head.pool_size))
        return {"logits": logits, "deltas": deltas.reshape(len(pooled), -1)}

    run_network, inputs = jax.jit(network), []
    for image in images:
        pixels, size = host.prepare(image)
        proposals, pooled = host.pool(run_network(pixels), size)
        inputs.append({"image": np.asarray(pixels), "pooled": np.asarray(pooled)[np.asarray(proposals.valid)]})
    capacity = host.selection.post_nms_top_n
    for file, function, name, rows in ((NETWORK, network, "image", 1), (BOX_HEAD, box_head, "pooled", capacity)):
        example = jax.ShapeDtypeStruct((rows, *inputs[0][name].shape[1:]), np.float32)
        samples = [np.resize(one[name], example.shape) for one in inputs if len(one[name])]
        _write_int8(folder / file, _to_tflite(function, name, example), [{name: sample} for sample in samples])
    (folder / "about.json").write_text(json.dumps(about))


class TFLiteDetector:
    """Runs the files of `save_tflite` in the LiteRT interpreter. `model` supplies the anchors and scales.

    Calling it with an image of any size that fits the source returns `Detections` in the image's pixels.

    Raises a `ValueError` if the model's preprocessing differs from that of the files.
    """

    def __init__(self, model: AbstractDetector, folder: str | os.PathLike):
        require("edge")
        from ai_edge_litert.interpreter import Interpreter

        about = json.loads((Path(folder) / "about.json").read_text())
        self.class_names = about["class_names"]
        sides = {name: tuple(about["shape"][name]) for name in ("source", "canvas")}
        # Fields that older files lack have their defaults.
        if json.loads(json.dumps(asdict(model.preprocessing))) != asdict(Preprocessing()) | about["preprocessing"]:
            raise ValueError(
                f"{folder} is of a model with the preprocessing {about['preprocessing']}, got one with "
                f"{model.preprocessing}. Replace the model's."
            )
        selection = TwoStageSelection(**about["selection"])
        self._host = _Host(model, selection, Shape(**about["shape"] | sides))
        self._files = {file: Interpreter(str(Path(folder) / file)) for file in (NETWORK, BOX_HEAD)}

    def __call__(self, image: UInt8[np.ndarray, "h w c"]) -> Detections:
        """Returns the detections in the image, in its pixels."""
        pixels, size = self._host.prepare(image)
        proposals, pooled = self._host.pool(self._run(NETWORK, image=pixels), size)
        outputs = self._run(BOX_HEAD, pooled=pooled)
        return self._host.detections(outputs, proposals, size, jnp.asarray(image.shape[:2], jnp.int32))

    def operators(self) -> set[str]:
        """TFLite names of the operators in both files. Those not in `EDGE_TPU_OPERATORS` run on the host's CPU."""
        names = {detail["op_name"] for file in self._files.values() for detail in file._get_ops_details()}
        # The interpreter lists operators that it delegates to a CPU library a second time, under this name.
        return names - {"DELEGATE"}

    def _run(self, file: str, **inputs: Any) -> dict[str, Array]:
        runner = self._files[file].get_signature_runner(SIGNATURE)
        ((name, array),), details = inputs.items(), runner.get_input_details()
        scale, zero = details[name]["quantization"]
        quantized = np.clip(np.rint(np.asarray(array) / scale) + zero, -128, 127).astype(np.int8)
        scales = {name: detail["quantization"] for name, detail in runner.get_output_details().items()}
        return {
            name: jnp.asarray((output.astype(np.float32) - scales[name][1]) * np.float32(scales[name][0]))
            for name, output in runner(**{name: quantized}).items()
        }


class _Host:
    """The steps that run on the host: resizing, proposals, RoIAlign and NMS."""

    def __init__(self, model: AbstractDetector, selection: Selection | None, shape: Shape):
        self._model, self._head, self.selection = two_stage_parts(model, selection)
        self._shape, self._size_on_canvas = shape, eqx.filter_jit(resize_rule(model, shape))
        self._pool = eqx.filter_jit(_pool)
        self._detections = eqx.filter_jit(_detections)
        self._prepare = eqx.filter_jit(_prepare)

    def prepare(self, image: UInt8[np.ndarray, "h w c"]) -> tuple[Float[Array, "1 ch cw c"], Int32[Array, " 2"]]:
        """Resizes and normalises an image on its canvas. Returns it with its size on the canvas."""
        height, width = image.shape[:2]
        padded = np.zeros((*self._shape.source, self._shape.channels), np.uint8)
        padded[:height, :width] = image
        image_size = jnp.asarray([height, width], jnp.int32)
        size = self._size_on_canvas(image_size)
        return self._prepare(self._model, jnp.asarray(padded), image_size, size, self._shape.canvas), size

    def pool(self, outputs: Mapping[str, Array], size: Int32[Array, " 2"]) -> tuple[Proposals, Float[Array, "n i"]]:
        """Returns the proposals from the network's outputs, and their pooled features."""
        return self._pool(self._model, dict(outputs), size, self._shape.canvas, self.selection)

    def detections(
        self,
        outputs: Mapping[str, Array],
        proposals: Proposals,
        size: Int32[Array, " 2"],
        image_size: Int32[Array, " 2"],
    ) -> Detections:
        """Decodes the box head's outputs and applies NMS. Returns detections in the image's own pixels."""
        return self._detections(dict(outputs), proposals, size, image_size, self.selection, self._head.weights)


def _prepare(model, image, image_size, size, canvas):
    pixels = model.preprocessing.place(image, image_size=image_size, output_size=size, canvas=canvas)
    return model.preprocessing.normalize(pixels, size).transpose(1, 2, 0)[None]


def _pool(model, outputs, size, canvas, selection):
    levels = range(len(model.rpn.anchor_sizes))
    features = tuple(outputs[f"features{i}"][0].transpose(2, 0, 1) for i in levels[:-1])
    shapes = [outputs[f"logits{i}"].shape for i in levels]
    # Running the RPN on zeros of these sizes yields its anchors.
    blank = [jnp.zeros((model.backbone.channels, *shape[1:3])) for shape in shapes]
    anchors = model.rpn(blank, canvas).anchors
    logits = tuple(outputs[f"logits{i}"].reshape(-1) for i in levels)
    deltas = tuple(outputs[f"deltas{i}"].reshape(-1, 4) for i in levels)
    proposals = propose(
        RPNOutput(logits, deltas, anchors),
        size.astype(jnp.float32),
        pre_nms_top_n=selection.pre_nms_top_n,
        post_nms_top_n=selection.post_nms_top_n,
        nms_threshold=selection.rpn_nms_threshold,
        min_size=selection.rpn_min_size,
        rank_by_logits=selection.rpn_rank_by_logits,
        weights=model.rpn.weights,
    )
    pooled = roi_features(model, features).pool(proposals.boxes, output_size=model.box_head.pool_size)
    return proposals, pooled.reshape(len(pooled), -1)


def _detections(outputs, proposals, size, image_size, selection, weights):
    detections = box_detections(
        outputs["logits"],
        outputs["deltas"].reshape(*outputs["logits"].shape, 4),
        proposals,
        size.astype(jnp.float32),
        score_threshold=selection.score_threshold,
        nms_threshold=selection.nms_threshold,
        max_detections=selection.max_detections,
        min_size=selection.box_min_size,
        weights=weights,
    )
    ratio = image_size.astype(jnp.float32) / size.astype(jnp.float32)
    return replace(detections, boxes=detections.boxes * jnp.stack([ratio[1], ratio[0], ratio[1], ratio[0]])[None])


def _to_tflite(function: Callable[..., dict[str, Array]], name: str, example: jax.ShapeDtypeStruct) -> bytes:
    """Converts a function of one array to a float TFLite model, via StableHLO."""
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    names: list[str] = []

    def run(array: Array) -> list[Array]:
        outputs = function(array)
        names[:] = outputs
        return list(outputs.values())

    rewrites = {
        "convolve": _convolve,
        "reduce_window_max": _max_pool,
        "slice": _slice,
        "upsample_nearest": _upsample,
    }
    jaxpr = fold_constants(trace(run, example), rewrites=rewrites)
    lowered = jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr)).lower(example).compiler_ir("stablehlo")
    assert lowered is not None
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(lowered.operation.get_asm(large_elements_limit=None))
        (main,) = (op for op in module.body.operations if "main" in str(op.attributes["sym_name"]))
        converter.set_signature(main, SIGNATURE, [name], names)
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), converter.ConvertToTFLConfig())
        return converter.export_flatbuffer_to_bytes(module.operation)


def _write_int8(path: Path, model: bytes, samples: list[dict[str, np.ndarray]]) -> None:
    """Quantises a float TFLite model, including its inputs and outputs, with ranges measured on sample inputs."""
    from ai_edge_quantizer import quantizer, recipe

    quantize = quantizer.Quantizer(bytearray(model), recipe.static_wi8_ai8())
    with warnings.catch_warnings():
        # Calibration reads every tensor; the interpreter warns about the memory that this takes.
        warnings.filterwarnings("ignore", message="(?s).*experimental_preserve_all_tensors", category=UserWarning)
        ranges = quantize.calibrate({SIGNATURE: samples})
        quantize.quantize(ranges).export_model(path, overwrite=True)


def _convolve(x, weight, *bias, stride, padding):
    """A convolution of one map with channels last, TFLite's layout.

    The transposes between adjacent operators cancel, and the bias becomes part of the convolution operator.
    """
    y = lax.conv_general_dilated(
        x[0].transpose(1, 2, 0)[None],  # (1, h, w, c)
        weight.transpose(2, 3, 1, 0),  # (o, i, kh, kw) -> (kh, kw, i, o)
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (y + bias[0][None, None, None] if bias else y)[0].transpose(2, 0, 1)[None]


def _max_pool(x, *, window_dimensions, window_strides, padding, **_):
    """Max pooling of a map `(c, h, w)`. Padding with 0 is correct because the input comes from a ReLU."""
    channels_last = [1, 2, 0]
    x = jnp.pad(x.transpose(channels_last), [padding[i] for i in channels_last])[None]
    window, strides = ((1, *(sizes[i] for i in channels_last)) for sizes in (window_dimensions, window_strides))
    return lax.reduce_window(x, -np.inf, lax.max, window, strides, "VALID")[0].transpose(2, 0, 1)


def _slice(x, *, start_indices, limit_indices, strides):
    """A slice of a map `(c, h, w)`: the positions that a strided 1×1 convolution reads."""
    channels_last = [1, 2, 0]
    cuts = (sizes and [sizes[i] for i in channels_last] for sizes in (start_indices, limit_indices, strides))
    return lax.slice(x.transpose(channels_last), *cuts).transpose(2, 0, 1)


def _upsample(x):
    """Nearest-neighbour upsampling by 2 through concatenation, an operator that edge accelerators support."""
    x = x.transpose(1, 2, 0)
    height, width, channels = x.shape
    x = jnp.concatenate([x, x], axis=2).reshape(height, 1, 2 * width * channels)  # each column twice
    return jnp.concatenate([x, x], axis=1).reshape(2 * height, 2 * width, channels).transpose(2, 0, 1)
