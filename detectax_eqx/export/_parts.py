"""What a detector needs so that it can be cut in two where suppression and RoIAlign are left to the host."""

from typing import NamedTuple

from ..models import AbstractDetector, Selection, TwoStage, TwoStageSelection
from ._program import checked_selection


class Parts(NamedTuple):
    """A two-stage detector, as the functions that take it apart know it, and which of its detections are kept."""

    model: TwoStage
    selection: TwoStageSelection


def two_stage_parts(model: AbstractDetector, selection: Selection | None) -> Parts:
    """The detector and `selection`, or else its own.

    Raises a `ValueError` unless it has region proposals and a box head, and nothing but boxes to find.
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
