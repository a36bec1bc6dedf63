"""Quantises the network of an ONNX file to 8-bit integers."""
# pyright: reportMissingImports=false

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ..files import whole_file
from ._extras import require
from ._onnx import pad_images, read_onnx


# Names of the layers whose outputs are scores or coordinates, where one 8-bit quantisation step moves boxes by pixels.
# These layers are small. `deltas` also matches the `box_deltas` of a box head.
KEPT_IN_FLOAT = ("objectness", "class_logits", "deltas", "distances", "centerness", "mask_logits")


def quantize_onnx(
    source: str | os.PathLike,
    path: str | os.PathLike,
    *,
    images: Sequence[UInt8[np.ndarray, "_ _ c"]],
    kept_in_float: Sequence[str] = KEPT_IN_FLOAT,
) -> None:
    """Writes a copy of a file of `save_onnx` in which convolutions and linear layers use 8-bit integers.

    Uses onnxruntime's static quantisation. Weights are int8 with one scale per output channel, and activations are
    uint8 with ranges calibrated on `images`. They are stored as pairs of QuantizeLinear and DequantizeLinear, which
    runtimes convert to integer kernels. Inputs, outputs and metadata are those of the source. Evaluate the quantised
    file to measure the loss in accuracy.

    - `images`: a few dozen representative images.
    - `kept_in_float`: a layer stays in floating point if the name of its weight contains one of these strings. The
      default names the last layers of this package's heads; a custom detector may use other names.

    Raises a `ValueError` if there are no images or if one does not fit, and an `ImportError` that names the extra
    `onnx` if it is not installed.
    """
    require("onnx")
    if not images:
        raise ValueError("images must hold at least one image to calibrate on.")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    proto, about = read_onnx(source)
    shape, metadata = about["shape"], {entry.key: entry.value for entry in proto.metadata_props}
    _own_biases(proto)
    # onnxruntime recommends pre-processing unless the metadata declares that it was done. It is unnecessary here:
    # shapes are known and norms are folded.
    onnx.helper.set_model_props(proto, metadata | {"onnx.quant.pre_process": "onnxruntime.quant"})

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = self._feeds()

        def _feeds(self) -> Iterator[dict[str, Any]]:
            for start in range(0, len(images), shape.batch):
                padded, sizes = pad_images(images[start : start + shape.batch], shape)
                yield {"images": padded, "image_sizes": sizes}

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with whole_file(path) as temporary:
        quantize_static(
            proto,
            os.fspath(temporary),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "Add", "Relu", "MaxPool"],
            nodes_to_quantize=_network(proto, kept_in_float),
        )
        quantized = onnx.load(temporary)
        onnx.helper.set_model_props(quantized, metadata)
        onnx.save_model(quantized, temporary)


def _own_biases(proto: Any) -> None:
    """Copies shared biases so that each layer has its own, since a bias's scale depends on that of the layer's input.

    Otherwise layers shared by the pyramid levels would run in floating point.
    """
    biases, seen = {tensor.name: tensor for tensor in proto.graph.initializer}, set()
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3 and node.input[2] in biases:
            if node.input[2] in seen:
                copy = proto.graph.initializer.add()
                copy.CopyFrom(biases[node.input[2]])
                copy.name = node.input[2] = f"{node.input[2]}.{node.name}"
            seen.add(node.input[2])


def _network(proto: Any, kept_in_float: Sequence[str]) -> list[str]:
    """Names of the nodes to quantise: layers with weights, activations, max pooling and sums with a layer's output."""
    producers = {output: node for node in proto.graph.node for output in node.output}

    def is_layer(node: Any) -> bool:
        return node is not None and node.op_type in ("Conv", "Gemm")

    names = []
    for node in proto.graph.node:
        inputs = [producers.get(name) for name in node.input]
        if is_layer(node):
            quantized = not any(part in name for name in node.input for part in kept_in_float)
        else:
            quantized = node.op_type in ("Relu", "MaxPool") or (node.op_type == "Add" and any(map(is_layer, inputs)))
        if quantized:
            names.append(node.name)
    return names
