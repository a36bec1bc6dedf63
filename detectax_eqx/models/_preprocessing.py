"""Preprocessing of a detector's images: a resize rule, then normalisation by mean and standard deviation."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32, Real, UInt8

from ..ops import resize_image, resize_image_pillow, resized_size


# Mean and standard deviation of ImageNet pixels, RGB in 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclass(frozen=True)
class ShortestEdge:
    """Resizes the short side to `min_size`, or less so that the long side does not exceed `max_size`.

    The aspect ratio is kept. Rule and defaults are torchvision's. Computed on the host in double precision, see
    `ops.resized_size`.

    - `rounded`: whether sides are rounded to the nearest pixel, as in Detectron2, rather than down.
    - `rounded_short`: whether the short side is, and the long side rounded down, as in Hugging Face's DETR.

    >>> ShortestEdge(800, 1333)((480, 640)), ShortestEdge(800, 1333, rounded=True)((480, 640))
    ((800, 1066), (800, 1067))
    """

    min_size: float = 800
    max_size: float = 1333
    rounded: bool = False
    rounded_short: bool = False

    def __post_init__(self) -> None:
        if self.rounded and self.rounded_short:
            raise ValueError("rounded and rounded_short exclude each other, got both.")
        if self.min_size <= 0 or self.max_size <= 0:
            raise ValueError(f"min_size and max_size must be positive, got {self.min_size} and {self.max_size}.")

    def __call__(self, source_size: tuple[int, int], *, canvas: tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns `(height, width)` after the resize, shrunk further to fit `canvas` if given."""
        size = resized_size(source_size, min_size=self.min_size, max_size=self.max_size, canvas=canvas)
        if not (self.rounded or self.rounded_short):
            return size
        height, width = (np.full((1, 1), side, np.float64) for side in source_size)
        sides = self._nearest if self.rounded else self._nearest_short
        height, width = sides(height, width, canvas)[0, 0].tolist()
        return height, width

    def table(self, source: tuple[int, int], *, canvas: tuple[int, int]) -> Int[np.ndarray, "h w 2"]:
        """Tabulates `__call__` for sizes up to `source`: entry `(i, j)` is for an image of `(i + 1, j + 1)` pixels."""
        height, width = (np.arange(1, side + 1, dtype=np.float64) for side in source)
        height, width = height[:, None], width[None, :]  # (h, 1) and (1, w)
        if self.rounded:
            return self._nearest(height, width, canvas)
        if self.rounded_short:
            return self._nearest_short(height, width, canvas)
        scale = np.minimum(self.min_size / np.minimum(height, width), self.max_size / np.maximum(height, width))
        scale = np.minimum(scale, np.minimum(canvas[0] / height, canvas[1] / width))  # (h, w)
        return np.maximum(1, np.floor(np.stack([height * scale, width * scale], axis=2))).astype(np.int32)

    def _nearest(
        self, height: Float64[np.ndarray, "h 1"], width: Float64[np.ndarray, "1 w"], canvas: tuple[int, int] | None
    ) -> Int[np.ndarray, "h w 2"]:
        """The size after the resize by Detectron2's rule, in its order of operations, which decides ties."""
        scale, is_wide = self.min_size / np.minimum(height, width), height < width  # (h, w)
        # The short side is `min_size` exactly, without a product that may round.
        sides = [
            np.where(is_wide, self.min_size, scale * height),
            np.where(is_wide, scale * width, self.min_size),
        ]
        limit = np.minimum(1, self.max_size / np.maximum(*sides))
        sides = [side * limit for side in sides]
        if canvas is not None:
            limit = np.minimum(1, np.minimum(canvas[0] / sides[0], canvas[1] / sides[1]))
            sides = [side * limit for side in sides]
        size = np.maximum(1, np.floor(np.stack(sides, axis=2) + 0.5)).astype(np.int32)
        return size if canvas is None else np.minimum(size, np.array(canvas, np.int32)[None, None])

    def _nearest_short(
        self, height: Float64[np.ndarray, "h 1"], width: Float64[np.ndarray, "1 w"], canvas: tuple[int, int] | None
    ) -> Int[np.ndarray, "h w 2"]:
        """The size after the resize by the rule of Hugging Face's DETR, in its order of operations."""
        short, long = np.minimum(height, width), np.maximum(height, width)  # (h, w)
        limited = long / short * self.min_size > self.max_size
        exact = np.where(limited, self.max_size * short / long, self.min_size)
        nearest, is_wide = np.rint(exact), height <= width
        other = np.where(nearest == short, long, np.floor(exact * long / short))  # not resized if the short side is not
        size = np.stack([np.where(is_wide, nearest, other), np.where(is_wide, other, nearest)], axis=2)
        if canvas is not None:
            limit = np.minimum(1, np.min(np.array(canvas)[None, None] / np.maximum(size, 1), axis=2, keepdims=True))
            size = np.floor(size * limit)
        return np.maximum(1, size).astype(np.int32)


