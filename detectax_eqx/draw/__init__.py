"""Draws detections and ground truth, and plots evaluation results."""

from ._color import class_color as class_color
from ._pictures import (
    draw_comparison as draw_comparison,
    draw_detections as draw_detections,
    draw_targets as draw_targets,
)
from ._plots import (
    plot_calibration as plot_calibration,
    plot_confusion as plot_confusion,
    plot_error_costs as plot_error_costs,
    plot_precision_recall as plot_precision_recall,
)
