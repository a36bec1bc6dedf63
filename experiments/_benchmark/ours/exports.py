"""This project's detectors as files, in the runtimes that they are for."""
# pyright: reportMissingImports=false

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from detectax_eqx import export

from ..inputs import NUM_CLASSES
from ..worker import Case
from .detectors import detector
from .ops import Arrays


def onnx(arrays: Arrays, *, name: str, weights: str | None, precision: str) -> Case:
    """An ONNX file of the detector in onnxruntime, from uint8 images on the host; masks stay in their boxes."""
    import onnxruntime

    images = arrays["images"]
    size = images.shape[1:3]
    shape = export.Shape(len(images), size, size)
    names = [str(i) for i in range(NUM_CLASSES)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        model = detector(name, weights, size=size)
        export.save_onnx(model, file, shape=shape, images=list(images), class_names=names)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {"images": images, "image_sizes": np.tile(np.array(size, np.int32), (len(images), 1))}
    outputs = [node.name for node in session.get_outputs()]

    def detections(result: list[np.ndarray]) -> Arrays:
        found = dict(zip(outputs, result, strict=True))
        return {key: found[key] for key in ("boxes", "scores", "labels", "valid")}

    return Case(lambda: session.run(outputs, feeds), detections)


CASES = {case.__name__: case for case in (onnx,)}
