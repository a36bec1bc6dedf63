"""torchvision's detectors: whole detection, and whole training steps."""
# pyright: reportMissingImports=false

from functools import cache
from typing import Any

import numpy as np
import torch
from _torchvision import arrays_of, new_detector, random_detector

from ..inputs import NUM_CLASSES, ellipses
from ..worker import Case
from .ops import DEVICE, Arrays, ready


def load(name: str, weights: str, size: tuple[int, int]) -> torch.nn.Module:
    """The named detector at random weights, which are left in the file `weights` for the other side."""
    sizes = {"min_size": min(size), "max_size": max(size)}
    model = random_detector(name, num_outputs=num_outputs(name), **sizes)
    np.savez(weights, **arrays_of(model))  # type: ignore[arg-type]
    return model.to(DEVICE)


def inference(arrays: Arrays, *, name: str, weights: str, precision: str) -> Case:
    images = list(arrays["images"])
    model = load(name, weights, images[0].shape[:2]).eval()
    mixed = set_precision(precision)

    def run():
        with torch.inference_mode(), mixed:
            return model([to_tensor(image) for image in images])

    def detections(result: Any) -> Arrays:
        named, found = {}, [{key: value.cpu().numpy() for key, value in one.items()} for one in result]
        room = max(len(one["scores"]) for one in found)
        for key in ("boxes", "scores", "labels"):
            named[key] = np.stack([_padded(one[key], room) for one in found])
        named["labels"] -= num_outputs(name) - NUM_CLASSES
        named["valid"] = np.stack([np.arange(room) < len(one["scores"]) for one in found])
        if "masks" in found[0]:
            bits = [np.packbits(one["masks"][:, 0] > 0.5, axis=-1) for one in found]
            named["masks"] = np.stack([_padded(masks, room) for masks in bits])
        return named

    return Case(ready(run), detections)


def training(arrays: Arrays, *, name: str, weights: str, precision: str, learning_rate: float) -> Case:
    images = list(arrays["images"])
    size = images[0].shape[:2]
    model = load(name, weights, size).train()
    mixed = set_precision(precision)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, momentum=0.9, weight_decay=1e-4
    )
    targets, first = [], num_outputs(name) - NUM_CLASSES
    for boxes, labels in zip(arrays["boxes"], arrays["labels"], strict=True):
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels + first).long()}
        if hasattr(model, "roi_heads") and model.roi_heads.has_mask():
            target["masks"] = torch.from_numpy(ellipses(boxes, size))
        targets.append(target)

    def run():
        with mixed:
            losses = model(
                [to_tensor(image) for image in images],
                [{key: value.to(DEVICE) for key, value in target.items()} for target in targets],
            )
            total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return losses

    return Case(ready(run), lambda losses: {key: value.detach().cpu().numpy() for key, value in losses.items()})


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """A uint8 image of the host as the detectors take it."""
    return torch.from_numpy(image).to(DEVICE).permute(2, 0, 1).float() / 255


def set_precision(precision: str) -> torch.autocast:
    """Full float32, TF32 products where the device has them, or automatic mixed precision: a context to run in."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16")


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)])


def size(arrays: Arrays, *, name: str) -> Case:
    """Trainable numbers of the named detector."""
    with torch.device("meta"):
        model = new_detector(name, num_outputs(name))
    return Case(lambda: None, facts={"parameters": sum(parameter.numel() for parameter in model.parameters())})


@cache
def num_outputs(name: str) -> int:
    """How many classes the named detector counts: two-stage ones have the background as one of them."""
    with torch.device("meta"):
        return NUM_CLASSES + hasattr(new_detector(name), "roi_heads")


CASES = {case.__name__: case for case in (inference, training, size)}