@dataclass(frozen=True)
class Square:
    """Resizes both sides to `size` pixels, whatever the aspect ratio.

    >>> Square(640)((480, 640))
    (640, 640)
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}.")

    def __call__(self, source_size: tuple[int, int], *, canvas: tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns `(height, width)` after the resize, with each side shrunk to fit `canvas` if given."""
        if min(source_size) < 1:
            raise ValueError(f"source_size must be positive, got {source_size[0]}×{source_size[1]}.")
        limit = (self.size, self.size) if canvas is None else canvas
        return min(self.size, limit[0]), min(self.size, limit[1])

    def table(self, source: tuple[int, int], *, canvas: tuple[int, int]) -> Int[np.ndarray, "h w 2"]:
        """Tabulates `__call__` for sizes up to `source`: entry `(i, j)` is for an image of `(i + 1, j + 1)` pixels."""
        return np.broadcast_to(np.array(self(source, canvas=canvas), np.int32), (*source, 2))


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the backbone. Part of the model, so that it is saved and exported with it.

    - `resize`: the resize rule.
    - `mean`, `std`: one number per channel, for pixel values 0..255.
    - `pillow`: whether pixels are interpolated by `ops.resize_image_pillow`, antialiased and rounded to 8 bits as in
      Detectron2, rather than by `ops.resize_image`, bilinear without antialiasing as in torchvision.
    - `square_canvas`: whether images are placed on a square canvas that holds any of them, rather than on the smallest
      that holds the image. With global attention, features depend on the canvas.

    >>> grayscale = Preprocessing(ShortestEdge(320, 640), mean=(128.0,), std=(64.0,))
    >>> grayscale.resize((480, 640)), grayscale.channels
    ((320, 426), 1)
    """

    resize: ShortestEdge | Square = ShortestEdge()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pillow: bool = False
    square_canvas: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(f"mean and std must be equally long and std positive, got {self.mean} and {self.std}.")

    @property
    def limits(self) -> dict[str, Any]:
        """Keyword arguments `min_size` and `max_size` for `data.make_buckets`.

        >>> Preprocessing(Square(640)).limits
        {'min_size': 640, 'max_size': 640}
        """
        if isinstance(self.resize, Square):
            return {"min_size": self.resize.size, "max_size": self.resize.size}
        return {"min_size": self.resize.min_size, "max_size": self.resize.max_size}

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """The `(height, width)` that a canvas needs at least, for an image of `size` after the resize.

        >>> Preprocessing(ShortestEdge(96, 128), square_canvas=True).canvas((96, 110))
        (128, 128)
        """
        side = int(max(self.limits.values()))
        return (side, side) if self.square_canvas else size

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return len(self.mean)

    def place(
        self,
        image: UInt8[Array, "h w c"],
        *,
        image_size: Int32[Array, " 2"],
        output_size: Int32[Array, " 2"],
        canvas: tuple[int, int],
    ) -> Float[Array, "{canvas[0]} {canvas[1]} c"]:
        """Resizes the top-left `image_size` part of an image and places it on a canvas; returns pixel values 0..255.

        Both sizes are `(height, width)` and may be traced; `output_size` is usually the result of `resize`.

        >>> image, size = jnp.array([[0, 100]], jnp.uint8)[..., None], jnp.array([1, 2])
        >>> Preprocessing().place(image, image_size=size, output_size=size, canvas=(1, 3)).ravel().tolist()
        [0.0, 100.0, 0.0]
        """
        if self.pillow:
            pixels = resize_image_pillow(image, image_size=image_size, output_size=output_size, canvas=canvas)
            return pixels.astype(jnp.float32)
        pixels = image.astype(jnp.float32)
        return resize_image(pixels, image_size=image_size, output_size=output_size, canvas=canvas)

    def normalize(self, image: Real[Array, "h w c"], canvas_size: Int32[Array, " 2"]) -> Float[Array, "c h w"]:
        """Returns `(image - mean) / std`, channels first, with zeros in the padding.

        - `image`: pixel values on a canvas.
        - `canvas_size`: `(height, width)` of the resized image, at the top left of the canvas.

        Raises a `ValueError` if the number of channels is wrong.

        >>> image, size = jnp.full((2, 2, 1), 3.0), jnp.array([2, 1])
        >>> Preprocessing(mean=(1.0,), std=(2.0,)).normalize(image, size)[0].tolist()
        [[1.0, 0.0], [1.0, 0.0]]
        """
        if image.shape[2] != self.channels:
            raise ValueError(
                f"image has {image.shape[2]} channels on the last axis of (h, w, c), but the model's preprocessing "
                f"takes {self.channels}. {_remedy(image.shape[2], self.channels)}"
            )
        dtype = jnp.result_type(float)  # float32, or float64 if x64 is enabled
        mean, std = (jnp.asarray(values, dtype)[None, None] for values in (self.mean, self.std))  # (1, 1, c)
        x = (image.astype(dtype) - mean) / std
        rows = jnp.arange(image.shape[0], dtype=jnp.int32)[:, None, None] < canvas_size[0]
        columns = jnp.arange(image.shape[1], dtype=jnp.int32)[None, :, None] < canvas_size[1]
        return jnp.where(rows & columns, x, 0.0).transpose(2, 0, 1)  # (h, w, c) -> (c, h, w)


def _remedy(got: int, wanted: int) -> str:
    if (got, wanted) == (4, 3):
        return "Drop alpha: image[..., :3]."
    if (got, wanted) == (1, 3):
        return "Repeat the gray channel: np.repeat(image, 3, axis=2)."
    return "Build the backbone's stem for that many channels, with as many values in the preprocessing's mean and std."
