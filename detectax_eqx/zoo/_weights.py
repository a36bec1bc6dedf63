"""Files of weights for detectors by name: how many classes they have, and starting a new detector from them."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Shaped

from ..models import AbstractDetector
from ..weights import (
    WeightsError,
    describe,
    load_torchvision,
    load_torchvision_backbone,
    read_torchvision,
    to_torchvision,
)
from ._architecture import Architecture


def load_weights(architecture: Architecture, path: str | os.PathLike) -> AbstractDetector:
    """The detector with the weights of a torchvision `.pth` or a `.safetensors` file; classes are counted in the file.

    Raises a `WeightsError` that says what the file seems to be, if it holds something else.
    """
    num_classes = count_classes(architecture, path)
    return load_torchvision(architecture.shapes(num_classes), path)


def count_classes(architecture: Architecture, path: str | os.PathLike) -> int:
    """The number of classes of the weights in a file, from the arrays whose shapes depend on it."""
    few, more = (array_shapes(architecture.shapes(count)) for count in (1, 2))
    arrays = read_torchvision(path, architecture.shapes(1))
    found = set()
    for key in few.keys() & arrays.keys():
        shape = arrays[key].shape
        for axis, (one, two) in enumerate(zip(few[key], more[key], strict=True)):
            if one != two and axis < len(shape):  # sides grow by as much with every class
                found.add((shape[axis] - one) / (two - one) + 1)
    if not found:
        missing = next(key for key in few if few[key] != more[key])
        raise WeightsError(
            f"{path} seems to be {describe(arrays) or 'no model of torchvision or this package'}: "
            f"it has no entry {missing}, so it does not hold a {architecture.name}."
        )
    counts = [int(count) for count in found if count >= 1 and count == int(count)]
    return counts[0] if counts else 1  # of arrays that do not agree, `load_torchvision` says which


def array_shapes(model: AbstractDetector) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's arrays by torchvision's names; the model may be one of shapes alone."""
    leaves, structure = jax.tree.flatten(model)
    arrays = [hasattr(leaf, "shape") for leaf in leaves]
    # Each array's position in its place: as a number it takes no memory, which the shape might.
    numbers = [np.array(i) if is_array else leaves[i] for i, is_array in enumerate(arrays)]
    named = to_torchvision(jax.tree.unflatten(structure, numbers))
    return {name: leaves[int(number)].shape for name, number in named.items()}


def initialize(
    model: AbstractDetector, architecture: Architecture, path: str | os.PathLike
) -> tuple[AbstractDetector, tuple[str, ...]]:
    """`model` with the weights of a detector of its name, or of an ImageNet ResNet in its backbone, to be fine-tuned.

    Layers that tell classes apart keep their values if the file's detector has other classes, and so do those that
    tell anchors apart if it has other anchors.

    Returns the model, and a sentence on each kind of layer that was left as it was.
    """
    if not any(key.startswith("backbone.") for key in read_torchvision(path, model)):
        return load_torchvision_backbone(model, path), ()
    source = load_weights(Architecture(architecture.name, architecture.norm), path)
    arrays: dict[str, Shaped[np.ndarray, "..."]] = dict(to_torchvision(source))
    own: Mapping[str, Shaped[np.ndarray, "..."]] = to_torchvision(model)
    notes = []
    if source.num_classes != model.num_classes:
        notes.append(
            f"{path} knows {source.num_classes} classes and this model {model.num_classes}: "
            "the layers that tell classes apart start at random."
        )
        few, more = (array_shapes(Architecture(architecture.name, architecture.norm).shapes(n)) for n in (1, 2))
        arrays |= {key: own[key] for key in own if few[key] != more[key]}
    others = {key: own[key] for key in own if own[key].shape != arrays[key].shape}
    if others:
        notes.append(f"{path} has another number of anchors: the layers that tell them apart start at random.")
        arrays |= others
    return load_torchvision(model, arrays), tuple(notes)
