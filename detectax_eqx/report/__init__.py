"""Self-contained HTML pages of an evaluation, a dataset and a training run, and dataset statistics for them."""

from ._curves import RELOAD_SECONDS as RELOAD_SECONDS, write_curves as write_curves
from ._dataset import write_dataset_page as write_dataset_page
from ._evaluation import write_report as write_report
from ._inspection import (
    STRIDES as STRIDES,
    BucketUse as BucketUse,
    Suspicion as Suspicion,
    best_anchor_iou as best_anchor_iou,
    bucket_use as bucket_use,
    find_suspicions as find_suspicions,
    labels_of as labels_of,
    padding_share as padding_share,
    propose_canvases as propose_canvases,
    resized_boxes as resized_boxes,
)
