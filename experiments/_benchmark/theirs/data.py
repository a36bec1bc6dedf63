"""torch's data pipeline, with what torchvision's detection references put into it."""
# pyright: reportMissingImports=false

from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_masks
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from ..worker import Case
from .ops import Arrays


class Coco(CocoDetection):
    """Images as float tensors, targets as the detectors take them."""

    def __init__(self, folder: Path, *, masks: bool):
        super().__init__(str(folder / "images"), str(folder / "annotations.json"))
        self._masks = masks
        self._to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)])

    def __getitem__(self, index):
        image, annotations = super().__getitem__(index)
        width, height = image.size
        boxes = torch.as_tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        target = {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in annotations])}
        if self._masks:
            target["masks"] = torch.stack([polygon_mask(a["segmentation"], height, width) for a in annotations])
        return self._to_tensor(image), target


def polygon_mask(polygons, height: int, width: int) -> torch.Tensor:
    """The pixels of an object."""
    mask = torch.as_tensor(coco_masks.decode(coco_masks.frPyObjects(polygons, height, width)), dtype=torch.uint8)
    return mask.any(dim=2)


def collate(examples):
    """Lists of images and of targets: sizes differ."""
    return tuple(zip(*examples, strict=True))


def feed(arrays: Arrays, *, folder: str, masks: bool, batch_size: int, workers: int) -> Case:
    loader = DataLoader(
        Coco(Path(folder), masks=masks),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=True,
    )

    def run() -> int:
        return sum(len(images) for images, _ in loader)

    def sums(_: int) -> Arrays:
        images, pixels, objects, corners, area = 0, 0, 0, np.zeros(4), 0.0
        for pictures, targets in loader:
            images += len(pictures)
            pixels += sum(int((picture.double() * 255).round().sum()) for picture in pictures)
            objects += sum(len(target["labels"]) for target in targets)
            corners += sum(target["boxes"].double().sum(dim=0).numpy() for target in targets)
            area += sum(float(target["masks"].sum()) for target in targets if "masks" in target)
        named = {"images": images, "pixels": pixels, "objects": objects, "corners": corners, "area": area}
        return {name: np.asarray(value, np.float64) for name, value in named.items()}

    return Case(run, sums)


CASES = {feed.__name__: feed}
