from ._box_format import BoxFormat as BoxFormat
from ._buckets import CANVASES as CANVASES, Bucket as Bucket, make_buckets as make_buckets
from ._categories import check_categories as check_categories, read_categories as read_categories
from ._coco import (
    load_annotations as load_annotations,
    load_coco as load_coco,
    read_annotations as read_annotations,
)
from ._dataset import Category as Category, CocoDataset as CocoDataset, ImageRecord as ImageRecord, Objects as Objects
from ._images import IMAGE_SUFFIXES as IMAGE_SUFFIXES, list_images as list_images, read_image as read_image
from ._limits import Limits as Limits, describe_limits as describe_limits, source_limit as source_limit
from ._loader import Loader as Loader, eval_batches as eval_batches
from ._masks import decode_counts as decode_counts, decode_rle as decode_rle, mask_in_box as mask_in_box
from ._report import BadImageError as BadImageError, DatasetError as DatasetError, Problem as Problem, Report as Report
from ._segmentations import encode_segmentation as encode_segmentation, parse_segmentation as parse_segmentation
from ._shapes import write_shapes_dataset as write_shapes_dataset
from ._voc import load_voc as load_voc
from ._write import write_coco as write_coco
from ._yolo import load_yolo as load_yolo
