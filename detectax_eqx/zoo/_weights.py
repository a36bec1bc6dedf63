"""Loads weights files into detectors by name, counts their classes, and initialises detectors for fine-tuning."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from ..models import AbstractDetector
from ..nn import Swin, ViT, WindowedViT
from ..weights import (
    WeightsError,
    describe,
    detectron2_shapes,
    detr_shapes,
    load_detectron2,
    load_detectron2_backbone,
    load_detr,
    load_rf_detr,
    load_torchvision,
    load_torchvision_backbone,
    load_transformer,
    read_detectron2,
    read_detr,
    read_rf_detr,
    read_safetensors,
    read_torchvision,
    rf_detr_shapes,
    to_torchvision,
)
from ._architecture import Architecture
from ._detectors import detectron2_detectors
from ._detr import DETRS
from ._rf_detr import RF_DETRS


class Source(NamedTuple):
    """How the files of a library are read.

    - `read`: the arrays in a file, by names of the library, given a model for which they may be.
    - `load`: into a detector. `load_backbone`: the backbone of a classifier into a detector.
    - `shapes`: the shapes of a model's arrays, by the names of `read`.
    """

    read: Callable[[Any, AbstractDetector], dict[str, Shaped[np.ndarray, "..."]]]
    load: Callable[..., AbstractDetector]
    load_backbone: Callable[..., AbstractDetector]
    shapes: Callable[[AbstractDetector], dict[str, tuple[int, ...]]]


def source_of(architecture: Architecture, path: str | os.PathLike) -> Source:
    """How to read a file for a detector.

    A `.safetensors` file has the names of this package, except for Hugging Face's files of RF-DETR and DETR.
    """
    source = _SOURCES.get(architecture.name, _TORCHVISION)
    if Path(path).suffix != ".safetensors":
        return source
    theirs = source in (_RF_DETR, _DETR) and any(name.startswith(_FOREIGN) for name in read_safetensors(path)[0])
    return source if theirs else _TORCHVISION


def load_weights(architecture: Architecture, path: str | os.PathLike) -> AbstractDetector:
    """The detector with the weights in a file of the library it comes from, or a `.safetensors` file of this package.

    The number of classes is inferred from the file. Raises a `WeightsError` that says what the file seems to contain if
    it does not hold this detector.
    """
    shapes = architecture.shapes(count_classes(architecture, path))
    return source_of(architecture, path).load(shapes, path)


def with_keypoints(architecture: Architecture, path: str | os.PathLike) -> Architecture:
    """The architecture with the number of keypoints of the weights in a file, if it is that of a keypoint detector."""
    shapes = architecture.shapes(1)
    if "keypoints" not in shapes.needs:
        return architecture
    few, more = (array_shapes(replace(architecture, num_keypoints=count).shapes(1)) for count in (1, 2))
    count = _whole(_counts(few, more, read_torchvision(path, shapes)))
    return architecture if count is None else replace(architecture, num_keypoints=count)


def count_classes(architecture: Architecture, path: str | os.PathLike) -> int:
    """The number of classes of the weights in a file, inferred from the arrays whose shapes depend on it."""
    source, models = source_of(architecture, path), [architecture.shapes(count) for count in (1, 2)]
    arrays = source.read(path, models[0])
    few, more = (source.shapes(model) for model in models)
    counts = _counts(few, more, arrays)
    if not counts:
        missing = next(key for key in few if few[key] != more[key])
        other = "no model of torchvision, Detectron2, RF-DETR, DETR or this package"
        raise WeightsError(
            f"{path} seems to be {describe(arrays) or other}: "
            f"it has no entry {missing}, so it does not hold a {architecture.name}."
        )
    return _whole(counts) or 1  # if arrays disagree, `load_torchvision` reports which


def _counts(
    few: Mapping[str, tuple[int, ...]],
    more: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, Shaped[np.ndarray, "..."]],
) -> set[float]:
    """What is counted in `arrays`, by each array that depends on it, given the shapes for one and for two of it."""
    counts = set()
    for key in few.keys() & arrays.keys():
        shape = arrays[key].shape
        for axis, (one, two) in enumerate(zip(few[key], more[key], strict=True)):
            if one != two and axis < len(shape):  # the length of the axis is linear in the number
                counts.add((shape[axis] - one) / (two - one) + 1)
    return counts


def _whole(counts: set[float]) -> int | None:
    """The first count that is a positive whole number."""
    return next((int(count) for count in counts if count >= 1 and count == int(count)), None)


def array_shapes(model: AbstractDetector) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's arrays by torchvision's names. The arrays may be `jax.ShapeDtypeStruct`s."""
    leaves, structure = jax.tree.flatten(model)
    arrays = [hasattr(leaf, "shape") for leaf in leaves]
    # Replace each array by its position, a scalar: zeros of its shape might take much memory.
    numbers = [np.array(i) if is_array else leaves[i] for i, is_array in enumerate(arrays)]
    named = to_torchvision(jax.tree.unflatten(structure, numbers))
    return {name: leaves[int(number)].shape for name, number in named.items()}


def initialize(
    model: AbstractDetector, architecture: Architecture, path: str | os.PathLike
) -> tuple[AbstractDetector, tuple[str, ...]]:
    """Initialises `model` for fine-tuning: from a detector of its architecture, or a classifier with its backbone.

    If the file's detector has another number of classes, the layers that depend on it keep their values. The same
    applies to the layers that depend on the number of anchors or keypoints.

    Returns the model, and a sentence about each kind of layer that was not loaded.
    """
    library = source_of(architecture, path)
    if not any(name.startswith("backbone.") for name in library.read(path, model)):
        transformer = isinstance(getattr(model.backbone, "body", None), ViT | Swin | WindowedViT)
        return (load_transformer if transformer else library.load_backbone)(model, path), ()
    plain = Architecture(architecture.name, architecture.norm)
    source = load_weights(with_keypoints(plain, path), path)
    arrays: dict[str, Shaped[np.ndarray, "..."]] = dict(to_torchvision(source))
    own: Mapping[str, Shaped[np.ndarray, "..."]] = to_torchvision(model)
    notes = []
    if source.num_classes != model.num_classes:
        notes.append(
            f"{path} has {source.num_classes} classes and this model {model.num_classes}: "
            "the layers that depend on the number of classes start at random."
        )
        few, more = (array_shapes(plain.shapes(count)) for count in (1, 2))
        arrays |= {key: own[key] for key in own if few[key] != more[key]}
    others = {key: own[key] for key in own if own[key].shape != arrays[key].shape}
    for kind in sorted({"keypoints" if ".keypoint_" in key else "anchors" for key in others}):
        notes.append(f"{path} has another number of {kind}: the layers that depend on it start at random.")
    arrays |= others
    return load_torchvision(model, arrays), tuple(notes)


_TORCHVISION = Source(read_torchvision, load_torchvision, load_torchvision_backbone, array_shapes)
_DETECTRON2 = Source(
    lambda path, _: read_detectron2(path), load_detectron2, load_detectron2_backbone, detectron2_shapes
)
_DETR = Source(lambda path, _: read_detr(path), load_detr, load_torchvision_backbone, detr_shapes)
_RF_DETR = Source(lambda path, _: read_rf_detr(path), load_rf_detr, load_transformer, rf_detr_shapes)
_SOURCES = dict.fromkeys(detectron2_detectors(), _DETECTRON2)
_SOURCES |= dict.fromkeys(RF_DETRS, _RF_DETR) | dict.fromkeys(DETRS, _DETR)
# Prefixes of names in the files of detection transformers that no detector of this package has.
_FOREIGN = ("backbone.0.", "model.")
