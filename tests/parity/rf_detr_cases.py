"""RF-DETR's worker for `compare_speed.py`: inference and a training step, as in experiments/_cases/theirs.py."""
# pyright: reportMissingImports=false

import equinox as eqx
import jax.random as jr
import numpy as np
import torch
from _benchmark.inputs import ellipses
from _benchmark.worker import Arrays, Case, Side

from detectax_eqx import zoo
from detectax_eqx.weights import load_rf_detr, to_torchvision
from tests.parity.rf_detr_models import arrays_of, centre_masks, detections, losses, new_detector, prepared


def load(name: str, weights: str, num_classes: int, image: np.ndarray) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Builds a detector with random weights and its loss, and writes them, by this project's names, to a file."""
    model, criterion = new_detector(name)
    if model.segmentation_head is not None:
        centre_masks(model, prepared(image, len(image)))
    shapes = eqx.filter_eval_shape(zoo.build, name, num_classes, key=jr.key(0))
    np.savez(weights, **to_torchvision(load_rf_detr(shapes, arrays_of(model))))  # type: ignore[arg-type]
    return model, criterion


def inference(arrays: Arrays, *, name: str, weights: str, precision: str, num_classes: int, threshold: float) -> Case:
    """Returns a case for detection in images of the model's own size."""
    images = list(arrays["images"])
    model, _ = load(name, weights, num_classes, images[0])

    def found(result: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        for one in result:
            if "masks" in one:
                one["masks"] = np.packbits(one["masks"], axis=-1)
        return result

    return Case(lambda: [detections(model, image, len(image), model.num_queries) for image in images], found)


def training(
    arrays: Arrays, *, name: str, weights: str, precision: str, learning_rate: float, num_classes: int
) -> Case:
    """Returns a case for a step of SGD with momentum."""
    images, boxes, labels = arrays["images"], arrays["boxes"], arrays["labels"]
    model, criterion = load(name, weights, num_classes, images[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    masks = np.stack([ellipses(of_image, images.shape[1:3]).astype(bool) for of_image in boxes])
    valid = np.ones(labels.shape, bool)

    def run() -> dict[str, torch.Tensor]:
        terms = losses(model, criterion, images, boxes.astype(np.float32), labels, masks, valid)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        return terms

    def named(terms: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {term: value.detach().numpy() for term, value in terms.items()}

    return Case(run, named)


if __name__ == "__main__":
    Side({case.__name__: case for case in (inference, training)}, {"versions": {"torch": torch.__version__}}).serve()
