"""Detectron2's rules one by one, and its parameters by name. test_detectron2_reference.py compares whole detectors."""

import math
import pickle
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, nn, ops, zoo
from detectax_eqx.weights import (
    WeightsError,
    describe,
    detectron2_shapes,
    load_detectron2,
    load_detectron2_backbone,
    named_leaves,
    read_detectron2,
    to_detectron2,
)

from . import detectron2_tiny as tiny


# Rules


def test_anchors_that_are_not_rounded():
    sizes, ratios = (32.0, 40.317), (0.5, 1.0, 2.0)
    anchors = np.asarray(ops.anchor_grid((2, 3), stride=16, sizes=sizes, aspect_ratios=ratios, rounded=False))
    expected = []
    for y in range(2):
        for x in range(3):
            for ratio in ratios:
                for size in sizes:
                    width = math.sqrt(size**2 / ratio)
                    height = ratio * width
                    expected.append([16 * x - width / 2, 16 * y - height / 2, 16 * x + width / 2, 16 * y + height / 2])
    np.testing.assert_allclose(anchors, expected, rtol=1e-6)
    assert (np.abs(anchors - anchors.round()) > 0.1).any()


def test_nominal_strides():
    """Above a P5 of odd size, torchvision's anchors of P6 are closer than 64 pixels."""
    features = [jnp.zeros((8, -(-160 // stride), 2)) for stride in (32, 64)]
    for strides, expected in (((32, 64), 64), (None, 160 // 3)):
        rpn = models.RPN(8, key=jr.key(0), anchor_sizes=((32.0,), (64.0,)), anchor_strides=strides)
        anchors = jax.jit(lambda rpn=rpn: rpn(features, (160, 64)).anchors)()
        rows = np.unique(np.asarray(anchors[1])[:, 1::2].mean(axis=1))
        np.testing.assert_allclose(np.diff(rows), expected)


def test_level_of_a_box_at_the_boundary():
    """A box a little smaller than 112 pixels is on the finer level only if nothing is added to the level."""
    features = [jnp.zeros((1, 64, 64)), jnp.ones((1, 32, 32))]
    boxes = jnp.array([[8.0, 8.0, 8.0 + side, 8.0 + side] for side in (111.99995, 112.0)])

    def level(**epsilons):
        return ops.multilevel_roi_align(features, boxes, output_size=1, strides=(4, 8), **epsilons).ravel().tolist()

    assert level() == [1.0, 1.0]
    assert level(level_epsilon=0.0, size_epsilon=1e-8) == [0.0, 1.0]
    assert level(level_epsilon=0.0, size_epsilon=1e-3) == [1.0, 1.0]


BOXES = jnp.array([[0.0, 0.0, 8.0, 8.0], [20.0, 0.0, 28.0, 8.0], [40.0, 0.0, 48.0, 8.0], [60.0, 60.0, 70.0, 70.0]])


def test_proposals_are_ranked_by_logits():
    """Two levels whose scores are all 1 in single precision, and one place for a proposal."""
    logits = jnp.array([18.0, 30.0]), jnp.array([40.0, 19.0])
    output = models.RPNOutput(logits, (jnp.zeros((2, 4)),) * 2, (BOXES[:2], BOXES[2:]))
    size = jnp.array([100.0, 100.0])
    by_logits = models.propose(output, size, post_nms_top_n=1, rank_by_logits=True)
    by_scores = models.propose(output, size, post_nms_top_n=1)
    assert by_scores.scores.tolist() == by_logits.scores.tolist() == [1.0]
    assert by_scores.boxes.tolist() == BOXES[1:2].tolist()  # on ties, the first level
    assert by_logits.boxes.tolist() == BOXES[2:3].tolist()


def test_proposals_without_area_are_dropped():
    """A box outside of the image has no area once clipped; a thin one has."""
    boxes = jnp.array([[-9.0, 0.0, -1.0, 8.0], [5.0, 5.0, 5.0001, 9.0], [0.0, 0.0, 8.0, 8.0]])
    output = models.RPNOutput((jnp.array([3.0, 2.0, 1.0]),), (jnp.zeros((3, 4)),), (boxes,))
    found = models.propose(output, jnp.array([32.0, 32.0]), min_size=0.0)
    assert found.valid.tolist() == [True, True, False]
    assert models.propose(output, jnp.array([32.0, 32.0])).valid.tolist() == [True, False, False]


def test_detections_without_area_count_until_they_are_dropped():
    """Detectron2 keeps the 100 best boxes and then drops those without area."""
    boxes = jnp.array([[-9.0, 0.0, -1.0, 8.0], [20.0, 0.0, 28.0, 8.0], [40.0, 0.0, 48.0, 8.0]])
    proposals = models.Proposals(boxes, jnp.ones(3), jnp.ones(3, bool))
    logits = jnp.array([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])

    def found(min_size):
        return models.box_detections(
            logits, jnp.zeros((3, 2, 4)), proposals, jnp.array([50.0, 50.0]), max_detections=2, min_size=min_size
        )

    assert found(0.0).valid.tolist() == [True, False] and found(0.0).boxes[0].tolist() == boxes[1].tolist()
    assert found(1e-2).valid.tolist() == [True, True] and found(1e-2).boxes[1].tolist() == boxes[2].tolist()


@pytest.mark.parametrize("clip_last", [False, True])
def test_boxes_clipped_before_or_after_suppression(clip_last):
    """Two boxes that overlap little, but are the same once clipped to the image."""
    anchors = jnp.array([[-40.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [-9.0, 0.0, -1.0, 8.0]])
    levels = [(jnp.array([[[3.0, 2.0, 1.0]]]), jnp.zeros((3, 0)), jnp.zeros((3, 4)), anchors)]
    found = models.dense_detections(
        lambda logits, _: jax.nn.sigmoid(logits),
        ops.decode_boxes,
        levels,
        jnp.array([20, 20]),
        models.DenseSelection(max_detections=3, clip_last=clip_last),
    )
    assert found.valid.tolist() == [True, True, False]
    # Clipped first, the second box is suppressed, and the third has no area but counts.
    assert found.boxes[1].tolist() == ([0.0, 0.0, 10.0, 10.0] if clip_last else [0.0, 0.0, 0.0, 8.0])


def test_the_normaliser_of_the_rpn():
    boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 20.0]])
    targets = Targets(boxes[:1], jnp.array([2]), jnp.array([True]))
    sampled = models.sample_anchors([boxes], targets, key=jr.key(0))
    logits, deltas = jnp.array([2.0, -1.0]), jnp.full((2, 4), 0.1)
    usual = models.rpn_loss(logits, deltas, sampled, targets)
    fixed = models.rpn_loss(logits, deltas, sampled, targets, normalizer=256.0)
    for name, loss in usual.items():
        np.testing.assert_allclose(fixed[name].mean(), loss.mean() * 2 / 256, rtol=1e-6)


def test_mask_targets_with_a_threshold():
    masks, box = jnp.array([[[0.0, 1.0], [0.0, 1.0]]]), jnp.array([[0.0, 0.0, 8.0, 8.0]])
    targets = Targets(box, jnp.array([0]), jnp.array([True]), masks, box)
    sampled = models.SampledProposals(box, jnp.array([True]), jnp.array([True]), jnp.array([0]))
    logits = jnp.linspace(-3, 3, 16).reshape(1, 4, 4)

    def entropy(target):
        return float((jax.nn.softplus(logits[0]) - target * logits[0]).mean())

    soft = np.tile(np.array([0.0, 0.25, 0.75, 1.0], np.float32), (4, 1))
    for threshold, target in ((None, soft), (0.5, soft >= 0.5), (0.25, soft >= 0.25)):
        loss = models.mask_loss(logits, sampled, targets, aligned=True, threshold=threshold)["loss_mask"]
        np.testing.assert_allclose(loss.mean(), entropy(jnp.asarray(target, jnp.float32)), rtol=1e-6)


def pasted_naively(mask, box, height, width):
    """Samples the mask at each pixel's centre, in float64."""
    x0, y0, x1, y1 = np.asarray(box, np.float64)
    result = np.zeros((height, width))
    rows, columns = mask.shape
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5 - y0) / (y1 - y0) * rows - 0.5, (x + 0.5 - x0) / (x1 - x0) * columns - 0.5
            for i in (math.floor(v), math.floor(v) + 1):
                for j in (math.floor(u), math.floor(u) + 1):
                    if 0 <= i < rows and 0 <= j < columns:
                        result[y, x] += mask[i, j] * (1 - abs(v - i)) * (1 - abs(u - j))
    return result


PASTED = [
    [2.3, 1.7, 13.9, 9.1],
    [-6.5, 3.2, 4.4, 30.0],
    [0.0, 0.0, 20.0, 14.0],
    [5.0, 5.0, 5.6, 5.4],
    [30.0, 2.0, 40.0, 9.0],
]


def test_pasting_at_pixel_centres():
    draw = np.random.default_rng(0)
    masks = draw.uniform(0, 1, (len(PASTED), 5, 7)).astype(np.float32)
    paste = jax.jit(ops.paste_masks_at_centers, static_argnames="image_size")
    found = paste(jnp.asarray(masks), jnp.asarray(PASTED), image_size=(14, 20))
    expected = [pasted_naively(mask, box, 14, 20) for mask, box in zip(masks, PASTED, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    binary = paste(jnp.asarray(masks), jnp.asarray(PASTED), image_size=(14, 20), threshold=0.5)
    np.testing.assert_array_equal(binary, np.asarray(found) >= 0.5)


def test_a_value_at_the_threshold_is_part_of_the_mask():
    masks, boxes = jnp.full((1, 2, 2), 0.5), jnp.array([[0.0, 0.0, 2.0, 2.0]])
    assert ops.paste_masks_at_centers(masks, boxes, image_size=(2, 2), threshold=0.5).all()
    assert not ops.paste_masks(masks, boxes, image_size=(2, 2), threshold=0.5).any()


@pytest.mark.parametrize(
    "box", [[3.0, 3.0, 3.0, 9.0], [9.0, 1.0, 3.0, 9.0], [math.nan, 0.0, 5.0, 5.0], [0.0, 0.0, math.inf, 5.0]]
)
def test_boxes_that_cover_nothing(box):
    def paste(masks):
        return ops.paste_masks_at_centers(masks, jnp.array([box], jnp.float32), image_size=(6, 6))

    value, gradient = jax.value_and_grad(lambda masks: paste(masks).sum())(jnp.ones((1, 4, 4)))
    assert value == 0 and (gradient == 0).all()


def test_pasting_has_the_gradient_of_a_linear_map():
    masks, boxes = jr.uniform(jr.key(0), (2, 4, 4)), jnp.array(PASTED[:2])

    def total(masks):
        return (ops.paste_masks_at_centers(masks, boxes, image_size=(12, 16)) * jnp.arange(16.0)[None, None]).sum()

    np.testing.assert_allclose(total(masks), (jax.grad(total)(masks) * masks).sum(), rtol=1e-5)


def test_stride_in_the_first_convolution():
    x = jr.normal(jr.key(1), (8, 8, 8))
    block: Any = nn.Bottleneck(8, 4, stride=2, norm=nn.FrozenBatchNorm, key=jr.key(0), stride_in_1x1=True)
    other = nn.Bottleneck(8, 4, stride=2, norm=nn.FrozenBatchNorm, key=jr.key(0))
    assert (block.conv1.stride, block.conv2.stride, other.conv1.stride, other.conv2.stride) == (2, 1, 1, 2)
    assert block(x).shape == other(x).shape == (16, 4, 4)
    # Every second pixel of the first convolution, which does not look beyond its pixel.
    y = nn.relu(block.norm1(other.conv1(x)[:, ::2, ::2]))
    y = block.norm3(block.conv3(nn.relu(block.norm2(block.conv2(y))))) + block.downsample(x)
    np.testing.assert_allclose(block(x), nn.relu(y), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"stride_in_1x1=True\. Use Bottleneck"):
        nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=jr.key(0), width=8, stride_in_1x1=True)


def test_the_preset_of_the_zoo():
    """What differs from torchvision, as ZOO lists it."""
    model = eqx.filter_eval_shape(zoo.build, "mask_rcnn_resnet50_fpn_detectron2", 80, key=jr.key(0))
    assert model.preprocessing == models.Preprocessing(
        models.ShortestEdge(800, 1333, rounded=True), (123.675, 116.28, 103.53), (1.0, 1.0, 1.0), pillow=True
    )
    assert model.pooling == models.RoIPooling(True, 0, 0.0, 1e-8)
    selection, sampling = model.selection, model.sampling
    assert (selection.rpn_min_size, selection.box_min_size, selection.rpn_rank_by_logits) == (0, 0, True)
    assert (selection.pre_nms_top_n, selection.post_nms_top_n, selection.max_detections) == (1000, 1000, 100)
    assert (sampling.pre_nms_top_n, sampling.post_nms_top_n, sampling.rpn_normalizer) == (2000, 1000, 256)
    assert model.rpn.smooth_l1_beta == model.box_head.smooth_l1_beta == 0
    assert model.rpn.anchor_strides == (4, 8, 16, 32, 64) and not model.rpn.rounded_anchors
    assert model.mask_threshold == 0.5 and model.paste is ops.paste_masks_at_centers
    for stage in model.backbone.body.layers[1:]:
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == (2, 1)
    wide = eqx.filter_eval_shape(zoo.build, "mask_rcnn_resnext101_32x8d_fpn_detectron2", 80, key=jr.key(0))
    assert wide.preprocessing.std == (58.395, 57.12, 57.375)
    assert wide.backbone.body.layers[1][0].conv2.stride == 2
    for name, proposals, beta in (("cascade_mask_rcnn", 2000, 0.0), ("keypoint_rcnn", 1500, 0.5)):
        other = eqx.filter_eval_shape(zoo.build, f"{name}_resnet50_fpn_detectron2", 1, key=jr.key(0))
        assert other.sampling == replace(sampling, post_nms_top_n=proposals)
        assert {head.smooth_l1_beta for head in other.box_head.stages} == {beta}


# Parameters


def drawn(kind, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), tiny.build(kind))


def equal(ours, theirs, besides=()):
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    assert list(ours) == list(theirs)
    for name in ours.keys() - set(besides):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


BACKGROUND = (
    "box_head.box_deltas.weight",
    "box_head.box_deltas.bias",
    "mask_head.mask_logits.weight",
    "mask_head.mask_logits.bias",
)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_round_trip(kind):
    """All but the boxes and masks of the background, which Detectron2 does not have."""
    model = drawn(kind)
    arrays = to_detectron2(model)
    assert {name: array.shape for name, array in arrays.items()} == detectron2_shapes(tiny.build(kind))
    loaded = load_detectron2(tiny.build(kind), dict(reversed(arrays.items())))
    equal(loaded, model, BACKGROUND)
    if kind == "cascade_mask_rcnn":  # one box for all classes, so there is none of the background
        assert arrays["roi_heads.box_predictor.2.bbox_pred.bias"].shape == (4,)
        equal(loaded.box_head, model.box_head)
    if kind == "mask_rcnn":
        np.testing.assert_array_equal(loaded.box_head.box_deltas.weight[4:], model.box_head.box_deltas.weight[4:])
        np.testing.assert_array_equal(loaded.mask_head.mask_logits.weight[1:], model.mask_head.mask_logits.weight[1:])
        assert not loaded.box_head.box_deltas.weight[:4].any() and not loaded.mask_head.mask_logits.bias[0]
    again = to_detectron2(loaded)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_arrangements():
    """The background is last there and first here, channels are BGR there, and anchors go by size before ratio."""
    model = drawn("mask_rcnn")
    arrays = to_detectron2(model)
    scores = arrays["roi_heads.box_predictor.cls_score.bias"]
    np.testing.assert_array_equal(scores, np.roll(model.box_head.class_logits.bias, -1))
    stem = arrays["backbone.bottom_up.stem.conv1.weight"]
    np.testing.assert_array_equal(stem[:, 0], model.backbone.body.conv1.weight[:, 2])
    np.testing.assert_array_equal(
        to_detectron2(model, bgr=False)["backbone.bottom_up.stem.conv1.weight"][:, 0],
        model.backbone.body.conv1.weight[:, 0],
    )
    assert arrays["roi_heads.box_predictor.bbox_pred.bias"].shape == (4 * tiny.CLASSES,)
    dense = drawn("retinanet")
    theirs = to_detectron2(dense)["head.bbox_pred.bias"].reshape(3, 3, 4)  # (sizes, ratios, 4)
    ours = np.asarray(dense.deltas.bias).reshape(3, 3, 4)  # (ratios, sizes, 4)
    for size in range(3):
        for ratio in range(3):
            np.testing.assert_array_equal(theirs[size, ratio], ours[ratio, size])


def test_entries_that_are_not_parameters():
    model = drawn("mask_rcnn")
    arrays = to_detectron2(model)
    more = {
        "pixel_mean": np.zeros((3, 1, 1)),
        "pixel_std": np.ones((3, 1, 1)),
        "proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4)),
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": np.array(3),
    }
    equal(
        load_detectron2(tiny.build("mask_rcnn"), {f"module.{k}": x for k, x in (arrays | more).items()}),
        model,
        BACKGROUND,
    )


def caffe2(arrays):
    """The names of a ResNet in Caffe2, whose norms have no statistics."""
    names = {
        "stem.conv1.weight": "conv1_w",
        "stem.conv1.norm.weight": "res_conv1_bn_s",
        "stem.conv1.norm.bias": "res_conv1_bn_b",
    }
    layers = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for name in arrays:
        if name.startswith("res") and "running" not in name:
            stage, block, layer, *kind = name.split(".")
            code = {"weight": "w", "norm.weight": "bn_s", "norm.bias": "bn_b"}[".".join(kind)]
            names[name] = f"{stage}_{block}_{layers[layer]}_{code}"
    return {names[name]: array for name, array in arrays.items() if name in names}


@pytest.mark.parametrize("wrapped", [False, True])
def test_backbones_of_msra(tmp_path, wrapped):
    """Names of Caffe2, no statistics, and a classifier's last layer."""
    body: Any = nn.resnet50(key=jr.key(0), width=4, stride_in_1x1=True)
    arrays = to_detectron2(body)
    content = caffe2(arrays) | {"fc1000_w": np.zeros((1000, 128), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
    assert len(content) == 1 + 2 + 3 * (16 * 3 + 4) + 2
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": content} if wrapped else content, 2))
    loaded: Any = load_detectron2(eqx.filter_eval_shape(lambda: body), tmp_path / "R-50.pkl")
    np.testing.assert_array_equal(loaded.conv1.weight, body.conv1.weight)
    np.testing.assert_array_equal(loaded.layers[2][5].conv3.weight, body.layers[2][5].conv3.weight)
    norm = loaded.layers[3][0].downsample.norm
    x = jr.normal(jr.key(1), (128, 3, 3))
    np.testing.assert_allclose(norm(x), x * norm.weight[:, None, None] + norm.bias[:, None, None], rtol=1e-6)
    backbone = nn.BackboneWithFPN(nn.resnet50(key=jr.key(3), width=4), key=jr.key(1), channels=8)
    model = models.faster_rcnn_detectron2(backbone, 3, key=jr.key(2), hidden_size=8)
    trained: Any = load_detectron2_backbone(model, tmp_path / "R-50.pkl")
    equal(trained.backbone.body, loaded)
    equal(trained.box_head, model.box_head)


def test_errors_name_what_does_not_fit(tmp_path):
    arrays = to_detectron2(drawn("mask_rcnn"))
    with pytest.raises(WeightsError, match=r"unused in the source: roi_heads\.mask_head\.") as caught:
        load_detectron2(tiny.build("faster_rcnn"), arrays)
    assert "seems to be a Mask R-CNN of Detectron2" in str(caught.value)
    short = {name: array for name, array in arrays.items() if "fc2" not in name}
    with pytest.raises(WeightsError, match=r"2 missing in the source: box_head\.fc7\.weight"):
        load_detectron2(tiny.build("mask_rcnn"), short)
    broken = arrays | {"roi_heads.box_predictor.cls_score.bias": np.full(6, np.nan, np.float32)}
    with pytest.raises(WeightsError, match=r"non-finite values in roi_heads\.box_predictor\.cls_score\.bias"):
        load_detectron2(tiny.build("mask_rcnn"), broken)
    scalar = arrays | {"roi_heads.box_predictor.cls_score.bias": np.float32(1)}
    with pytest.raises(WeightsError, match=r"float32 \(\) in the source"):
        load_detectron2(tiny.build("mask_rcnn"), scalar)
    with pytest.raises(FileNotFoundError):
        read_detectron2(tmp_path / "model_final.pkl")


def test_description():
    assert describe(to_detectron2(drawn("mask_rcnn"))) == (
        "a Mask R-CNN of Detectron2 on a ResNet of 1-1-1-1 blocks of width 8 with 6 outputs"
    )
    assert "RetinaNet of Detectron2" in str(describe(to_detectron2(drawn("retinanet"))))
    for arrays in (to_detectron2(drawn("cascade_mask_rcnn")), named_leaves(drawn("cascade_mask_rcnn"))):
        assert "a Cascade Mask R-CNN" in str(describe(arrays)) and "with 6 outputs" in str(describe(arrays))
