"""From an image as it was decoded to detections in its own pixels, in one program."""

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
from ..ops import resize_image
from ._detector import AbstractDetector, Selection, SelectionT


# No picture has so few rows and more channels than this: then channels come first.
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
    """Finds the objects in an image of any size; boxes are in that image's pixels.

    The image is resized by `model.preprocessing` and laid on a canvas of zeros, by default the smallest whose sides are
    multiples of `model.backbone.divisor`. Everything is one program: `eqx.filter_jit(detect)` compiles once for each
    shape of image, and `jax.vmap` runs a stack of images. Called outside of `jit` it runs operation by operation, some
    sixty times slower, and warns once.

    - `image`: uint8 `(h, w, c)`, with as many channels as the model takes, usually RGB.
    - `canvas`: `(height, width)` that the network sees. An image too large for it is a `ValueError`.
    - `selection`: which detections are kept, the detector's own dataclass; default `model.selection`.
      `score_threshold` and `max_detections`, if given, replace its fields.
    - `source_size`, `canvas_size`: for images padded bottom and right to a common shape, so that one program serves
      many sizes: each image's `(height, width)` within `image`, and after its resize by `model.preprocessing.resize`,
      both traced. Then `canvas` is required, and it must hold `canvas_size`.

    Masks, if the model has any, stay in the frame of their box; `detectax_eqx.ops.paste_masks` puts them on an image.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import Preprocessing, ShortestEdge, faster_rcnn
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model = replace(model, preprocessing=Preprocessing(ShortestEdge(64, 96)))
    >>> detections = eqx.filter_jit(detect)(model, jnp.zeros((50, 70, 3), jnp.uint8))
    >>> detections.boxes.shape
    (100, 4)
    """
    if image.shape[0] <= MAX_CHANNELS_FIRST < image.shape[2]:
        raise ValueError(
            f"image has shape {image.shape}: channels come last, (h, w, c), and here they seem to come first. "
            f"Use image.transpose(1, 2, 0)."
        )
    if (source_size is None) != (canvas_size is None) or (source_size is not None and canvas is None):
        raise ValueError("source_size, canvas_size and canvas go together: give all three for a padded image, or none.")
    if source_size is None or canvas_size is None:
        static_size = model.preprocessing.resize((image.shape[0], image.shape[1]))
        smallest = smallest_canvas(static_size, divisor=model.backbone.divisor)
        canvas = smallest if canvas is None else canvas
        if canvas[0] < static_size[0] or canvas[1] < static_size[1]:
            raise ValueError(
                f"canvas {canvas} is too small for an image resized to {static_size}. "
                f"Use at least {smallest}, or a model whose preprocessing resizes to less."
            )
        source_size = jnp.array(image.shape[:2], jnp.int32)
        canvas_size = jnp.array(static_size, jnp.int32)
    assert canvas is not None
    pixels = resize_image(
        jnp.asarray(image).astype(jnp.float32), image_size=source_size, output_size=canvas_size, canvas=canvas
    )
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((model, image, pixels))):
        _advise_jit()
    chosen = selected(model, selection, score_threshold=score_threshold, max_detections=max_detections)
    detections = model(pixels, canvas_size, selection=chosen)
    ratio = source_size.astype(jnp.float32) / canvas_size.astype(jnp.float32)
    scale = jnp.stack([ratio[1], ratio[0], ratio[1], ratio[0]])
    points = detections.keypoints
    if points is not None:
        points = points * jnp.concatenate([scale[:2], jnp.ones(1, jnp.float32)])[None, None]
    return replace(detections, boxes=detections.boxes * scale[None], keypoints=points)


@cache
def _advise_jit() -> None:
    """Warns, once per process."""
    warnings.warn(
        "detect runs without jit, operation by operation, which is many times slower. "
        "Compile it: detect = eqx.filter_jit(detectax_eqx.models.detect).",
        stacklevel=2,
    )


def smallest_canvas(size: tuple[int, int], *, divisor: int) -> tuple[int, int]:
    """The smallest `(height, width)` of multiples of `divisor` that holds `size`.

    >>> smallest_canvas((800, 1066), divisor=32)
    (800, 1088)
    """
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor


def selected(model: AbstractDetector[SelectionT], selection: SelectionT | None = None, **fields: Any) -> SelectionT:
    """`selection`, or else the model's own, with those of `fields` that are not `None` replaced.

    Raises a `ValueError` that lists the fields there are if one is unknown.
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
    """`detect` for every one of a batch of images on the host, compiled once for each shape; boxes in their pixels.

    An image that would not fit `images.canvas` is shrunk until it does.

    - `selection`, `score_threshold`, `max_detections`: as for `detect`.
    - `mesh`: devices to spread the images over, each working on its own; they must divide the batch.

    >>> import jax.random as jr
    >>> from detectax_eqx import Images
    >>> from detectax_eqx.models import Preprocessing, ShortestEdge, faster_rcnn
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
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

    if mesh is not None:  # each device detects in its own images, and none leaves it
        whole, spread = PartitionSpec(), PartitionSpec(mesh.axis_names)
        run = jax.shard_map(run, mesh=mesh, in_specs=(whole, spread, spread, spread), out_specs=spread, check_vma=False)
    return run(arrays, jnp.asarray(images), jnp.asarray(source_sizes), jnp.asarray(canvas_sizes))
