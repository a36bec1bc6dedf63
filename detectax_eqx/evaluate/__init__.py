"""COCO evaluation: results in original pixels, the twelve numbers, AP of every class."""

from ._coco_eval import (
    ClassMetrics as ClassMetrics,
    CocoMetrics as CocoMetrics,
    evaluate_coco as evaluate_coco,
    format_metrics as format_metrics,
    format_per_class as format_per_class,
)
from ._results import (
    encode_mask as encode_mask,
    read_results as read_results,
    to_coco_results as to_coco_results,
    write_results as write_results,
)
