"""Loads detectors from the checkpoints of `experiments/train.py`."""

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data import Category
from ..models import AbstractDetector
from ..train import Restored, latest_checkpoint, load_checkpoint, load_latest_checkpoint
from ..weights import current_name
from ._about import Canvases, categories_of, preprocessing_of
from ._architecture import Architecture


def run_metadata(
    architecture: Architecture,
    model: AbstractDetector,
    categories: tuple[Category, ...],
    canvases: Canvases,
    *,
    ema: bool,
) -> dict[str, Any]:
    """The metadata of a run's checkpoints, for `load_run`. `ema`: whether the run keeps an average of the model."""
    return {
        "model": architecture.name,
        "norm": architecture.norm,
        "anchor_sizes": architecture.anchor_sizes,
        "aspect_ratios": architecture.aspect_ratios,
        "num_keypoints": architecture.num_keypoints,
        "categories": [asdict(category) for category in categories],
        "preprocessing": asdict(model.preprocessing),
        "canvases": canvases,
        "ema": ema,
    }


def load_run(path: Path) -> tuple[AbstractDetector, tuple[Category, ...], Canvases, Architecture]:
    """The model, categories, canvases and architecture of a run's best detector, or of one checkpoint."""
    folder = next(filter(latest_checkpoint, (path / "best", path / "last", path)), None)
    if folder is None:
        _, metadata = load_checkpoint(path, {}, partial=True)
    else:
        metadata = load_latest_checkpoint(folder, {}, partial=True).metadata
    try:
        categories = categories_of(metadata)
        canvases = tuple((height, width) for height, width in metadata["canvases"])
        preprocessing = preprocessing_of(metadata)
        part = "ema" if metadata["ema"] else "model"  # a field of `TrainState`
        architecture = Architecture.from_fields({**metadata, "name": metadata["model"]})
        like = replace(architecture.shapes(len(categories)), preprocessing=preprocessing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata is not what train.py writes ({error!r}).") from None
    # Names have changed since checkpoints were written without a preprocessing.
    rename = str if "preprocessing" in metadata else _current_path
    if folder is None:
        tree, _ = load_checkpoint(path, {part: like}, partial=True, rename=rename)
    else:
        restored = load_latest_checkpoint(folder, {part: like}, partial=True, rename=rename)
        _warn_of_damage(restored)
        tree = restored.tree
    return tree[part], categories, canvases, architecture


def _current_path(path: str) -> str:
    part, _, name = path.partition("/")
    return f"{part}/{current_name(name.replace('/', '.')).replace('.', '/')}"


def _warn_of_damage(restored: Restored) -> None:
    """Warns of each damaged checkpoint that was skipped for an earlier one."""
    for error in restored.refused:
        warnings.warn(f"{error} {restored.path} is used instead.", stacklevel=4)
