"""Checks that a detector can be split into two parts, with NMS or RoIAlign on the host between them."""

from typing import NamedTuple

from ..models import AbstractDetector, Selection, TwoStage, TwoStageSelection
from ._program import checked_selection


class Parts(NamedTuple):
    """A two-stage detector that can be split, and its selection."""

    model: TwoStage
    selection: TwoStageSelection


def two_stage_parts(model: AbstractDetector, selection: Selection | None) -> Parts:
    """Returns the detector with `selection`, or with the model's own if that is `None`.

    Raises a `ValueError` unless the model has region proposals and a box head, and predicts boxes only.
    """
    if not isinstance(model, TwoStage) or model.needs != {"boxes"}:
        raise ValueError(
            f"model must be a two-stage detector of boxes alone, with rpn, box_head and pooling, got a "
            f"{type(model).__name__}. save_onnx and save_stablehlo take any detector as one file."
        )
    chosen = checked_selection(model, selection)
    if not isinstance(chosen, TwoStageSelection):
        raise ValueError(f"selection must be a TwoStageSelection, got a {type(chosen).__name__}.")
    return Parts(model, chosen)
