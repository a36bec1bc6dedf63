"""Detection in images of any size, resize included, with boxes in the pixels of the image."""

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32

from .._types import Detections, Image, Images
from ._detector import AbstractDetector, Selection, SelectionT


# An image with at most this many rows but more channels is taken to be channels first.
MAX_CHANNELS_FIRST = 4


def detect(
    model: AbstractDetector,
    image: Image,
    *,
    canvas: tuple[int, int] | None = None,
    selection: Selection | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    source_size: Int32[Array, " 2"] | None = None,
    canvas_size: Int32[Array, " 2"] | None = None,
) -> Detections:
    """Detects objects in an image of any size; boxes are in the pixels of that image.

    The image is resized by `model.preprocessing` and placed on a canvas of zeros, by default the smallest whose sides
    are multiples of `model.backbone.divisor`, or a square one if the preprocessing says so.
    `eqx.filter_jit(detect)` compiles one program per image shape, and `jax.vmap` maps over a stack of images. Outside
    `jit`, operations run one by one, which is about sixty times slower, and a warning is issued once.

    - `image`: uint8 `(h, w, c)`, with as many channels as the model expects, usually RGB.
    - `canvas`: `(height, width)` of the network's input. Raises a `ValueError` if the image does not fit.
    - `selection`: which detections to keep, an instance of the detector's own dataclass; default `model.selection`.
      `score_threshold` and `max_detections`, if given, replace its fields.
    - `source_size`, `canvas_size`: for images padded at the bottom and right to a common shape, so that one program
      serves many sizes. They are the image's `(height, width)` within `image`, and after its resize by
      `model.preprocessing.resize`; both are traced. `canvas` is then required and must hold `canvas_size`.

    Masks, if any, stay in their frame; `model.paste` puts them onto an image.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import Preprocessing, ShortestEdge, faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model = replace(model, preprocessing=Preprocessing(ShortestEdge(64, 96)))
    >>> detections = eqx.filter_jit(detect)(model, jnp.zeros((50, 70, 3), jnp.uint8))
    >>> detections.boxes.shape
    (100, 4)
    """
    if image.shape[0] <= MAX_CHANNELS_FIRST < image.shape[2]:
        raise ValueError(
            f"image has shape {image.shape}: expected (h, w, c), but channels seem to come first. "
            f"Use image.transpose(1, 2, 0)."
        )
    if (source_size is None) != (canvas_size is None) or (source_size is not None and canvas is None):
        raise ValueError("source_size, canvas_size and canvas go together: give all three for a padded image, or none.")
    if source_size is None or canvas_size is None:
        static_size = model.preprocessing.resize((image.shape[0], image.shape[1]))
        smallest = smallest_canvas(model.preprocessing.canvas(static_size), divisor=model.backbone.divisor)
        canvas = smallest if canvas is None else canvas
        if canvas[0] < static_size[0] or canvas[1] < static_size[1]:
            raise ValueError(
                f"canvas {canvas} is too small for an image resized to {static_size}. "
                f"Use at least {smallest}, or a model whose preprocessing resizes to a smaller size."
            )
        source_size = jnp.array(image.shape[:2], jnp.int32)
        canvas_size = jnp.array(static_size, jnp.int32)
    assert canvas is not None
    pixels = model.preprocessing.place(
        jnp.asarray(image), image_size=source_size, output_size=canvas_size, canvas=canvas
    )
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((model, image, pixels))):
        _advise_jit()
    chosen = selected(model, selection, score_threshold=score_threshold, max_detections=max_detections)
    detections = model(pixels, canvas_size, selection=chosen)
    ratio = source_size.astype(jnp.float32) / canvas_size.astype(jnp.float32)
    scale = jnp.stack([ratio[1], ratio[0], ratio[1], ratio[0]])  # (4,): x y x y
    points = detections.keypoints
    if points is not None:
        places = points[..., :2] * scale[None, None, :2] - model.keypoint_offset
        points = jnp.concatenate([places, points[..., 2:]], axis=-1)
    frames = None if detections.mask_boxes is None else detections.mask_boxes * scale[None]
    return replace(detections, boxes=detections.boxes * scale[None], keypoints=points, mask_boxes=frames)


