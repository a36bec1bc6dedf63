"""The summary that a training run prints before its first step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import Options, draws_canvases, total_steps
from _shared import console

from detectax_eqx import data, models, report, zoo


# With more classes than this, only the most and the least frequent are listed.
MOST_CLASSES = 12


def check_objects(dataset: data.CocoDataset, options: Options, needs: frozenset[str]) -> None:
    """Refuses data that the model cannot learn from: no objects, or no masks or keypoints if it `needs` them."""
    parts = [dataset.objects(index) for index in range(len(dataset))]
    crowds = sum(int(part.crowd.sum()) for part in parts)
    if crowds == sum(len(part.crowd) for part in parts):
        found = f"all of its {crowds} annotations are crowds (iscrowd 1), which are not" if crowds else "it has none"
        raise SystemExit(
            f"{options.data.train_annotations} has no object to train on: {found}. Give annotations with boxes of "
            "single objects."
        )
    if "masks" in needs:
        bare = [
            (image, part.annotation_ids[row])
            for image, part in zip(dataset.images, parts, strict=True)
            for row in np.flatnonzero(~part.crowd)
            if part.segmentations[row] is None
        ]
        if bare:
            image, annotation_id = bare[0]
            more = f", nor have {len(bare) - 1:,} others" if len(bare) > 1 else ""
            raise SystemExit(
                f"{options.data.train_annotations}: image {image.id} ({image.file}), annotation {annotation_id} has no "
                f"segmentation{more}, and {options.detector.model} learns masks. For boxes alone use --model "
                f"{detector_without('masks', like=options.detector.model)}, or add the segmentations."
            )
    if "keypoints" in needs and not any(part.keypoints is not None and part.keypoints[..., 2].any() for part in parts):
        missing = "no labelled keypoint" if dataset.num_keypoints else "no category that names keypoints"
        raise SystemExit(
            f"{options.data.train_annotations} has {missing}, and {options.detector.model} learns keypoints. For boxes "
            f"alone use --model {detector_without('keypoints', like=options.detector.model)}, or add the keypoints."
        )


def print_header(
    options: Options, dataset: data.CocoDataset, *, model: Any, trainable: Any, schedule: optax.Schedule, steps: int
) -> None:
    """Prints data, length, learning rate, canvases, parameters and devices of a run. `steps`: per epoch."""
    total = total_steps(options, steps)
    labels, tiny = _labels_and_tiny(dataset, **options.sizes.limits)
    empty = sum(not (~dataset.objects(index).crowd).any() for index in range(len(dataset)))
    rate = float(jnp.max(jax.vmap(schedule)(jnp.arange(total))))
    leaves, marked = jax.tree.leaves(model), jax.tree.leaves(trainable)
    trained = sum(leaf.size for leaf, mark in zip(leaves, marked, strict=True) if mark)
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    rows = {
        "images": f"{len(dataset):,}" + (f", {empty:,} without objects" if empty else ""),
        "objects": f"{len(labels):,}" + (f", {tiny:,} under a pixel after resizing" if tiny else ""),
        "per class": _per_class(labels, dataset.categories),
        "steps": f"{total:,}, {total / steps:g} epochs of {steps:,}, {options.run.batch_size} images per step",
        "rate": f"{rate:.3g} at most ({options.optimization.optimizer}); {_plan(options)}",
        "canvases": _canvases(options, dataset, model),
        "model": f"{options.detector.model}, norm {options.architecture.norm}, "
        f"{models.num_parameters(model):,} parameters, {trained:,} of them trained",
        "devices": f"{jax.device_count()} ({kinds})",
    }
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(f"{name:<{width}}  {text}", highlight=False, soft_wrap=True)


def _plan(options: Options) -> str:
    """How the learning rate changes."""
    chosen = options.optimization
    epochs = " and ".join(f"{epoch:g}" for epoch in chosen.decay_epochs or ())
    decay = f"decays after epochs {epochs}" if epochs else "no decay"
    return f"warm-up {chosen.warmup_steps}, {'then a cosine to 0' if chosen.schedule == 'cosine' else decay}"


def _canvases(options: Options, dataset: data.CocoDataset, model: Any) -> str:
    """How many images each canvas is for, or which of them a batch draws."""
    canvases = options.sizes.canvases
    if draws_canvases(options, model):
        return ", ".join(f"{height}×{width}" for height, width in canvases) + "; each batch draws one"
    uses = report.bucket_use(dataset.sizes, canvases=canvases, **options.sizes.limits)
    shrunk = sum(use.shrunk for use in uses)
    words = ", ".join(f"{use.canvas[0]}×{use.canvas[1]} for {use.images:,} images" for use in uses)
    padding = f"{report.padding_share(uses):.0%} padding"
    return f"{words}; {padding}" + (f", {shrunk:,} images shrunk to fit" if shrunk else "")


def _labels_and_tiny(dataset: data.CocoDataset, *, min_size: int, max_size: int) -> tuple[np.ndarray, int]:
    """The label of each object, and the number of objects with a side below one pixel after resizing."""
    boxes = report.resized_boxes(dataset, min_size=min_size, max_size=max_size)
    sides = boxes[:, 2:] - boxes[:, :2]
    return report.labels_of(dataset), int((sides < 1).any(axis=1).sum())


def _per_class(labels: np.ndarray, categories: tuple[data.Category, ...]) -> str:
    counts = np.bincount(labels, minlength=len(categories))
    order = np.argsort(-counts, kind="stable")
    words = [f"{categories[k].name} {counts[k]:,}" for k in order]
    if len(words) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        words = [*words[:half], f"{len(words) - 2 * half} more", *words[-half:]]
    return ", ".join(words)


def detector_without(target: str, *, like: str) -> str:
    """The detector that does not need `target`, and whose name has the longest common suffix with `like`."""

    def difference(name: str) -> int:
        return min(i for i in range(len(like) + 1) if name.endswith(like[i:]))

    names = sorted(zoo.names(), key=difference)
    return next(name for name in names if target not in zoo.Architecture(name).shapes(1).needs)
