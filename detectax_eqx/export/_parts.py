"""Checks that a detector can be split into two parts, with NMS or RoIAlign on the host between them."""

from typing import NamedTuple

from ..models import AbstractDetector, BoxHead, ConvBoxHead, Selection, TwoStage, TwoStageSelection
from ._program import checked_selection


class Parts(NamedTuple):
    """A two-stage detector that can be split, its box head, and its selection."""

    model: TwoStage
    head: BoxHead | ConvBoxHead
    selection: TwoStageSelection


def two_stage_parts(model: AbstractDetector, selection: Selection | None) -> Parts:
    """Returns the detector with `selection`, or with the model's own if that is `None`.

    Raises a `ValueError` unless the model has region proposals and one box head, and predicts boxes only.
    """
    if not isinstance(model, TwoStage) or model.needs != {"boxes"}:
        raise ValueError(
            f"model must be a two-stage detector of boxes alone, with rpn, box_head and pooling, got a "
            f"{type(model).__name__}. save_onnx and save_stablehlo take any detector as one file."
        )
    chosen = checked_selection(model, selection)
    if not isinstance(chosen, TwoStageSelection):
        raise ValueError(f"selection must be a TwoStageSelection, got a {type(chosen).__name__}.")
    if not isinstance(model.box_head, BoxHead | ConvBoxHead):
        raise ValueError(
            f"model must have one box head, got a {type(model.box_head).__name__} of {len(model.box_head.stages)}, "
            "which pool one after another. save_onnx and save_stablehlo take it as one file."
        )
    return Parts(model, model.box_head, chosen)
