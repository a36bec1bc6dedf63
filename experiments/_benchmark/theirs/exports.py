"""torchvision's detectors through torch's own ONNX export."""
# pyright: reportMissingImports=false

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..worker import Case
from .detectors import load, to_tensor
from .ops import Arrays


def onnx(arrays: Arrays, *, name: str, weights: str, precision: str) -> Case:
    """An ONNX file of the detector in onnxruntime, from one uint8 image on the host."""
    import onnxruntime

    (image,) = arrays["images"]
    model = load(name, weights, image.shape[:2]).eval()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        torch.onnx.export(model, ([to_tensor(image)],), file, opset_version=17, dynamo=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run() -> list[Any]:
        return session.run(None, {given.name: to_tensor(image).numpy()})

    def detections(result: list[Any]) -> Arrays:
        boxes, labels, scores = result[:3]
        named = {"boxes": boxes, "scores": scores, "labels": (labels - 1).astype(np.int32)}
        return {key: value[None] for key, value in named.items()} | {"valid": np.ones((1, len(scores)), bool)}

    return Case(run, detections)


CASES = {case.__name__: case for case in (onnx,)}
