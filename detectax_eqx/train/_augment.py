"""Augmentation of one example inside the jitted step: pixels, boxes, masks and keypoints are transformed together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._types import Image, Targets
from ..ops import clip_boxes, resize_image


# ITU-R BT.601 luma, with which Pillow and torchvision convert RGB to gray.
LUMA = (0.299, 0.587, 0.114)


def augment(
    image: Image,
    image_size: Int32[Array | np.ndarray, " 2"],
    targets: Targets,
    *,
    canvas: tuple[int, int],
    min_sizes: Sequence[int],
    max_size: int,
    flip_probability: float = 0.5,
    scale_range: tuple[float, float] | None = None,
    square: bool = False,
    keypoint_pairs: Sequence[tuple[int, int]] = (),
    key: PRNGKeyArray,
) -> tuple[Float32[Array, "{canvas[0]} {canvas[1]} _"], Int32[Array, " 2"], Targets]:
    """Randomly resizes and flips an image with its ground truth, and places it on the canvas.

    Without `scale_range`, the short side is resized to one of `min_sizes`, drawn at random, or to less if the long side
    would exceed `max_size` or the image would not fit the canvas. The whole image stays visible. Side lengths are
    rounded down in exact integer arithmetic.

    With `scale_range`, applies large-scale jitter (arXiv:2012.07177, section 3): the largest size that fits the canvas
    is multiplied by a factor drawn uniformly from the range, and an image larger than the canvas is cropped at a random
    position; `min_sizes` and `max_size` are not used. Boxes are clipped to the crop, and boxes without area become
    invalid. `mask_boxes` are not clipped and may extend past the border, so the masks within them need no resampling.

    With `square`, for detectors that resize by `models.Square`, both sides are resized to one of `min_sizes` or, with
    `scale_range`, to a multiple of the canvas's, whatever the aspect ratio; `max_size` is not used.

    - `image`: on its source canvas, usually RGB. `image_size`: its `(height, width)` there. `targets`: in its pixels.
    - `canvas`: static `(height, width)` of the result.
    - `flip_probability`: the probability of a horizontal flip.
    - `keypoint_pairs`: indices of the keypoints that a flip exchanges, such as the left and right eye. Keypoints
      outside the crop become invisible.

    Returns the image (0..255, in the top-left corner of the canvas; the rest is 0), its size on the canvas, and its
    targets in pixels of the canvas.

    Raises a `ValueError` if an option is out of its range, or if `targets` has masks without `mask_boxes`.

    >>> image = jnp.full((4, 8, 3), 100, jnp.uint8)
    >>> boxes, labels, valid = jnp.array([[1.0, 1.0, 3.0, 2.0]]), jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    >>> image, size, targets = augment(image, jnp.array([4, 6]), Targets(boxes, labels, valid), canvas=(16, 16),
    ...                                min_sizes=[8], max_size=16, flip_probability=1.0, key=jr.key(0))
    >>> image.shape, size.tolist(), targets.boxes.tolist()
    ((16, 16, 3), [8, 12], [[6.0, 2.0, 10.0, 4.0]])
    """
    _check(min_sizes, max_size, flip_probability, scale_range, targets, keypoint_pairs)
    image_size = jnp.maximum(image_size, 1)  # padding of a batch may have size 0
    size_key, crop_key, flip_key = jr.split(key, 3)
    flip = jr.bernoulli(flip_key, jnp.asarray(flip_probability, jnp.float32))
    if scale_range is None:
        chosen = jr.randint(size_key, (), 0, len(min_sizes), jnp.int32)
        side = jnp.asarray(min_sizes, jnp.int32)[chosen]
        output_size = _square_size(side, canvas) if square else _resized_size(image_size, side, max_size, canvas)
        offset, visible_size = jnp.zeros(2, jnp.int32), output_size
    else:
        output_size = _jittered_size(jnp.asarray(canvas) if square else image_size, canvas, scale_range, size_key)
        visible_size = jnp.minimum(output_size, jnp.asarray(canvas, jnp.int32))
        offset = jr.randint(crop_key, (2,), 0, output_size - visible_size + 1, jnp.int32)
    resized = resize_image(
        jnp.asarray(image, jnp.float32),
        image_size=image_size,
        output_size=output_size,
        canvas=canvas,
        offset=offset,
        flip=flip,
    )

    def move(boxes: Float[Array | np.ndarray, "n 4"]) -> Float[Array, "n 4"]:
        return _move_boxes(jnp.asarray(boxes), image_size, output_size, offset, flip)

    targets = Targets(
        boxes=move(targets.boxes),
        labels=targets.labels,
        valid=targets.valid,
        masks=None if targets.masks is None else jnp.where(flip, targets.masks[..., ::-1], targets.masks),
        mask_boxes=None if targets.mask_boxes is None else move(targets.mask_boxes),
        keypoints=None if targets.keypoints is None else _move_points(targets.keypoints, move, flip, keypoint_pairs),
    )
    return resized, visible_size, targets if scale_range is None else _clip(targets, visible_size)


def jitter_colors(
    image: Float32[Array, "h w 3"],
    image_size: Int32[Array, " 2"],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    key: PRNGKeyArray,
) -> Float32[Array, "h w 3"]:
    """Multiplies brightness, contrast and saturation, in this order, by factors drawn from `1 ± strength`.

    Contrast is relative to the image's mean gray value, and saturation to each pixel's own gray value, as in
    torchvision's `ColorJitter`.

    - `image`: RGB 0..255, in the top-left `image_size` of its canvas. The rest of the canvas is 0 and stays 0.

    Raises a `ValueError` if a strength is not in 0..1.

    >>> image = jnp.full((2, 2, 3), 100.0)
    >>> bright = jitter_colors(image, jnp.array([2, 1]), contrast=0, saturation=0, key=jr.key(0))
    >>> bool(bright[0, 0, 0] != 100), bright[0, 1].tolist()
    (True, [0.0, 0.0, 0.0])
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        if not 0 <= strength <= 1:
            raise ValueError(f"{name} must be in 0..1, got {strength}.")
    spread = jnp.asarray(list(strengths.values()), jnp.float32)
    factors = 1 + spread * jr.uniform(key, (3,), jnp.float32, minval=-1.0, maxval=1.0)
    rows = jnp.arange(image.shape[0], dtype=jnp.int32)[:, None, None] < image_size[0]
    columns = jnp.arange(image.shape[1], dtype=jnp.int32)[None, :, None] < image_size[1]
    inside = rows & columns  # (h, w, 1)

    def gray(image: Float32[Array, "h w 3"]) -> Float32[Array, "h w 1"]:
        return jnp.sum(image * jnp.asarray(LUMA, image.dtype)[None, None], axis=-1, keepdims=True)

    def blend(image: Float32[Array, "h w 3"], other: Float32[Array, "..."], factor: Float32[Array, ""]) -> Array:
        return jnp.clip(other + factor * (image - other), 0.0, 255.0)

    image = blend(image, jnp.zeros((), jnp.float32), factors[0])
    count = jnp.maximum(jnp.sum(inside, dtype=jnp.int32), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(inside, gray(image), 0.0)) / count
    image = blend(image, mean, factors[1])
    image = blend(image, gray(image), factors[2])
    return jnp.where(inside, image, 0.0)


