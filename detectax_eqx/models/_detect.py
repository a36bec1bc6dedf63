"""From an image as it was decoded to detections in its own pixels, in one program."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32, UInt8

from .._types import Batch, Detections
from ..ops import resize_image, resized_size
from ._faster_rcnn import FasterRCNN, Selection
from ._mask_rcnn import MaskRCNN


def detect(
    model: FasterRCNN | MaskRCNN,
    image: UInt8[Array | np.ndarray, "h w 3"],
    *,
    min_size: float = 800,
    max_size: float = 1333,
    canvas: tuple[int, int] | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    image_size: Int32[Array, " 2"] | None = None,
    resized: Int32[Array, " 2"] | None = None,
) -> Detections:
    """Finds the objects in an RGB image of any size; boxes are in that image's pixels.

    The image is resized so that its short side is `min_size`, unless its long side would exceed `max_size`
    (`resized_size`), and laid on a canvas of zeros, by default the smallest that is a multiple of 32. Everything is one
    program: `eqx.filter_jit(detect)` compiles once for each shape of image, and `jax.vmap` runs a stack of images.

    - `canvas`: `(height, width)` that the network sees, multiples of 32. An image too large for it is a `ValueError`.
    - `score_threshold`, `nms_threshold`, `max_detections`: see `box_detections`.
    - `image_size`, `resized`: for images padded bottom and right to a common shape, so that one program serves many
      sizes: each image's `(height, width)` within `image`, and what `resized_size` makes of it, both traced. Then
      `canvas` is required, and it must hold `resized`.

    Masks, if the model has any, stay in the frame of their box; `detectax_eqx.ops.paste_masks` puts them on an image.

    >>> import equinox as eqx, jax.random as jr
    >>> from detectax_eqx.models import FasterRCNN
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> image = jnp.zeros((50, 70, 3), jnp.uint8)
    >>> detections = eqx.filter_jit(detect)(model, image, min_size=64, max_size=96)
    >>> detections.boxes.shape
    (100, 4)
    """
    if (image_size is None) != (resized is None) or (image_size is not None and canvas is None):
        raise ValueError("image_size, resized and canvas go together: give all three for a padded image, or none.")
    if image_size is None or resized is None:
        static_size = resized_size((image.shape[0], image.shape[1]), min_size=min_size, max_size=max_size)
        smallest = -(-static_size[0] // 32) * 32, -(-static_size[1] // 32) * 32
        canvas = smallest if canvas is None else canvas
        if canvas[0] < static_size[0] or canvas[1] < static_size[1]:
            raise ValueError(
                f"canvas {canvas} is too small for an image resized to {static_size}. "
                f"Use at least {smallest}, or a smaller min_size and max_size."
            )
        image_size = jnp.array(image.shape[:2], jnp.int32)
        resized = jnp.array(static_size, jnp.int32)
    assert canvas is not None
    pixels = resize_image(
        jnp.asarray(image).astype(jnp.float32), image_size=image_size, output_size=resized, canvas=canvas
    )
    detections = model(pixels, resized, selection=Selection(score_threshold, nms_threshold, max_detections))
    ratio = image_size.astype(jnp.float32) / resized.astype(jnp.float32)
    scale = jnp.stack([ratio[1], ratio[0], ratio[1], ratio[0]])
    return replace(detections, boxes=detections.boxes * scale[None])


def detect_batch(
    model: FasterRCNN | MaskRCNN,
    batch: Batch,
    *,
    min_size: float = 800,
    max_size: float = 1333,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    mesh: Mesh | None = None,
) -> Detections:
    """`detect` for every image of a batch on the host, compiled once for each shape; boxes in its images' pixels.

    An image that would not fit `batch.canvas` is shrunk until it does.

    - `mesh`: devices to spread the images over, each working on its own; they must divide the batch.

    >>> import jax.random as jr
    >>> from detectax_eqx import Batch, Targets
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> sizes, ones = np.array([[40, 60]], np.int32), np.ones(1, np.int32)
    >>> nothing = Targets(np.zeros((1, 1, 4), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))
    >>> images = np.zeros((1, 64, 64, 3), np.uint8)
    >>> batch = Batch(images, sizes, sizes, nothing, ones, ones > 0, ones, canvas=(64, 96))
    >>> detect_batch(model, batch, min_size=64, max_size=96, max_detections=5).boxes.shape
    (1, 5, 4)
    """
    resized = [
        resized_size((int(height), int(width)), min_size=min_size, max_size=max_size, canvas=batch.canvas)
        for height, width in np.asarray(batch.image_sizes)
    ]
    options = {
        "canvas": batch.canvas,
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "max_detections": max_detections,
    }
    if mesh is not None and len(resized) % mesh.size:
        raise ValueError(f"mesh has {mesh.size} devices, which do not divide a batch of {len(resized)} images.")
    return _detect_images(model, batch.images, batch.image_sizes, np.array(resized, np.int32), options, mesh)


@eqx.filter_jit
def _detect_images(model, images, image_sizes, resized, options, mesh):
    arrays, static = eqx.partition(model, eqx.is_array)

    def run(arrays, *images):
        def one(image, image_size, resized):
            return detect(eqx.combine(arrays, static), image, image_size=image_size, resized=resized, **options)

        return jax.vmap(one)(*images)

    if mesh is not None:  # each device detects in its own images, and none leaves it
        whole, spread = PartitionSpec(), PartitionSpec(mesh.axis_names)
        run = jax.shard_map(run, mesh=mesh, in_specs=(whole, spread, spread, spread), out_specs=spread, check_vma=False)
    return run(arrays, jnp.asarray(images), jnp.asarray(image_sizes), jnp.asarray(resized))
