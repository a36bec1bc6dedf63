"""The interface of detectors, which detection, training, evaluation and export rely on."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone
from ..ops import paste_masks
from ._preprocessing import Preprocessing


@runtime_checkable
class Selection(Protocol):
    """Which detections a detector keeps. Each detector has its own frozen dataclass, with these fields and others.

    - `score_threshold`: score in 0..1 above which detections are kept.
    - `max_detections`: maximum number of detections per image; those with the highest scores are kept.
    """

    @property
    def score_threshold(self) -> float: ...

    @property
    def max_detections(self) -> int: ...


SelectionT = TypeVar("SelectionT", bound=Selection)

# Pastes masks into their boxes in an image: `ops.paste_masks` or another function with its arguments.
Paste = Callable[..., Any]


class AbstractDetector(eqx.Module, Generic[SelectionT]):
    """An object detector: a PyTree that maps one image on its canvas to detections, and has a loss.

    Generic in the type of its `Selection`.

    - `backbone`: computes the features. The sides of a canvas must be multiples of its `divisor`.
    - `preprocessing`: how an image is resized and normalised; static.
    - `selection`: which detections to keep by default; static.
    - `paste`: how its masks are pasted onto an image.
    - `keypoint_offset`: added to annotated coordinates of keypoints for training (`data.Loader`), and subtracted from
      detected ones (`detect`), in pixels of the image. Detectron2's is 0.5: annotations count pixels.
    - `needs`: names of the fields of `Targets` that the loss requires: `"boxes"`, and possibly `"masks"` or
      `"keypoints"`.

    Subclasses are final: each defines all of its fields itself. Code shared by several detectors is in free functions.
    """

    backbone: eqx.AbstractVar[Backbone]
    preprocessing: eqx.AbstractVar[Preprocessing]
    selection: eqx.AbstractVar[SelectionT]
    paste: ClassVar[Paste] = staticmethod(paste_masks)
    keypoint_offset: ClassVar[float] = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Number of foreground classes."""

    @abc.abstractmethod
    def __call__(
        self, image: Real[Array, "h w c"], canvas_size: Int32[Array, " 2"], *, selection: SelectionT | None = None
    ) -> Detections:
        """Returns detections in canvas pixels.

        - `image`: pixel values 0..255 on a canvas whose sides are multiples of `backbone.divisor`.
        - `canvas_size`: `(height, width)` of the resized image, at the top left of the canvas; the rest is padding.
        - `selection`: which detections to keep; default `self.selection`.
        """

    @abc.abstractmethod
    def loss(
        self,
        image: Real[Array, "h w c"],
        canvas_size: Int32[Array, " 2"],
        targets: Targets,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, WeightedSum]:
        """Returns the loss terms of one image, each as a sum and the count to divide it by over the global batch.

        Arguments are those of `__call__`. `targets` are in canvas pixels; `key` is for random sampling.
        """
