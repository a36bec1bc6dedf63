"""Detectron2's worker for `compare_speed.py`: inference and a training step, as in experiments/_cases/theirs.py."""
# pyright: reportMissingImports=false

from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
import torch
from _benchmark.inputs import ellipses
from _benchmark.worker import Arrays, Case, Side

from detectax_eqx import zoo
from detectax_eqx.weights import load_detectron2, to_torchvision
from tests.parity.detectron2_models import arrays_of, detections, losses, random_detector
from tests.test_detectron2_reference import THEIR_LOSSES


OUR_LOSSES = {theirs: ours for ours, theirs in THEIR_LOSSES.items() if ours.startswith("loss_")}


def load(name: str, weights: str, size: tuple[int, int], num_classes: int) -> torch.nn.Module:
    """Builds a detector with random weights, and writes them, by this project's names, to the file `weights`."""
    model = random_detector(name)
    shapes = eqx.filter_eval_shape(zoo.build, name, num_classes, key=jr.key(0))
    np.savez(weights, **to_torchvision(load_detectron2(shapes, arrays_of(model))))  # type: ignore[arg-type]
    if hasattr(model.backbone, "_square_pad"):
        model.backbone._square_pad = max(size) if size[0] == size[1] else 0
    return model


def inference(arrays: Arrays, *, name: str, weights: str, precision: str, num_classes: int, threshold: float) -> Case:
    """Returns a case for detection in images that are not resized, up to pasted masks."""
    images = list(arrays["images"])
    model = load(name, weights, images[0].shape[:2], num_classes)

    def found(result: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        for one in result:
            if "masks" in one:
                one["masks"] = np.packbits(one["masks"], axis=-1)
            one.pop("keypoints", None)
        return result

    return Case(lambda: [detections(model, image) for image in images], found)


def training(
    arrays: Arrays, *, name: str, weights: str, precision: str, learning_rate: float, num_classes: int
) -> Case:
    """Returns a case for a step of SGD with momentum."""
    images = arrays["images"]
    size = images.shape[1:3]
    model = load(name, weights, size, num_classes)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    boxes, labels = arrays["boxes"], arrays["labels"]
    masks = [ellipses(of_image, size).astype(bool) for of_image in boxes]
    points = np.zeros((*labels.shape, 17, 3), np.float32)

    def run() -> dict[str, torch.Tensor]:
        terms = losses(model, images, boxes, labels, masks, points)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        return terms

    def named(terms: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {OUR_LOSSES[term]: value.detach().numpy() for term, value in terms.items()}

    return Case(run, named)


if __name__ == "__main__":
    Side({case.__name__: case for case in (inference, training)}, {"versions": {"torch": torch.__version__}}).serve()
