"""This project's data pipeline."""

from itertools import count
from pathlib import Path

import numpy as np

from detectax_eqx import data

from ..worker import Case
from .ops import Arrays


def feed(arrays: Arrays, *, folder: str, masks: bool, batch_size: int, workers: int) -> Case:
    """One pass over a COCO folder, in batches as `train.py` feeds them: canvases of uint8, masks in box frames."""
    dataset = data.load_coco(Path(folder) / "annotations.json", Path(folder) / "images")
    loader = data.Loader(
        dataset,
        batch_size=batch_size,
        buckets=data.make_buckets(dataset.sizes),
        mask_size=112 if masks else None,
        num_threads=workers,
    )
    passes = count()

    def one_pass():
        first = next(passes) * loader.steps_per_epoch
        return (batch for _, batch in loader.iterate(first, first + loader.steps_per_epoch))

    def run() -> int:
        return sum(len(batch.images.valid) for batch in one_pass())

    def sums(_: int) -> Arrays:
        images, pixels, objects, corners, area = 0, 0, 0, np.zeros(4), 0.0
        for batch in one_pass():
            targets = batch.targets
            images += int(batch.images.valid.sum())
            pixels += int(batch.images.pixels.sum(dtype=np.int64))
            objects += int(targets.valid.sum())
            corners += targets.boxes.sum(axis=(0, 1), dtype=np.float64)
            if targets.masks is not None:
                boxes = np.asarray(targets.boxes)
                covered = np.asarray(targets.masks).mean(axis=(2, 3)) / 255
                area += float((covered * np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)).sum())
        named = {"images": images, "pixels": pixels, "objects": objects, "corners": corners, "area": area}
        return {name: np.asarray(value, np.float64) for name, value in named.items()}

    return Case(run, sums)


def buckets(arrays: Arrays) -> Case:
    """How many programs images of some sizes take."""
    sizes = [(int(height), int(width)) for height, width in arrays["sizes"]]
    return Case(lambda: None, facts={"buckets": len(data.make_buckets(sizes))})


CASES = {case.__name__: case for case in (feed, buckets)}
