"""Converts the inputs of a predictor to pixels, with errors that identify common mistakes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from .._types import Images
from ..data import read_image


def is_folder(picture: Any) -> TypeGuard[str | os.PathLike]:
    """Whether `picture` is the path of a folder."""
    return isinstance(picture, str | os.PathLike) and Path(picture).is_dir()


def pixels_of(picture: Any, channels: int, max_pixels: int | None = None) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a path, URL, Pillow image or array, for a model with `channels` input channels.

    >>> pixels_of(np.zeros((2, 4, 5, 3), np.uint8), 3)
    Traceback (most recent call last):
    ValueError: The image has shape (2, 4, 5, 3), a batch: pass list(images).
    """
    if isinstance(picture, str | os.PathLike | Image.Image):
        source = picture if isinstance(picture, Image.Image) else str(picture)
        return read_image(source, max_pixels=max_pixels)
    if not hasattr(picture, "__array__"):
        raise TypeError(
            f"An image must be a path, a URL, a Pillow image or a uint8 array (h, w, {channels}), got "
            f"{type(picture).__module__}.{type(picture).__qualname__}."
        )
    array = np.asarray(picture)
    if array.ndim == 4:
        raise ValueError(f"The image has shape {array.shape}, a batch: pass list(images).")
    if array.ndim == 2:
        raise ValueError(
            f"The image has shape {array.shape}, grayscale: use np.repeat(image[..., None], {channels}, axis=2)."
        )
    if array.ndim != 3:
        raise ValueError(f"The image has shape {array.shape}, but images are (h, w, {channels}).")
    if array.shape[2] != channels:
        remedy = ""
        if array.shape[0] == channels:
            remedy = " Channels seem to come first: use image.transpose(1, 2, 0)."
        elif array.shape[2] == channels + 1:
            remedy = f" Drop alpha: image[..., :{channels}]."
        elif array.shape[2] == 1:
            remedy = f" Repeat the gray channel: np.repeat(image, {channels}, axis=2)."
        raise ValueError(f"The image has shape {array.shape}, but the model takes (h, w, {channels}).{remedy}")
    if array.dtype != np.uint8:
        fractions = array.dtype.kind == "f" and array.size and float(array.max()) <= 1
        remedy = "(image * 255).round().astype(np.uint8)" if fractions else "image.astype(np.uint8), if it is in 0..255"
        raise TypeError(f"The image has dtype {array.dtype}, but pixels are uint8, 0..255. Use {remedy}.")
    return array


def padded_images(
    arrays: Sequence[UInt8[np.ndarray, "_ _ c"]],
    source: tuple[int, int],
    canvas: tuple[int, int],
    *,
    count: int | None = None,
) -> Images:
    """A batch of images, each padded at the bottom and right to `source`.

    `count` is the batch size (default: the number of arrays). Rows beyond the arrays are blank and not valid.
    """
    count = len(arrays) if count is None else count
    pixels = np.zeros((count, *source, arrays[0].shape[2]), np.uint8)
    sizes = np.ones((count, 2), np.int32)
    for row, array in enumerate(arrays):
        height, width = array.shape[:2]
        pixels[row, :height, :width], sizes[row] = array, (height, width)
    indices = np.arange(count, dtype=np.int32)
    return Images(pixels, sizes, sizes, indices, np.arange(count) < len(arrays), canvas=canvas)
