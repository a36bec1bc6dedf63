"""A valid call of every public function and invalid values of its options: the tables that test_misuse.py uses."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import Detections, Targets, data, draw, evaluate, export, models, nn, ops, train, weights, zoo
from detectax_eqx.data import CocoDataset, Report


N, M, F32, I32 = 3, 2, np.float32, np.int32


class Call(NamedTuple):
    """A function together with valid arguments."""

    function: Callable[..., Any]
    arguments: tuple
    options: dict

    def named(self):
        return inspect.signature(self.function).bind(*self.arguments, **self.options).arguments


def call(function, *arguments, **options):
    return Call(function, arguments, options)


def f32(*shape):
    return jnp.asarray(np.ones(shape, F32))


def i32(*shape):
    return jnp.asarray(np.ones(shape, I32))


def flags(*shape):
    return jnp.asarray(np.ones(shape, bool))


KEY = jr.key(0)
SIZE = jnp.asarray([5, 4], jnp.int32)
BOXES, MORE_BOXES = f32(N, 4), f32(M, 4)
TARGETS = Targets(f32(N, 4), i32(N), flags(N), f32(N, 7, 7), f32(N, 4))
DETECTIONS = Detections(np.ones((N, 4), F32), np.ones(N, F32), np.ones(N, I32), np.ones(N, bool))
PROPOSALS = models.Proposals(f32(M, 4), f32(M), flags(M))
SAMPLED = models.SampledProposals(f32(M, 4), flags(M), flags(M), i32(M))
ANCHORS = models.SampledAnchors(i32(M), f32(M, 4), flags(M), flags(M), i32(M))
RPN_OUTPUT = models.RPNOutput((f32(N),), (f32(N, 4),), (f32(N, 4),))
PICTURE = np.zeros((64, 64, 3), np.uint8)
PIXELS = jnp.asarray(PICTURE[:8, :9])

OPS = [
    call(ops.anchor_grid, (2, 3), stride=8, sizes=(32,), aspect_ratios=(1.0,)),
    call(ops.box_area, BOXES),
    call(ops.ciou_loss, BOXES, BOXES),
    call(ops.class_aware_nms, BOXES, f32(N), i32(N), flags(N), iou_threshold=0.5),
    call(ops.clip_boxes, BOXES, f32(2)),
    call(ops.crop_masks, f32(N, 5, 6), BOXES, BOXES, output_size=7),
    call(ops.cxcywh_to_xyxy, BOXES),
    call(ops.decode_boxes, BOXES, BOXES, weights=(10, 10, 5, 5)),
    call(ops.deformable_attention, (f32(2, 3, 4, 5), f32(2, 3, 2, 2)), f32(N, 2, 2, 4, 2), f32(N, 2, 2, 4)),
    call(ops.dice_loss, f32(N, 5), f32(N, 5)),
    call(ops.diou_loss, BOXES, BOXES),
    call(ops.encode_boxes, BOXES, BOXES),
    call(ops.giou_loss, BOXES, BOXES),
    call(ops.keypoint_targets, f32(N, 5, 3), BOXES, size=7),
    call(ops.keypoints_from_heatmaps, f32(N, 7, 7), f32(4)),
    call(ops.grid_sample, f32(2, 3, 4), f32(N, 2)),
    call(ops.linear_assignment, f32(2, N), i32()),
    call(ops.point_sample, f32(2, 3, 4), f32(N, 2)),
    call(ops.match_boxes, f32(N, M), flags(N), low_threshold=0.3, high_threshold=0.7),
    call(ops.multilevel_roi_align, [f32(1, 8, 8), f32(1, 4, 4)], BOXES, output_size=2, strides=(4, 8)),
    call(ops.nms, BOXES, f32(N), flags(N), iou_threshold=0.5),
    call(ops.nms_indices, BOXES, f32(N), flags(N), iou_threshold=0.5, max_outputs=2, labels=i32(N)),
    call(ops.pairwise_ciou, BOXES, MORE_BOXES),
    call(ops.pairwise_diou, BOXES, MORE_BOXES),
    call(ops.pairwise_giou, BOXES, MORE_BOXES),
    call(ops.pairwise_ioa, BOXES, MORE_BOXES),
    call(ops.pairwise_iou, BOXES, MORE_BOXES),
    call(ops.paste_masks, f32(N, 5, 6), BOXES, image_size=(8, 9)),
    call(ops.paste_masks_at_centers, f32(N, 5, 6), BOXES, image_size=(8, 9)),
    call(ops.resize_masks, f32(N, 5, 6), BOXES, image_size=(8, 9)),
    call(ops.resize_image, f32(8, 9, 3), image_size=SIZE, output_size=SIZE, canvas=(6, 7), offset=SIZE, flip=flags()),
    call(ops.resize_image_pillow, PIXELS, image_size=SIZE, output_size=SIZE, canvas=(6, 7), offset=SIZE, flip=flags()),
    call(ops.resize_bicubic, f32(2, 3, 4), (5, 6)),
    call(ops.resized_size, (480, 640), min_size=800, max_size=1333),
    call(ops.roi_align, f32(2, 8, 9), BOXES, output_size=2, spatial_scale=0.25),
    call(ops.sample_balanced, flags(N), flags(N), num_samples=2, positive_fraction=0.5, key=KEY),
    call(ops.sigmoid_focal_loss, f32(N, 5), f32(N, 5)),
    call(ops.smooth_l1_loss, f32(N, 5), f32(N, 5)),
    call(ops.upcast, BOXES),
    call(ops.xywh_to_xyxy, BOXES),
    call(ops.xyxy_to_cxcywh, BOXES),
    call(ops.xyxy_to_xywh, BOXES),
]
TREES = [
    call(Targets, *(np.asarray(x) for x in jax.tree.leaves(TARGETS))),
    call(Detections, *jax.tree.leaves(DETECTIONS), np.ones((N, 7, 7), F32)),
    call(models.Proposals, f32(M, 4), f32(M), flags(M)),
    call(models.SampledAnchors, i32(M), f32(M, 4), flags(M), flags(M), i32(M)),
    call(models.SampledProposals, f32(M, 4), flags(M), flags(M), i32(M)),
]
OTHERS = [
    call(nn.cast, {"w": f32(2)}, jnp.bfloat16),
    call(data.mask_in_box, (np.ones((3, 2)),), np.ones(4), size=7),
    call(draw.draw_comparison, PICTURE, TARGETS, DETECTIONS, crowd=np.ones(N, bool)),
    call(draw.draw_detections, PICTURE, DETECTIONS),
    call(draw.draw_targets, PICTURE, TARGETS),
    call(draw.plot_calibration, np.ones(N), np.ones(N), np.ones(N, np.int64)),
    call(draw.plot_confusion, np.ones((N, N), np.int64), class_names=["a", "b"]),
    call(draw.plot_precision_recall, np.ones((M, N)), np.ones(N), class_names=["a", "b"]),
    call(evaluate.encode_mask, np.ones((3, 4), bool)),
    call(models.box_detections, f32(M, 4), f32(M, 4, 4), PROPOSALS, f32(2)),
    call(models.box_loss, f32(M, 4), f32(M, 4, 4), SAMPLED, TARGETS),
    call(models.giou_of_boxes, BOXES, BOXES, BOXES),
    call(models.keypoint_loss, f32(M, 4, 7, 7), SAMPLED, replace(TARGETS, keypoints=f32(N, 4, 3))),
    call(models.l1_of_deltas, BOXES, BOXES, BOXES),
    call(models.mask_loss, f32(M, 7, 7), SAMPLED, TARGETS),
    call(models.propose, RPN_OUTPUT, f32(2)),
    call(models.refine_boxes, f32(N, 4), f32(N, 4)),
    call(models.rpn_loss, f32(M), f32(M, 4), ANCHORS, TARGETS),
    call(models.sample_anchors, [MORE_BOXES], TARGETS, key=KEY),
    call(models.sample_proposals, PROPOSALS, TARGETS, key=KEY),
    call(nn.conv2d, f32(2, 6, 6), f32(5, 2, 3, 3), f32(5)),
    call(nn.conv2d, f32(4, 6, 6), f32(8, 2, 3, 3), f32(8), stride=2, padding=2, groups=2, dilation=2),
    call(nn.attention, f32(2, 3, 4, 5), f32(2, 3, 6, 5), f32(2, 3, 6, 5), (f32(1, 3, 4, 2, 3), f32(2, 1, 4, 2, 1))),
    call(nn.drop_path, f32(4, 5), 0.5, key=KEY),
    call(nn.gelu, f32(4, 5)),
    call(nn.silu, f32(4, 5)),
    call(nn.sine_embedding, f32(4, 5), 6),
    call(nn.sine_positions, (2, 3), 8),
    call(nn.linear, eqx.nn.Linear(5, 4, key=KEY), f32(2, 3, 5)),
    call(nn.max_pool2d, f32(2, 6, 6), kernel_size=2, stride=2),
    call(train.augment, PICTURE, SIZE, TARGETS, canvas=(64, 64), min_sizes=[32], max_size=64, key=KEY),
    call(train.jitter_colors, f32(4, 5, 3), SIZE, key=KEY),
]
# These take a whole detector, which is slow to run. Invalid arguments are rejected before it runs.
WITH_MODEL = {
    models.detect: lambda model: call(
        models.detect, model, PICTURE, canvas=(64, 64), source_size=SIZE, canvas_size=SIZE
    ),
}
# Functions without array arguments or options with a range, or whose misuse is tested elsewhere.
ELSEWHERE = {
    data: {"load_yolo", "load_voc", "write_coco"}
    | {"decode_rle", "load_coco", "read_annotations", "read_image", "read_categories", "check_categories"}
    | {"decode_counts", "encode_segmentation", "list_images", "load_annotations", "parse_segmentation"},
    draw: {"class_color", "plot_error_costs"},
    # tests/export: they write files or need an extra.
    export: {
        "save_stablehlo",
        "save_onnx",
        "read_onnx",
        "compare_onnx",
        "compare_detections",
        "quantize_onnx",
        "fold_norms",
    }
    | {"save_onnx_parts", "host_detections", "host_nms", "save_tflite", "require"}
    | {"detection_program", "pad_images"},
    evaluate: {
        "detect_dataset",
        "format_metrics",
        "format_number",
        "format_per_class",
        "read_results",
        "to_coco_results",
        "write_results",
    }
    | {"class_rows", "error_rows", "format_errors"},
    # test_models.py: they build detectors or take whole ones.
    models: {"detect_batch", "decayed", "in_backbone", "num_parameters", "selected", "smallest_canvas"}
    | {"dense_detections", "extract", "roi_features"}
    | {"faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", "ssd", "ssdlite", "rf_detr", "rf_detr_seg"}
    | {"detr", "deformable_detr"}
    | {"faster_rcnn_detectron2", "mask_rcnn_detectron2", "keypoint_rcnn_detectron2", "retinanet_detectron2"},
    # test_predictor.py, test_download.py
    zoo: {
        "cache_folder",
        "canvases",
        "names",
        "build",
        "initialize",
        "pretrained",
        "published",
        "published_names",
        "run_metadata",
    },
    nn: {
        "relu",
        "relu6",
        "hard_sigmoid",
        "hard_swish",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "vgg16",
        "xavier_linear",
        *(name for name in dir(nn) if name.startswith(("resne", "wide_resnet", "swin_", "vit_"))),
    },
    train: {
        "latest_checkpoint",
        "load_checkpoint",
        "load_latest_checkpoint",
        "lock_folder",
        "remove_unfinished",
        "shard_batch",
        "shard_state",
        "to_host",
        "num_parts",
        "state_shardings",
        "init_train_state",
    }
    | {"adamw", "no_vectors", "sgd"},
    weights: {"load_detectron2", "load_detectron2_backbone", "read_detectron2", "to_detectron2", "detectron2_shapes"}
    | {"read_pth", "read_pkl", "load_safetensors", "read_safetensors", "save_safetensors", "load_torchvision"}
    | {
        "load_torchvision_backbone",
        "read_torchvision",
        "to_torchvision",
        "current_name",
        "named_leaves",
        "replace_leaves",
        "describe",
        "load_transformer",
        "read_transformer",
    }
    | {"load_rf_detr", "read_rf_detr", "rf_detr_shapes", "to_rf_detr"}
    | {"load_detr", "read_detr", "detr_shapes", "to_detr"},
}


@cache
def tiny_model():
    """A detector whose parameters are all zero, for calls that never run it."""
    shapes = eqx.filter_eval_shape(
        lambda: models.faster_rcnn(
            nn.BackboneWithFPN(nn.resnet18(key=KEY, width=8), key=KEY, channels=16), 3, key=KEY, hidden_size=32
        )
    )
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


EMPTY = CocoDataset((), (), Path("annotations.json"), Report((), ()), ())
COCO = {
    "images": [{"id": 1, "width": 9, "height": 9}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [],
}
ANALYSIS = evaluate.analyze_errors(COCO, [])
NAN = math.nan
# (function, option, invalid value, the other arguments if the tables above have no call of the function)
OPTIONS = [
    (ops.anchor_grid, "feature_size", (-1, 3)),
    (ops.anchor_grid, "stride", 0),
    (ops.anchor_grid, "sizes", ()),
    (ops.anchor_grid, "sizes", (32.0, NAN)),
    (ops.anchor_grid, "aspect_ratios", (-1.0,)),
    (ops.class_aware_nms, "iou_threshold", 2),
    (ops.crop_masks, "output_size", 0),
    (ops.crop_masks, "sampling_ratio", -1),
    (ops.decode_boxes, "weights", (10, 0, 5, 5)),
    (ops.encode_boxes, "weights", (-1, 1, 1, 1)),
    (ops.keypoint_targets, "size", 0),
    (ops.match_boxes, "low_threshold", 0.8),
    (ops.match_boxes, "high_threshold", NAN),
    (ops.multilevel_roi_align, "output_size", (2, 0)),
    (ops.multilevel_roi_align, "sampling_ratio", -1),
    (ops.multilevel_roi_align, "strides", (3, 6)),
    (ops.multilevel_roi_align, "strides", (4,)),
    (ops.multilevel_roi_align, "canonical_size", 0),
    (ops.nms, "iou_threshold", 2),
    (ops.nms, "iou_threshold", -0.1),
    (ops.nms, "iou_threshold", NAN),
    (ops.nms_indices, "iou_threshold", 1.5),
    (ops.nms_indices, "max_outputs", 0),
    (ops.paste_masks, "image_size", (0, 9)),
    (ops.paste_masks_at_centers, "image_size", (0, 9)),
    (ops.resize_image, "canvas", (0, 7)),
    (ops.resize_image_pillow, "canvas", (0, 7)),
    (ops.resize_bicubic, "size", (0, 4)),
    (ops.resized_size, "image_size", (0, 640)),
    (ops.resized_size, "min_size", 0),
    (ops.resized_size, "max_size", -1),
    (ops.resized_size, "canvas", (0, 32)),
    (ops.roi_align, "output_size", 0),
    (ops.roi_align, "sampling_ratio", -1),
    (ops.roi_align, "spatial_scale", 0),
    (ops.roi_align, "spatial_scale", math.inf),
    (ops.sample_balanced, "num_samples", 0),
    (ops.sample_balanced, "positive_fraction", 1.5),
    (ops.sigmoid_focal_loss, "alpha", 2),
    (ops.sigmoid_focal_loss, "gamma", -1),
    (ops.smooth_l1_loss, "beta", -1),
    (data.describe_limits, "max_objects", 0, call(data.describe_limits, EMPTY, buckets=())),
    (data.describe_limits, "min_size", 0, call(data.describe_limits, EMPTY, buckets=())),
    (data.describe_limits, "max_size", -1, call(data.describe_limits, EMPTY, buckets=())),
    (data.source_limit, "canvases", (), call(data.source_limit)),
    (data.source_limit, "canvases", ((0, 64),), call(data.source_limit)),
    (data.eval_batches, "batch_size", 0, call(data.eval_batches, EMPTY, batch_size=1, buckets=())),
    (data.make_buckets, "canvases", (), call(data.make_buckets, [(4, 5)])),
    (data.make_buckets, "canvases", ((0, 64),), call(data.make_buckets, [(4, 5)])),
    (data.make_buckets, "min_size", 0, call(data.make_buckets, [(4, 5)])),
    (data.make_buckets, "max_size", -3, call(data.make_buckets, [(4, 5)])),
    (data.make_buckets, "max_source", 100, call(data.make_buckets, [(4, 5)])),
    (data.make_buckets, "sizes", [(0, 5)], call(data.make_buckets, [(4, 5)])),
    (data.mask_in_box, "segmentation", None),
    (data.mask_in_box, "size", 0),
    (data.write_shapes_dataset, "num_images", 0, call(data.write_shapes_dataset, "nowhere", num_images=1)),
    (data.write_shapes_dataset, "max_objects", 0, call(data.write_shapes_dataset, "nowhere", num_images=1)),
    (data.write_shapes_dataset, "seed", -1, call(data.write_shapes_dataset, "nowhere", num_images=1)),
    (data.write_shapes_dataset, "image_size", (8, 8), call(data.write_shapes_dataset, "nowhere", num_images=1)),
    (data.write_shapes_dataset, "suffix", ".gif", call(data.write_shapes_dataset, "nowhere", num_images=1)),
    (draw.draw_comparison, "mask_opacity", 2),
    (draw.draw_detections, "mask_opacity", 2),
    (draw.draw_detections, "line_width", 0),
    (draw.draw_detections, "font_size", 0),
    (evaluate.analyze_errors, "background_iou", 0, call(evaluate.analyze_errors, COCO, [])),
    (evaluate.analyze_errors, "foreground_iou", 2, call(evaluate.analyze_errors, COCO, [])),
    (evaluate.analyze_errors, "max_detections", 0, call(evaluate.analyze_errors, COCO, [])),
    (evaluate.calibration, "num_bins", 0, call(evaluate.calibration, ANALYSIS)),
    (evaluate.confusion_matrix, "score_threshold", 2, call(evaluate.confusion_matrix, ANALYSIS)),
    (evaluate.evaluate_coco, "max_detections", 10, call(evaluate.evaluate_coco, COCO, [])),
    (evaluate.evaluate_coco, "image_ids", [7], call(evaluate.evaluate_coco, COCO, [])),
    (models.box_detections, "nms_threshold", 2),
    (models.box_detections, "max_detections", 0),
    (models.mask_loss, "sampling_ratio", -1),
    (models.propose, "nms_threshold", 2),
    (models.propose, "pre_nms_top_n", 0),
    (models.propose, "post_nms_top_n", 0),
    (models.sample_anchors, "num_samples", 0),
    (models.sample_anchors, "positive_fraction", 2),
    (models.sample_anchors, "negative_iou", 0.8),
    (models.sample_proposals, "num_samples", 0),
    (models.sample_proposals, "positive_fraction", -1),
    (models.trainable, "trainable_layers", 6, lambda: call(models.trainable, tiny_model())),
    (models.trainable, "trainable_layers", -1, lambda: call(models.trainable, tiny_model())),
    (models.layer_rates, "decay", -0.1, lambda: call(models.layer_rates, tiny_model(), decay=0.5)),
    (models.layer_rates, "decay", 1.1, lambda: call(models.layer_rates, tiny_model(), decay=0.5)),
    (models.ShortestEdge, "min_size", 0, call(models.ShortestEdge)),
    (models.ShortestEdge, "max_size", -1, call(models.ShortestEdge)),
    (models.Square, "size", 0, call(models.Square, 64)),
    (models.Preprocessing, "std", (1.0, 0.0, 1.0), call(models.Preprocessing)),
    (nn.BackboneWithFPN, "finest", 1, lambda: call(nn.BackboneWithFPN, nn.resnet18(key=KEY, width=8), key=KEY)),
    (models.detect, "canvas", (32, 32), lambda: call(models.detect, tiny_model(), PICTURE)),
    (models.detect, "canvas", (800, 801), lambda: call(models.detect, tiny_model(), PICTURE)),
    (nn.drop_path, "rate", 1.0),
    (nn.drop_path, "rate", -0.1),
    (nn.sine_embedding, "channels", 3),
    (nn.sine_embedding, "temperature", 0.0),
    (nn.sine_positions, "channels", 6),
    (nn.conv2d, "stride", 0),
    (nn.max_pool2d, "kernel_size", 0),
    (nn.max_pool2d, "stride", 0),
    (nn.GroupNorm, "channels", 48, call(nn.GroupNorm, 32)),
    (models.BoxHead, "num_classes", 0, call(models.BoxHead, 16, 3, key=KEY)),
    (models.CascadeHead, "num_classes", 0, call(models.CascadeHead, 16, 3, key=KEY)),
    (models.CascadeHead, "positive_ious", (0.6,), call(models.CascadeHead, 16, 3, key=KEY)),
    (models.KeypointHead, "num_keypoints", 0, call(models.KeypointHead, 16, key=KEY)),
    (models.RPN, "anchor_sizes", ((32,), (64, 128)), call(models.RPN, 16, key=KEY)),
    (models.RPN, "anchor_strides", (4, 8), call(models.RPN, 16, key=KEY)),
    (train.augment, "min_sizes", []),
    (train.augment, "min_sizes", [0]),
    (train.augment, "max_size", 0),
    (train.augment, "flip_probability", 1.5),
    (train.augment, "scale_range", (0, 1)),
    (train.augment, "scale_range", (2, 1)),
    (train.augment, "canvas", (0, 64)),
    (train.jitter_colors, "brightness", 2),
    (train.jitter_colors, "contrast", -1),
    (train.jitter_colors, "saturation", NAN),
    (train.local_rows, "batch_size", 0, call(train.local_rows, train.make_mesh(), batch_size=8)),
    (train.local_rows, "batch_size", 99, call(train.local_rows, train.make_mesh(), batch_size=8)),
    (train.make_mesh, "model", 0, call(train.make_mesh)),
    (train.make_mesh, "model", 3, call(train.make_mesh)),
    (train.make_mesh, "tensor", 0, call(train.make_mesh)),
    (train.make_mesh, "tensor", 3, call(train.make_mesh)),
    (train.make_mesh, "devices", (), call(train.make_mesh)),
    (train.make_train_step, "accumulate", 0, call(train.make_train_step, abs, train.sgd(0.1), trainable=True)),
    (train.make_train_step, "ema_decay", 1, call(train.make_train_step, abs, train.sgd(0.1), trainable=True)),
    (train.make_train_step, "ema_decay", -0.1, call(train.make_train_step, abs, train.sgd(0.1), trainable=True)),
    (train.save_checkpoint, "keep", 0, call(train.save_checkpoint, Path("nowhere"), {}, step=1, metadata={}, keep=1)),
    (train.save_checkpoint, "step", -1, call(train.save_checkpoint, Path("nowhere"), {}, step=1, metadata={}, keep=1)),
    (train.scale_learning_rate, "batch_size", 0, call(train.scale_learning_rate, 0.1, batch_size=1)),
    (train.warmup_cosine, "warmup_steps", -1, call(train.warmup_cosine, 0.1, total_steps=9)),
    (train.warmup_cosine, "total_steps", 9, call(train.warmup_cosine, 0.1, total_steps=9)),
    (train.warmup_multistep, "warmup_factor", 2, call(train.warmup_multistep, 0.1, milestones=[])),
]
