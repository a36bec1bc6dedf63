"""Runs a detector on a whole dataset."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..data import CANVASES, CocoDataset, eval_batches, make_buckets, source_limit
from ..models import AbstractDetector, Selection, detect_batch
from ..train import make_mesh, shard_state
from ._results import to_coco_results


def detect_dataset(
    model: AbstractDetector,
    dataset: CocoDataset,
    *,
    category_ids: Sequence[int] | None = None,
    canvases: Sequence[tuple[int, int]] = CANVASES,
    selection: Selection | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    batch_size: int = 1,
    num_threads: int = 2,
    on_images: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, Any]]:
    """Runs a detector on every image of a dataset and returns the detections in COCO's results format.

    Every device processes `batch_size` images at a time. Several processes share the images, and each of them returns
    all results.

    - `category_ids`: the category id of each label. Default: the dataset's, which must have as many classes as the
      model.
    - `canvases`: the canvases that images are padded to, see `data.make_buckets`.
    - `selection`, `score_threshold`, `max_detections`: as for `models.detect`.
    - `num_threads`: threads that decode images. `on_images`: called after each batch with its number of images.
    """
    if category_ids is None:
        category_ids = dataset.category_ids
    if len(category_ids) != model.num_classes:
        raise ValueError(f"category_ids must have {model.num_classes} ids, one per class, got {len(category_ids)}.")
    mesh = make_mesh(jax.local_devices())
    model = shard_state(model, mesh)
    buckets = make_buckets(
        dataset.sizes, canvases=canvases, max_source=source_limit(canvases), **model.preprocessing.limits
    )
    image_ids = [image.id for image in dataset.images]
    results = []
    for images in eval_batches(
        dataset,
        batch_size=batch_size * mesh.size,
        buckets=buckets,
        num_threads=num_threads,
        shard=(jax.process_index(), jax.process_count()),
    ):
        detections = detect_batch(
            model,
            images,
            selection=selection,
            score_threshold=score_threshold,
            max_detections=max_detections,
            mesh=mesh,
        )
        ids = {"image_ids": image_ids, "category_ids": category_ids}
        results += to_coco_results(detections, images, paste=model.paste, **ids)
        on_images(int(images.valid.sum()) * jax.process_count())
    return _gather(results) if jax.process_count() > 1 else results


def _gather(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gathers the results of all processes, which must all call this function."""
    text = np.frombuffer(json.dumps(results).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - text.size)))  # (processes, longest)
    parts = [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]
    return [result for part in parts for result in part]
