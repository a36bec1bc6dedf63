"""The result of a predictor for one image."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from .._types import Detections, Images
from ..data import read_image
from ..draw import draw_detections
from ..evaluate import to_coco_results
from ..ops import paste_masks


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The detected objects in one image, sorted by descending score.

    - `detections`: the valid detections, as NumPy arrays; boxes `(x0, y0, x1, y1)` in pixels of the image.
    - `size`: the image's `(height, width)`. `source`: its path or URL, or `None` if it was passed as an array or Pillow
      image.
    - `class_names`, `category_ids`, `skeletons`: the class name and category id of each label, and the bones between
      its keypoints, if any, see `data.Category`.
    - `paste`: how masks are pasted onto the image, `ops.paste_masks` or the model's own function.
    """

    detections: Detections
    size: tuple[int, int]
    source: str | None
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    _pixels: UInt8[np.ndarray, "h w c"] | None = field(default=None)
    paste: Callable[..., Any] = paste_masks
    skeletons: tuple[tuple[tuple[int, int], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.detections.scores)

    def __repr__(self) -> str:
        """
        >>> Prediction(Detections(*map(np.zeros, ((0, 4), 0), "ff"), np.zeros(0, "i"), np.zeros(0, bool)), (4, 6),
        ...     "street.jpg", (), ())
        Prediction(street.jpg, 4×6: nothing)
        """
        counts: dict[str, int] = {}
        for name in self.names:
            counts[name] = counts.get(name, 0) + 1
        summary = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        return f"Prediction({self.source or 'array'}, {self.size[0]}×{self.size[1]}: {summary})"

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.class_names[label] for label in self.detections.labels]

    @cached_property
    def image(self) -> UInt8[np.ndarray, "h w c"]:
        """The image's pixels. A file is read again."""
        if self._pixels is not None:
            return self._pixels
        assert self.source is not None
        return read_image(self.source, max_pixels=self.size[0] * self.size[1])

    def draw(self, *, score_threshold: float = 0.5, **style: Any) -> Image.Image:
        """Draws masks, boxes, keypoints, class names and scores on the image. `style`: see `draw.draw_detections`."""
        options = {"class_names": self.class_names, "skeletons": self.skeletons} | style
        return draw_detections(self.image, self.detections, score_threshold=score_threshold, **options)

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary per object with class, score and box corners, for example for `pandas.DataFrame`.

        If the detector has keypoints, `keypoints` is a list of `(x, y, score)`, one per point.
        """
        keys = ("name", "category_id", "score", "x0", "y0", "x1", "y1")
        detections = self.detections
        columns = (
            self.names,
            [self.category_ids[label] for label in detections.labels],
            np.asarray(detections.scores, np.float64).tolist(),
            *np.asarray(detections.boxes, np.float64).T.tolist(),
        )
        if detections.keypoints is not None:
            points = np.asarray(detections.keypoints, np.float64).tolist()
            keys, columns = (*keys, "keypoints"), (*columns, [[tuple(point) for point in row] for row in points])
        return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]

    def to_coco(self, *, image_id: int = 0) -> list[dict[str, Any]]:
        """The objects in COCO's results format, see `evaluate.to_coco_results`."""
        sizes = np.array([self.size], np.int32)
        index = np.zeros(1, np.int32)
        # Only the shape of the pixels is used.
        pixels = np.broadcast_to(np.uint8(0), (1, *self.size, 3))
        images = Images(pixels, sizes, sizes, index, np.array([True]), canvas=self.size)
        batch = replace(self.detections, **{k: v[None] for k, v in vars(self.detections).items() if v is not None})
        ids = {"image_ids": [image_id], "category_ids": self.category_ids}
        return to_coco_results(batch, images, paste=self.paste, **ids)

    def masks(self, *, threshold: float = 0.5) -> np.ndarray | None:
        """Boolean masks of the objects on the image, `(n, h, w)`, or `None` if the detector has no masks."""
        detections = self.detections
        if detections.masks is None:
            return None
        if not len(self):
            return np.zeros((0, *self.size), bool)
        masks, frames = jnp.asarray(detections.masks), jnp.asarray(detections.frames)
        return np.asarray(self.paste(masks, frames, image_size=self.size, threshold=threshold))

    def to_supervision(self) -> Any:
        """The objects as `supervision.Detections`. Raises an `ImportError` if that package is not installed."""
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"to_supervision needs the package supervision: pip install supervision ({error})."
            ) from None
        detections = self.detections
        return supervision.Detections(
            xyxy=np.asarray(detections.boxes),
            confidence=np.asarray(detections.scores),
            class_id=np.asarray(detections.labels),
            mask=self.masks(),
            data={"class_name": np.array(self.names)},
        )
