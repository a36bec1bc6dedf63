"""An ONNX file with its network in 8-bit integers."""
# pyright: reportMissingImports=false

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ..files import whole_file
from ._extras import require
from ._onnx import pad_images, read_onnx


# What detectors call layers whose outputs are scores and places: a step of 8 bits in them moves boxes by pixels. They
# are small. `deltas` are also a box head's `box_deltas`.
KEPT_IN_FLOAT = ("objectness", "class_logits", "deltas", "distances", "centerness", "mask_logits")


def quantize_onnx(
    source: str | os.PathLike,
    path: str | os.PathLike,
    *,
    images: Sequence[UInt8[np.ndarray, "_ _ c"]],
    kept_in_float: Sequence[str] = KEPT_IN_FLOAT,
) -> None:
    """Writes a copy of a file of `save_onnx` whose convolutions and linear layers compute in 8-bit integers.

    Static quantisation by onnxruntime: weights int8 with a scale for each output channel, activations uint8 with ranges
    seen on `images`, as pairs of QuantizeLinear and DequantizeLinear, which runtimes turn into integer kernels. Inputs,
    outputs and metadata are those of the source; how much accuracy it costs is yours to evaluate.

    - `images`: some dozens like those that are to come.
    - `kept_in_float`: parts of names of weights whose layers stay as they are; default the last layers of this
      package's heads, by the names that their fields have. A detector of your own may call them otherwise.

    Raises a `ValueError` if there are no images, or one does not fit; an `ImportError` that names the extra `onnx` if
    it is missing.
    """
    require("onnx")
    if not images:
        raise ValueError("images must hold at least one image to calibrate on.")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    proto, about = read_onnx(source)
    shape, metadata = about["shape"], {entry.key: entry.value for entry in proto.metadata_props}
    _own_biases(proto)
    # onnxruntime advises pre-processing unless a model says that it had some. This one needs none: its shapes are
    # known and its norms folded.
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
    """Gives each layer a bias of its own: its scale depends on that of the layer's input.

    Layers that are shared by the levels of a pyramid would otherwise run in floats.
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
    """Names of the nodes to quantise: layers with weights, their activations, sums that a convolution is part of."""
    makers = {output: node for node in proto.graph.node for output in node.output}

    def is_layer(node: Any) -> bool:
        return node is not None and node.op_type in ("Conv", "Gemm")

    chosen = []
    for node in proto.graph.node:
        before = [makers.get(name) for name in node.input]
        if is_layer(node):
            wanted = not any(part in name for name in node.input for part in kept_in_float)
        else:
            wanted = node.op_type in ("Relu", "MaxPool") or (node.op_type == "Add" and any(map(is_layer, before)))
        if wanted:
            chosen.append(node.name)
    return chosen