@cache
def _advise_jit() -> None:
    """Warns once per process."""
    warnings.warn(
        "detect was called outside jit and runs operation by operation, which is many times slower. "
        "Compile it: detect = eqx.filter_jit(detectax_eqx.models.detect).",
        stacklevel=2,
    )


def smallest_canvas(size: tuple[int, int], *, divisor: int) -> tuple[int, int]:
    """Returns the smallest `(height, width)` that holds `size` and whose sides are multiples of `divisor`.

    >>> smallest_canvas((800, 1066), divisor=32)
    (800, 1088)
    """
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor


def selected(model: AbstractDetector[SelectionT], selection: SelectionT | None = None, **fields: Any) -> SelectionT:
    """Returns `selection`, by default the model's own, with those `fields` replaced that are not `None`.

    Raises a `ValueError` that lists the known fields if one is unknown.
    """
    selection = model.selection if selection is None else selection
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return replace(selection, **given)  # type: ignore[type-var]
    except TypeError:
        known = ", ".join(vars(selection))
        unknown = ", ".join(name for name in given if name not in vars(selection))
        raise ValueError(f"{type(selection).__name__} has no {unknown}; its fields are {known}.") from None


def detect_batch(
    model: AbstractDetector,
    images: Images,
    *,
    selection: Selection | None = None,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    mesh: Mesh | None = None,
) -> Detections:
    """Runs `detect` on a batch of images on the host, compiled once per shape; boxes are in the pixels of each image.

    An image that does not fit `images.canvas` is shrunk until it does.

    - `selection`, `score_threshold`, `max_detections`: as for `detect`.
    - `mesh`: devices to shard the images over, each processing its own; their number must divide the batch size.

    >>> import jax.random as jr
    >>> from detectax_eqx import Images
    >>> from detectax_eqx.models import Preprocessing, ShortestEdge, faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model = replace(model, preprocessing=Preprocessing(ShortestEdge(64, 96)))
    >>> sizes, indices = np.array([[40, 60]], np.int32), np.array([0], np.int32)
    >>> pixels = np.zeros((1, 64, 64, 3), np.uint8)
    >>> images = Images(pixels, sizes, sizes, indices, np.array([True]), canvas=(64, 96))
    >>> detect_batch(model, images, max_detections=5).boxes.shape
    (1, 5, 4)
    """
    resized = [
        model.preprocessing.resize((int(height), int(width)), canvas=images.canvas)
        for height, width in np.asarray(images.sizes)
    ]
    if mesh is not None and len(resized) % mesh.size:
        raise ValueError(f"mesh has {mesh.size} devices, which do not divide a batch of {len(resized)} images.")
    chosen = selected(model, selection, score_threshold=score_threshold, max_detections=max_detections)
    sizes = np.array(resized, np.int32)
    return _detect_images(model, images.pixels, images.sizes, sizes, images.canvas, chosen, mesh)


@eqx.filter_jit
def _detect_images(model, images, source_sizes, canvas_sizes, canvas, selection, mesh):
    arrays, static = eqx.partition(model, eqx.is_array)

    def run(arrays, *images):
        def one(image, source_size, canvas_size):
            model = eqx.combine(arrays, static)
            options = {"canvas": canvas, "selection": selection}
            return detect(model, image, source_size=source_size, canvas_size=canvas_size, **options)

        return jax.vmap(one)(*images)

    if mesh is not None:  # each device processes its own images, without communication
        whole, spread = PartitionSpec(), PartitionSpec(mesh.axis_names)
        run = jax.shard_map(run, mesh=mesh, in_specs=(whole, spread, spread, spread), out_specs=spread, check_vma=False)
    return run(arrays, jnp.asarray(images), jnp.asarray(source_sizes), jnp.asarray(canvas_sizes))
