"""Resampling of masks between the frame of a box and the pixels of an image."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Real

from .._xla import draw_stripes, rounded_product
from ._boxes import upcast
from ._sampling import FARTHEST, box_axis, check_sampling_ratio, output_bins, pixel_weights, sample_taps


# Pixel coordinates are clamped to this before the conversion to integers. It lies far outside any image.
FARTHEST_PIXEL = 2.0**30


def crop_masks(
    masks: Real[Array, "n hm wm"] | Bool[Array, "n hm wm"],
    mask_boxes: Float[Array, "n 4"],
    rois: Float[Array, "n 4"],
    *,
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Float[Array, "n p q"]:
    """Resamples each mask to a region of the image, with values in 0..1. These are the targets of a mask head.

    - `masks`: 0..255 if uint8, otherwise 0..1 or bool. Mask `i` fills the box `mask_boxes[i]` and is resampled to the
      region `rois[i]`. Both are `(x0, y0, x1, y1)` in pixels of the same image.
    - `output_size`: number of bins `(p, q)` per region, or one number for both.
    - `sampling_ratio`, `aligned`: as in `roi_align`. Each bin is the mean of `sampling_ratio**2` bilinear samples, or,
      if that is 0, of `ceil(roi side / output side)` samples along each axis.

    The value of a mask pixel belongs to its centre. So index `x` in the image, which is coordinate `x + 0.5`, is index
    `(x + 0.5 - x0) / (x1 - x0) * wm - 0.5` in a mask that spans `x0..x1`. For masks of image size in a box of image
    size, the result equals that of torchvision's `project_masks_on_boxes`. Detectron2 crops with `aligned=True`.
    A mask is 0 more than one mask pixel outside its box. The result is 0 for boxes without extent and non-finite boxes.

    Floating masks keep their dtype; other masks return float32. Differentiable in floating masks and in all boxes.

    Raises a `ValueError` for an `output_size` below 1 or a negative `sampling_ratio`.

    >>> masks = jnp.array([[[0, 255], [0, 255]]], jnp.uint8)
    >>> boxes = jnp.array([[10.0, 10.0, 14.0, 14.0]])
    >>> crop_masks(masks, boxes, boxes, output_size=(1, 4), aligned=True)[0].tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    rows, columns = output_bins(output_size)
    check_sampling_ratio(sampling_ratio)
    dtype = masks.dtype if jnp.issubdtype(masks.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    values = upcast(masks.astype(dtype))
    if masks.dtype == jnp.uint8:
        values = values / 255.0
    mask_boxes, rois = mask_boxes.astype(values.dtype), rois.astype(values.dtype)
    options = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    vertical = _crop_weights(mask_boxes[:, 1::2], rois[:, 1::2], masks.shape[1], rows, **options)  # (n, p, hm)
    horizontal = _crop_weights(mask_boxes[:, 0::2], rois[:, 0::2], masks.shape[2], columns, **options)  # (n, q, wm)
    values = jnp.einsum("nph,nhw->npw", vertical, values, precision="highest")  # (n, hm, wm) -> (n, p, wm)
    return jnp.einsum("npw,nqw->npq", values, horizontal, precision="highest").astype(dtype)  # (n, p, q)


def _crop_weights(
    frames: Float[Array, "n 2"], spans: Float[Array, "n 2"], size: int, bins: int, *, sampling_ratio: int, aligned: bool
) -> Float[Array, "n {bins} {size}"]:
    """Weight of every mask pixel in each bin along one axis. Masks fill `frames`, and regions cover `spans`."""
    start, length = box_axis(spans[:, 0], spans[:, 1], 1.0, bins=bins, aligned=aligned)
    extent = frames[:, 1] - frames[:, 0]
    has_extent = (extent > 1 / FARTHEST) & (jnp.abs(frames) < FARTHEST).all(axis=1)  # false for NaN
    # Mask position = image position * scale + shift
    scale = size / jnp.where(has_extent, extent, size)
    shift = rounded_product(0.5 - jnp.where(has_extent, frames[:, 0], 0), scale) - 0.5
    sizes, pixels = jnp.full(spans.shape[0], size, jnp.int32), jnp.arange(size, dtype=jnp.int32)[None, None, :]
    if sampling_ratio == 0:
        weights = pixel_weights(start, length, sizes, pixels, bins=bins, frame=(scale, shift))
    else:
        samples = jnp.arange(sampling_ratio, dtype=start.dtype)
        options = {"bins": bins, "sampling_ratio": sampling_ratio, "frame": (scale, shift)}
        taps, tap_weights = sample_taps(start, length, sizes, samples, **options)
        # (n, bins, t, 1) == (1, 1, 1, size), summed over taps -> (n, bins, size)
        weights = jnp.where(taps[..., None] == pixels[..., None, :], tap_weights[..., None], 0).sum(axis=2)
    return jnp.where(has_extent[:, None, None], weights, 0)


def paste_masks(
    masks: Float[Array, "n s t"],
    boxes: Float[Array, "n 4"],
    *,
    image_size: tuple[int, int],
    threshold: float | Real[Array, ""] | None = None,
) -> Float[Array, "n {image_size[0]} {image_size[1]}"] | Bool[Array, "n {image_size[0]} {image_size[1]}"]:
    """Pastes each mask into its box in an image of `image_size` = `(height, width)`. Pixels elsewhere are 0.

    - `masks`: values in the frame of their box, usually probabilities.
    - `boxes`: `(x0, y0, x1, y1)` in pixels of the image.
    - `threshold`: if given, the result is a bool mask of the pixels above it, which takes a quarter of the memory.

    Equals torchvision's `paste_masks_in_image` exactly. The mask is padded by one zero pixel on each side, and its box
    grows accordingly. The corners of the grown box are truncated towards zero, and both ends are included. The mask is
    resized to it bilinearly, with pixel values at pixel centres, and clipped to the image. A box without extent
    therefore still covers a few pixels. A box that is outside the image, inverted or not finite covers none.

    Differentiable in `masks`; boxes are truncated to integers and have no gradient. Without a threshold, the result has
    the dtype of `masks`.

    The result is large. To process one image after another, donate the previous result to a jitted call that reuses
    its memory, as in the last example.

    Raises a `ValueError` for an `image_size` below 1 or masks without pixels.

    >>> masks = jnp.array([[[1.0, 0.5], [0.25, 0.75]]])
    >>> paste_masks(masks, jnp.array([[2.0, 1.0, 3.5, 2.5]]), image_size=(3, 5))[0].tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.25, 0.75, 0.0]]
    >>> paste_masks(masks, jnp.array([[2.0, 1.0, 3.5, 2.5]]), image_size=(3, 5), threshold=0.5)[0, 2].tolist()
    [False, False, False, True, False]

    >>> def redraw(last, masks, boxes):
    ...     return paste_masks(masks, boxes, image_size=last.shape[1:])
    >>> redraw = jax.jit(redraw, donate_argnums=0, keep_unused=True)
    >>> pasted = jnp.zeros((1, 3, 5))
    >>> for x in 0.0, 1.0, 2.0:
    ...     pasted = redraw(pasted, masks, jnp.array([[x, 1.0, x + 1.5, 2.5]]))
    >>> pasted[0, 1].tolist()
    [0.0, 0.0, 1.0, 0.5, 0.0]
    """
    height, width = output_bins(image_size, "image_size")
    if 0 in masks.shape[1:]:
        raise ValueError(f"masks must have at least one row and column, got {masks.shape}.")
    values, boxes = upcast(masks), upcast(boxes)
    vertical = _paste_weights(boxes[:, 1], boxes[:, 3], masks.shape[1], height).astype(values.dtype)  # (n, h, s)
    horizontal = _paste_weights(boxes[:, 0], boxes[:, 2], masks.shape[2], width).astype(values.dtype)  # (n, w, t)
    return _pasted(vertical, values, horizontal, masks.dtype, threshold)


def paste_masks_at_centers(
    masks: Float[Array, "n s t"],
    boxes: Float[Array, "n 4"],
    *,
    image_size: tuple[int, int],
    threshold: float | Real[Array, ""] | None = None,
) -> Float[Array, "n {image_size[0]} {image_size[1]}"] | Bool[Array, "n {image_size[0]} {image_size[1]}"]:
    """Pastes each mask into its box by sampling the mask at the centres of the image's pixels, as in Detectron2.

    Arguments are those of `paste_masks`, but with `threshold`, a pixel belongs to the result if its value is at least
    the threshold. Boxes are not rounded. A pixel's centre at the fraction `u` of a box's width is at `u * t - 0.5` in a
    mask of `t` pixels, and mask pixels are interpolated bilinearly, with zeros outside of the mask. The result is thus
    not 0 up to half a mask pixel outside of the box. A box without extent, inverted or not finite covers no pixel.

    Equals Detectron2's `paste_masks_in_image`. Differentiable in `masks`; boxes have no gradient. Without a threshold,
    the result has the dtype of `masks`.

    Raises a `ValueError` for an `image_size` below 1 or masks without pixels.

    >>> masks, boxes = jnp.array([[[1.0, 0.5]]]), jnp.array([[1.0, 0.0, 5.0, 1.0]])
    >>> paste_masks_at_centers(masks, boxes, image_size=(1, 6))[0].tolist()
    [[0.25, 0.75, 0.875, 0.625, 0.375, 0.125]]
    >>> paste_masks_at_centers(masks, boxes, image_size=(1, 6), threshold=0.625)[0].tolist()
    [[False, True, True, True, False, False]]
    """
    height, width = output_bins(image_size, "image_size")
    if 0 in masks.shape[1:]:
        raise ValueError(f"masks must have at least one row and column, got {masks.shape}.")
    values, boxes = upcast(masks), lax.stop_gradient(upcast(boxes))
    vertical = _center_weights(boxes[:, 1], boxes[:, 3], masks.shape[1], height).astype(values.dtype)  # (n, h, s)
    horizontal = _center_weights(boxes[:, 0], boxes[:, 2], masks.shape[2], width).astype(values.dtype)  # (n, w, t)
    if threshold is not None:  # at least the threshold: above the next smaller number
        threshold = jnp.nextafter(jnp.asarray(threshold, masks.dtype), jnp.asarray(-jnp.inf, masks.dtype))
    return _pasted(vertical, values, horizontal, masks.dtype, threshold)


def resize_masks(
    masks: Float[Array, "n s t"],
    boxes: Float[Array, "n 4"],
    *,
    image_size: tuple[int, int],
    threshold: float | Real[Array, ""] | None = None,
) -> Float[Array, "n {image_size[0]} {image_size[1]}"] | Bool[Array, "n {image_size[0]} {image_size[1]}"]:
    """Resizes each mask to its box by bilinear interpolation of its logits, and puts it into an image. 0 elsewhere.

    Arguments are those of `paste_masks`; masks are probabilities. This is for masks of the whole image, whose box is
    the image: at the edge, the outermost pixels of a mask extend to the edge, as in torch's `interpolate`. Pixels whose
    centre is outside the box are 0. A box without extent, inverted or not finite covers no pixel.

    Equals RF-DETR, which interpolates logits and compares them with 0, for a threshold of 0.5, up to logits of 16:
    float32 rounds the probabilities of larger ones to 1. Differentiable in `masks`; boxes have no gradient. Without a
    threshold, the result has the dtype of `masks`.

    Raises a `ValueError` for an `image_size` below 1 or masks without pixels.

    >>> masks, boxes = jnp.array([[[0.75, 0.25]]]), jnp.array([[0.0, 0.0, 4.0, 1.0]])
    >>> [round(value, 3) for value in resize_masks(masks, boxes, image_size=(1, 5))[0, 0].tolist()]
    [0.75, 0.634, 0.366, 0.25, 0.0]
    >>> resize_masks(masks, boxes, image_size=(1, 5), threshold=0.5)[0].tolist()
    [[True, True, False, False, False]]
    """
    height, width = output_bins(image_size, "image_size")
    if 0 in masks.shape[1:]:
        raise ValueError(f"masks must have at least one row and column, got {masks.shape}.")
    values, boxes = upcast(masks), lax.stop_gradient(upcast(boxes))
    info = jnp.finfo(values.dtype)
    values = jnp.clip(values, info.tiny, 1 - info.epsneg)  # the probabilities next to 0 and 1, whose logits are finite
    logits = jnp.log(values) - jnp.log1p(-values)
    vertical, rows = _stretch_weights(boxes[:, 1], boxes[:, 3], masks.shape[1], height)  # (n, h, s), (n, h)
    horizontal, columns = _stretch_weights(boxes[:, 0], boxes[:, 2], masks.shape[2], width)  # (n, w, t), (n, w)
    resized = _resample(vertical.astype(values.dtype), logits, horizontal.astype(values.dtype))
    inside = rows[:, :, None] & columns[:, None, :]
    result = jnp.where(inside, jax.nn.sigmoid(resized), 0).astype(masks.dtype)
    return result if threshold is None else result > jnp.asarray(threshold, masks.dtype)


def _stretch_weights(
    low: Float[Array, " n"], high: Float[Array, " n"], size: int, canvas: int
) -> tuple[Float[Array, "n {canvas} {size}"], Bool[Array, "n {canvas}"]]:
    """Weight of every mask pixel at the centre of each image pixel along one axis, and which centres are inside."""
    has_extent = (high > low) & (jnp.abs(low) < FARTHEST_PIXEL) & (jnp.abs(high) < FARTHEST_PIXEL)  # false for NaN
    low, extent = jnp.where(has_extent, low, 0)[:, None], jnp.where(has_extent, high - low, 1)[:, None]  # (n, 1)
    center = jnp.arange(canvas, dtype=low.dtype)[None] + 0.5
    fraction = (center - low) / extent  # (n, canvas)
    source = jnp.clip(fraction * size - 0.5, 0, size - 1)
    distance = jnp.abs(source[:, :, None] - jnp.arange(size, dtype=low.dtype)[None, None])
    return jnp.maximum(1 - distance, 0), has_extent[:, None] & (fraction >= 0) & (fraction <= 1)


def _pasted(vertical, values, horizontal, dtype, threshold):
    """Pastes masks with given weights; a bool mask of the pixels above `threshold` unless that is `None`."""
    if threshold is None:
        return _paste(vertical, values, horizontal, dtype)
    threshold = jnp.broadcast_to(jnp.asarray(threshold, dtype), values.shape[:1])
    return _draw(*lax.stop_gradient((vertical, values, horizontal, threshold)), dtype=dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _paste(vertical, values, horizontal, dtype):
    return _draw(vertical, values, horizontal, None, dtype=dtype)


@_paste.defjvp
def _differentiate(dtype, primals, tangents):
    vertical, _, horizontal = primals  # the weights have no gradient
    return _paste(*primals, dtype), _resample(vertical, tangents[1], horizontal).astype(dtype)


def _resample(vertical, values, horizontal):
    rows = jnp.einsum("nhs,nst->nht", vertical, values, precision="highest")  # (n, h, t)
    return jnp.einsum("nht,nwt->nhw", rows, horizontal, precision="highest")  # (n, h, w)


@partial(jax.jit, static_argnames="dtype")
def _draw(vertical, values, horizontal, threshold, *, dtype):
    """Pastes the masks `values` with the given weights, and applies one threshold per mask unless it is `None`."""

    def finish(values, threshold):
        values = values.astype(dtype)
        return values if threshold is None else values > threshold[:, None, None]

    def draw(vertical, values, horizontal, threshold):
        return finish(_resample(vertical, values, horizontal), threshold)

    def draw_empty(values, horizontal, threshold):
        return finish(jnp.zeros((values.shape[0], 1, horizontal.shape[1])), threshold)

    return draw_stripes(draw, draw_empty, vertical, values, horizontal, threshold)


def _paste_weights(
    low: Float[Array, " n"], high: Float[Array, " n"], size: int, canvas: int
) -> Float[Array, "n {canvas} {size}"]:
    """Weight of every mask pixel in each image pixel along one axis."""
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(finite, low, 0), jnp.where(finite, high, 0)
    half = rounded_product((high - low) * 0.5, (size + 2) / size)  # with the padding
    middle = (low + high) * 0.5
    first, last = _integer(middle - half)[:, None, None], _integer(middle + half)[:, None, None]  # (n, 1, 1)
    extent = jnp.maximum(last - first + 1, 1)

    pixel = jnp.arange(canvas, dtype=jnp.int32)[None, :, None]
    padded = size + 2
    step = padded / extent.astype(low.dtype)  # mask pixels per image pixel
    source = jnp.maximum(((pixel - first).astype(low.dtype) + 0.5) * step - 0.5, 0)  # (n, canvas, 1)
    below = jnp.minimum(source.astype(jnp.int32), padded - 1)
    fraction = source - below.astype(low.dtype)  # weight of the next mask pixel
    # Positions beyond the last padding pixel read that pixel. Padding is 0, so its weights are left out.
    row = jnp.arange(1, size + 1, dtype=jnp.int32)[None, None, :]
    weight = jnp.where(row == below, 1 - fraction, jnp.where(row == below + 1, fraction, 0))  # (n, canvas, size)
    return jnp.where((pixel >= first) & (pixel <= last) & finite[:, None, None], weight, 0)


def _center_weights(
    low: Float[Array, " n"], high: Float[Array, " n"], size: int, canvas: int
) -> Float[Array, "n {canvas} {size}"]:
    """Weight of every mask pixel at the centre of each image pixel along one axis."""
    has_extent = (high > low) & (jnp.abs(low) < FARTHEST_PIXEL) & (jnp.abs(high) < FARTHEST_PIXEL)  # false for NaN
    low, extent = jnp.where(has_extent, low, 0)[:, None], jnp.where(has_extent, high - low, 1)[:, None]  # (n, 1)
    center = jnp.arange(canvas, dtype=low.dtype)[None] + 0.5
    source = rounded_product((center - low) / extent, float(size)) - 0.5  # (n, canvas), in mask pixels
    # The triangle 1 - |x - i| is the bilinear weight of pixel i at the position x.
    distance = jnp.abs(source[:, :, None] - jnp.arange(size, dtype=low.dtype)[None, None])
    return jnp.where(has_extent[:, None, None], jnp.maximum(1 - distance, 0), 0)


def _integer(x: Float[Array, " n"]) -> Int32[Array, " n"]:
    return jnp.clip(x, -FARTHEST_PIXEL, FARTHEST_PIXEL).astype(jnp.int32)
