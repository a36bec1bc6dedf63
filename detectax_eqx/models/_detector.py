"""The contract between a detector and everything that uses one: detection, training, evaluation, export."""

import abc
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone
from ._preprocessing import Preprocessing


@runtime_checkable
class Selection(Protocol):
    """Which detections a detector keeps. Each detector has a frozen dataclass of its own, with these fields and others.

    - `score_threshold`: detections need a score above it, 0..1.
    - `max_detections`: how many detections are kept per image, those of the highest scores.
    """

    @property
    def score_threshold(self) -> float: ...

    @property
    def max_detections(self) -> int: ...


SelectionT = TypeVar("SelectionT", bound=Selection)


class AbstractDetector(eqx.Module, Generic[SelectionT]):
    """An object detector: a PyTree that maps one image on its canvas to detections, and has a loss.

    Generic in the class of its `Selection`.

    - `backbone`: what the features come from. Its `divisor` is what the sides of a canvas must be multiples of.
    - `preprocessing`: how an image gets onto its canvas; static.
    - `selection`: which detections are kept unless a call says otherwise; static.
    - `needs`: names of the fields of `Targets` that the loss learns from: `"boxes"`, and perhaps `"masks"`.

    Subclasses are final: they have all their fields themselves, and functions shared by several detectors are free.
    """

    backbone: eqx.AbstractVar[Backbone]
    preprocessing: eqx.AbstractVar[Preprocessing]
    selection: eqx.AbstractVar[SelectionT]
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """Number of foreground classes."""

    @abc.abstractmethod
    def __call__(
        self, image: Real[Array, "h w c"], canvas_size: Int32[Array, " 2"], *, selection: SelectionT | None = None
    ) -> Detections:
        """Detections in canvas pixels.

        - `image`: pixel values 0..255 on a canvas whose sides are multiples of `backbone.divisor`.
        - `canvas_size`: `(height, width)` of the picture on the canvas; the rest is padding.
        - `selection`: which detections are kept; default `self.selection`.
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
        """The terms of the loss for one image, each as a sum and the count to divide it by over the global batch.

        Arguments are those of the call; `targets` are in canvas pixels, and `key` is for what the loss draws at random.
        """