def _resized_size(
    image_size: Int32[Array, " 2"], min_size: Int32[Array, ""], max_size: int, canvas: tuple[int, int]
) -> Int32[Array, " 2"]:
    """Scales both sides by the smallest of four integer ratios, rounded down in exact arithmetic."""
    short, long = jnp.min(image_size), jnp.max(image_size)
    wanted = jnp.stack([min_size, *jnp.asarray([max_size, *canvas], jnp.int32)])
    present = jnp.stack([short, long, *image_size])
    # (4, 2); rounding down is monotonic, so the minimum of the sizes belongs to the smallest scale.
    sizes = image_size[None] * wanted[:, None] // present[:, None]
    return jnp.maximum(jnp.min(sizes, axis=0), 1)


def _square_size(side: Int32[Array, ""], canvas: tuple[int, int]) -> Int32[Array, " 2"]:
    """Both sides of a square, each at most that of the canvas."""
    return jnp.minimum(side, jnp.asarray(canvas, jnp.int32))


def _jittered_size(
    image_size: Int32[Array, " 2"], canvas: tuple[int, int], scale_range: tuple[float, float], key: PRNGKeyArray
) -> Int32[Array, " 2"]:
    """Scales both sides by a random multiple of the largest scale at which the image fits the canvas."""
    sides = image_size.astype(jnp.float32)
    fit = jnp.min(jnp.asarray(canvas, jnp.float32) / sides)
    scale = fit * jr.uniform(key, (), jnp.float32, minval=scale_range[0], maxval=scale_range[1])
    return jnp.maximum(jnp.floor(sides * scale).astype(jnp.int32), 1)


