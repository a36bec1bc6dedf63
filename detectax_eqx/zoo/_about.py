"""The metadata of a weights file: categories, preprocessing and canvases."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data import CANVASES, Category
from ..models import AbstractDetector, Preprocessing, ShortestEdge, Square, smallest_canvas


ABOUT = "detector"  # the key in the metadata of a safetensors file

Canvases = tuple[tuple[int, int], ...]


def canvases(model: AbstractDetector) -> Canvases:
    """The canvases on which a detector's images fit: one for a square, a wide and a tall one otherwise.

    For the usual sizes, 800 and 1333, these are `data.CANVASES`. The model may consist of shapes only.

    >>> import equinox as eqx, jax.random as jr
    >>> from detectax_eqx import zoo
    >>> model = eqx.filter_eval_shape(zoo.build, "faster_rcnn_mobilenet_v3_large_320_fpn", 3, key=jr.key(0))
    >>> canvases(model)
    ((320, 640), (640, 320))
    """
    resize, divisor = model.preprocessing.resize, model.backbone.divisor
    if isinstance(resize, Square):
        return (smallest_canvas((resize.size, resize.size), divisor=divisor),)
    if resize == ShortestEdge() and not model.preprocessing.square_canvas:
        return CANVASES
    short, long = int(resize.min_size), int(max(resize.min_size, resize.max_size))
    height, width = smallest_canvas(model.preprocessing.canvas((short, long)), divisor=divisor)
    return ((height, width),) if height == width else ((height, width), (width, height))


def about(
    model: AbstractDetector, categories: Sequence[Category] | None, canvases: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """The metadata that `with_about` reads."""
    content = {
        "categories": None if categories is None else [asdict(category) for category in categories],
        "preprocessing": asdict(model.preprocessing),
        "canvases": canvases,
    }
    return {ABOUT: json.dumps(content)}


def with_about(
    model: AbstractDetector, metadata: Mapping[str, str], path: Path
) -> tuple[AbstractDetector, tuple[Category, ...] | None, Canvases | None]:
    """Applies a file's metadata: the model with its preprocessing, the categories, and the canvases.

    Categories and canvases are `None` if the metadata has no such entry. Raises a `ValueError` that names the file if
    the metadata is damaged.
    """
    if ABOUT not in metadata:
        return model, None, None
    try:
        content = json.loads(metadata[ABOUT])
        categories = None if content["categories"] is None else categories_of(content)
        if categories is not None and len(categories) != model.num_classes:
            raise ValueError(f"{len(categories)} categories for {model.num_classes} classes")
        canvases = tuple((int(height), int(width)) for height, width in content["canvases"])
        return replace(model, preprocessing=preprocessing_of(content)), categories, canvases
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata {ABOUT!r} is not what save_weights writes ({error!r}).") from None


def categories_of(content: Mapping[str, Any]) -> tuple[Category, ...]:
    """The categories in the metadata of a checkpoint or a weights file."""
    return tuple(map(Category.from_fields, content["categories"]))


def preprocessing_of(content: Mapping[str, Any]) -> Preprocessing:
    """A model's preprocessing from the metadata of checkpoints and exports (`dataclasses.asdict` as JSON).

    Older files, written when only `ShortestEdge` existed, have just `min_size` and `max_size`.
    """
    if "preprocessing" not in content:
        return Preprocessing(ShortestEdge(content["min_size"], content["max_size"]))
    fields = content["preprocessing"]
    resize = (Square if "size" in fields["resize"] else ShortestEdge)(**fields["resize"])
    # Older files, written before there was a choice, lack the last two.
    choices = {name: bool(fields.get(name, False)) for name in ("pillow", "square_canvas")}
    return Preprocessing(resize, tuple(fields["mean"]), tuple(fields["std"]), **choices)
