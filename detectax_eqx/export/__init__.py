"""Exports detectors to files that other runtimes can run: ONNX, TFLite and StableHLO."""

from ._compare import ExportError as ExportError, Tolerances as Tolerances, compare_detections as compare_detections
from ._edge import (
    EDGE_TPU_OPERATORS as EDGE_TPU_OPERATORS,
    TFLiteDetector as TFLiteDetector,
    save_tflite as save_tflite,
)
from ._extras import require as require
from ._fold import fold_norms as fold_norms
from ._host import host_nms as host_nms
from ._onnx import (
    compare_onnx as compare_onnx,
    pad_images as pad_images,
    read_onnx as read_onnx,
    save_onnx as save_onnx,
)
from ._onnx_host import host_detections as host_detections, save_onnx_parts as save_onnx_parts
from ._program import Shape as Shape, detection_program as detection_program
from ._quantize import quantize_onnx as quantize_onnx
from ._stablehlo import save_stablehlo as save_stablehlo
