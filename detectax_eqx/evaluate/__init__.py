"""COCO evaluation: results in original pixels, the twelve metrics, AP per class, and error analysis."""

from ._coco_eval import (
    ClassMetrics as ClassMetrics,
    CocoMetrics as CocoMetrics,
    evaluate_coco as evaluate_coco,
    format_metrics as format_metrics,
    format_number as format_number,
    format_per_class as format_per_class,
)
from ._detect import detect_dataset as detect_dataset
from ._errors import (
    ERROR_KINDS as ERROR_KINDS,
    IGNORED as IGNORED,
    RIGHT as RIGHT,
    ErrorAnalysis as ErrorAnalysis,
    JudgedDetections as JudgedDetections,
    JudgedObjects as JudgedObjects,
    analyze_errors as analyze_errors,
)
from ._results import (
    encode_mask as encode_mask,
    read_results as read_results,
    to_coco_results as to_coco_results,
    write_results as write_results,
)
from ._tables import (
    Calibration as Calibration,
    calibration as calibration,
    class_rows as class_rows,
    confusion_matrix as confusion_matrix,
    error_rows as error_rows,
    format_errors as format_errors,
)