def _move_boxes(
    boxes: Float[Array, "n 4"],
    image_size: Int32[Array, " 2"],
    output_size: Int32[Array, " 2"],
    offset: Int32[Array, " 2"],
    flip: Bool[Array, ""],
) -> Float[Array, "n 4"]:
    """Boxes after the resize, flip and crop of their image, not clipped to its border."""
    scale = output_size.astype(boxes.dtype) / image_size.astype(boxes.dtype)
    x0, y0, x1, y1 = jnp.unstack(boxes * jnp.tile(scale[::-1], 2)[None], axis=-1)
    width = output_size[1].astype(boxes.dtype)
    x0, x1 = jnp.where(flip, width - x1, x0), jnp.where(flip, width - x0, x1)
    return jnp.stack([x0, y0, x1, y1], axis=-1) - jnp.tile(offset[::-1], 2).astype(boxes.dtype)[None]


def _move_points(
    keypoints: Float[Array | np.ndarray, "n k 3"],
    move: Callable[[Array], Array],
    flip: Bool[Array, ""],
    pairs: Sequence[tuple[int, int]],
) -> Float[Array, "n k 3"]:
    """Moves keypoints in the same way as boxes, and exchanges the pairs if the image is flipped."""
    keypoints = jnp.asarray(keypoints)
    places = keypoints[..., :2]
    boxes = jnp.concatenate([places, places], axis=-1)  # (n, k, 4), boxes of zero size
    moved = jnp.concatenate([move(boxes.reshape(-1, 4)).reshape(boxes.shape)[..., :2], keypoints[..., 2:]], axis=-1)
    order = np.arange(keypoints.shape[1])
    for left, right in pairs:
        order[[left, right]] = right, left
    return jnp.where(flip, moved[:, order], moved)


def _clip(targets: Targets, image_size: Int32[Array, " 2"]) -> Targets:
    """Clips boxes to the image. Boxes outside it become invalid, and keypoints outside it invisible."""
    size = image_size.astype(jnp.float32)
    boxes = clip_boxes(jnp.asarray(targets.boxes), size)
    visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    points = targets.keypoints
    if points is not None:
        inside = jnp.all((points[..., :2] >= 0) & (points[..., :2] <= size[::-1][None, None]), axis=-1, keepdims=True)
        points = jnp.concatenate([points[..., :2], jnp.where(inside, points[..., 2:], 0)], axis=-1)
    return replace(targets, boxes=boxes, valid=targets.valid & visible, keypoints=points)


def _check(
    min_sizes: Sequence[int],
    max_size: int,
    flip_probability: float,
    scale_range: tuple[float, float] | None,
    targets: Targets,
    keypoint_pairs: Sequence[tuple[int, int]],
) -> None:
    if not min_sizes or min(min_sizes) < 1:
        raise ValueError(f"min_sizes must hold one or more positive numbers, got {tuple(min_sizes)}.")
    if max_size < 1:
        raise ValueError(f"max_size must be positive, got {max_size}.")
    if not 0 <= flip_probability <= 1:
        raise ValueError(f"flip_probability must be in 0..1, got {flip_probability}.")
    if scale_range is not None and not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range must be positive and ascending, got {scale_range}.")
    if targets.masks is not None and targets.mask_boxes is None:
        raise ValueError("targets has masks but no mask_boxes; pass the box that each mask fills.")
    count = 0 if targets.keypoints is None else targets.keypoints.shape[-2]
    places = [place for pair in keypoint_pairs for place in pair]
    if len(set(places)) < len(places) or not all(0 <= place < count for place in places):
        raise ValueError(f"keypoint_pairs must name each of the {count} points at most once, got {keypoint_pairs}.")
