"""Detectors on synthetic arrays: one program, batch = vmap, and finite losses for any targets."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, ops, zoo

from .tiny_models import CANVAS, MODELS, SIZE, made, targets_of
from .zoo_names import NAMES


@pytest.mark.parametrize("kind", ["faster", "mask_v2"])
@pytest.mark.parametrize("part", ["corners", "all"])
def test_predictions_at_some_anchors(kind, part, getkey):
    """They equal those of the dense head, in the corners and the middle of every level, and so do the gradients.

    A few anchors are computed from their patches, all of them from the maps.
    """
    rpn = made(kind).rpn
    features = tuple(jr.normal(getkey(), (16, h, w)) for h, w in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2)))
    indices, first = [], 0
    for _, h, w in (x.shape for x in features):
        rows, columns = (sorted({0, size // 2, max(0, size - 2), size - 1}) for size in (h, w))
        cells = range(h * w) if part == "all" else sorted({row * w + column for row in rows for column in columns})
        indices += [first + 3 * cell + i for cell in cells for i in (range(3) if part == "all" else [cell % 3])]
        first += 3 * h * w
    indices = jnp.asarray(indices[::-1], jnp.int32)

    def dense(rpn, features):
        output = rpn(features, CANVAS)
        return jnp.concatenate(output.logits)[indices], jnp.concatenate(output.deltas)[indices]

    def sampled(rpn, features):
        return rpn.at_anchors(features, indices)

    def weighted(predict):
        logits, deltas = predict
        return jnp.sin(logits).sum() + jnp.sin(3 * deltas).sum()

    for a, b in zip(dense(rpn, features), sampled(rpn, features), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    gradients = [
        eqx.filter_grad(lambda tree, predict=predict: weighted(predict(*tree)))((rpn, features))
        for predict in (dense, sampled)
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


# Models that compile for long: `make test-slow` has them.
SLOW = (
    "cascade",
    "deformable_detr",
    "detr",
    "fcos",
    "keypoint",
    "mask_v2",
    "mobilenet",
    "retinanet",
    "rf_detr_seg",
    "ssd",
    "ssdlite",
    "swin",
    "vit",
)


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in MODELS])
def case(request):
    return made(request.param), MODELS[request.param][1]


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def value_and_gradient(model, image, targets, key):
    """The sum of a loss's terms, the terms, and the gradient: compiled once per model and capacity."""
    terms = model.loss(image, SIZE, targets, key=key)
    return sum(term.mean() for term in terms.values()), terms


@eqx.filter_jit
def terms_of(model, image, targets, key):
    """The terms of a loss."""
    return model.loss(image, SIZE, targets, key=key)


def _image(key, size=CANVAS):
    return jr.randint(key, (*size, 3), 0, 256).astype(jnp.uint8)


@pytest.mark.parametrize(
    "boxes, labels",
    [
        ([], []),  # no object, or crowds only
        ([[10, 10, 40, 50]], [2]),
        ([[10, 10, 40, 50], [0, 0, 96, 64], [50, 20, 52, 21], [80, 50, 96, 64]], [0, 1, 2, 0]),  # full capacity
    ],
)
def test_losses_are_finite(case, getkey, boxes, labels):
    model, names = case
    (value, terms), grads = value_and_gradient(model, _image(getkey()), targets_of(boxes, labels), getkey())
    assert terms.keys() == names
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for name in names & {"loss_mask", "loss_keypoint"}:
        assert (terms[name].count > 0) == bool(labels)


def test_padded_rows_of_targets_change_nothing(case, getkey):
    model, _ = case
    image, key = _image(getkey()), getkey()
    padded = targets_of([[10, 10, 40, 50], [50, 5, 90, 60]], [2, 0])
    rubbish = replace(padded, boxes=padded.boxes.at[2:].set(33.0), labels=padded.labels.at[2:].set(1))
    a, b = terms_of(model, image, padded, key), terms_of(model, image, rubbish, key)
    for name in a:
        np.testing.assert_allclose(a[name].total, b[name].total, rtol=1e-5)
        assert a[name].count == b[name].count
    assert any(term.count > 0 for term in a.values())


def _by_place(detections):
    """Detections ordered by label, then by the corners of their boxes."""
    corners = np.asarray(detections.boxes).T[::-1]
    order = np.lexsort((*corners, np.asarray(detections.labels), ~np.asarray(detections.valid)))
    return jax.tree.map(lambda x: x[order], detections)


def test_an_image_alone_and_in_a_batch_give_the_same(case, getkey):
    model, _ = case
    images = jnp.stack([_image(getkey(), (50, 70)) for _ in range(3)])
    options = {"score_threshold": 0.005, "max_detections": 10}
    alone = eqx.filter_jit(lambda model, image: models.detect(model, image, **options))
    together = eqx.filter_jit(
        lambda model, images: jax.vmap(lambda image: models.detect(model, image, **options))(images)
    )
    batch = together(model, images)
    assert batch.valid.sum() > 10
    for i in range(3):
        one, other = alone(model, images[i]), jax.tree.map(lambda x, i=i: x[i], batch)
        np.testing.assert_array_equal(one.valid, other.valid)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
        # Rows whose scores differ by rounding errors may have swapped places.
        one, other = _by_place(one), _by_place(other)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        if one.masks is not None:
            np.testing.assert_allclose(one.masks, other.masks, atol=1e-4)
        if one.keypoints is not None:
            np.testing.assert_allclose(one.keypoints, other.keypoints, atol=1e-3)
            assert one.keypoints[one.valid].any() and not one.keypoints[~one.valid].any()
    assert together(model, images[:0]).boxes.shape == (0, 10, 4)


def test_a_padded_image_gives_what_it_gives_alone(case, getkey):
    model, _ = case
    image = _image(getkey(), (50, 70))
    options = {"canvas": (64, 96), "score_threshold": 0.005, "max_detections": 10}
    alone = eqx.filter_jit(lambda m, x: models.detect(m, x, **options))(model, image)
    padded = jnp.pad(image, ((0, 14), (0, 10), (0, 0)), constant_values=77)
    sizes = {"source_size": jnp.array([50, 70]), "canvas_size": jnp.array([64, 89])}
    inside = eqx.filter_jit(lambda m, x: models.detect(m, x, **sizes, **options))(model, padded)
    np.testing.assert_array_equal(alone.labels, inside.labels)
    np.testing.assert_allclose(alone.boxes, inside.boxes, atol=1e-3)
    np.testing.assert_allclose(alone.scores, inside.scores, atol=1e-4)


def test_detect_is_one_program_without_callbacks(case, getkey):
    model, _ = case
    arrays, static = eqx.partition(model, eqx.is_array)

    def run(arrays, image):
        detections = models.detect(eqx.combine(arrays, static), image)
        if detections.masks is None:
            return detections
        return detections, ops.paste_masks(detections.masks, detections.boxes, image_size=(50, 70))

    text = jax.jit(run).lower(arrays, _image(getkey(), (50, 70))).as_text()
    assert "callback" not in text
    assert "custom_call" not in text.replace("custom_call @Sharding", "")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"canvas": (32, 32)}, r"canvas \(32, 32\) is too small .* Use at least \(64, 96\)"),
        ({"canvas": (70, 100)}, "multiple of 32 .* 70×100"),
        ({"source_size": jnp.array([3, 4])}, "source_size, canvas_size and canvas go together"),
    ],
)
def test_detect_refuses(options, message):
    model = made("faster")
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(lambda: models.detect(model, jnp.zeros((50, 70, 3), jnp.uint8), **options))


def test_mask_loss_refuses_targets_without_masks(getkey):
    model = made("mask")
    targets = replace(targets_of([], []), masks=None, mask_boxes=None)
    with pytest.raises(ValueError, match="targets have no masks"):
        model.loss(_image(getkey()), SIZE, targets, key=getkey())


def test_keypoint_loss_refuses_targets_without_keypoints(getkey):
    model, targets = made("keypoint"), targets_of([], [])
    assert targets.keypoints is not None
    with pytest.raises(ValueError, match="targets have no keypoints"):
        model.loss(_image(getkey()), SIZE, replace(targets, keypoints=None), key=getkey())
    with pytest.raises(ValueError, match="targets have 2 keypoints per object, but the model has 3"):
        model.loss(_image(getkey()), SIZE, replace(targets, keypoints=targets.keypoints[:, :2]), key=getkey())


def test_keypoint_loss_equals_naive_reference(getkey):
    """Points that are hidden count; points that are not labelled, or outside the proposal, and negatives do not."""
    logits = jr.normal(getkey(), (4, 3, 8, 8))
    boxes = jnp.array([[10.0, 10, 40, 50], [12, 8, 44, 46], [50, 20, 70, 30], [50, 20, 70, 30]])
    sampled = models.SampledProposals(
        boxes, jnp.ones(4, bool), jnp.array([True, True, True, False]), jnp.array([0, 0, 1, 1])
    )
    targets = targets_of([[10, 10, 40, 50], [48, 18, 74, 31]], [0, 0])
    assert targets.keypoints is not None
    keypoints = targets.keypoints.at[0, 0, 2].set(0.0).at[1, 2].set(jnp.array([71.0, 25.0, 2.0]))
    targets = replace(targets, keypoints=keypoints)
    loss = models.keypoint_loss(logits, sampled, targets)["loss_keypoint"]
    total, count = 0.0, 0
    for row, (x0, y0, x1, y1), matched in zip(np.asarray(logits, np.float64), boxes.tolist(), (0, 0, 1), strict=False):
        for values, (x, y, visibility) in zip(row, keypoints[matched].tolist(), strict=True):
            if visibility and x0 <= x < x1 and y0 <= y < y1:
                value = values[int((y - y0) * 8 / (y1 - y0)), int((x - x0) * 8 / (x1 - x0))]
                total, count = total + np.log(np.exp(values).sum()) - value, count + 1
    assert loss.count == count == 6
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)


@pytest.mark.parametrize(
    "name, num_classes, parameters",
    [
        ("faster_rcnn_resnet50_fpn", 90, 41_755_286),
        ("mask_rcnn_resnet50_fpn", 90, 44_401_393),
        ("keypoint_rcnn_resnet50_fpn", 1, 59_137_258),
        # Less those of the BatchNorms, which are frozen here: of the backbone, the pyramid and the heads.
        ("faster_rcnn_resnet50_fpn_v2", 90, 43_712_278 - 53_120 - 4_096 - 2_048),
        ("mask_rcnn_resnet50_fpn_v2", 90, 46_359_409 - 53_120 - 4_096 - 2 * 2_048),
        ("faster_rcnn_mobilenet_v3_large_fpn", 90, 19_386_354),
        ("faster_rcnn_mobilenet_v3_large_320_fpn", 90, 19_386_354),
        ("retinanet_resnet50_fpn", 91, 34_014_999),
        ("retinanet_resnet50_fpn_v2", 91, 38_198_935 - 53_120),  # less those of its BatchNorms, which are frozen here
        ("fcos_resnet50_fpn", 91, 32_269_600),
        ("ssd300_vgg16", 90, 35_641_826),
        ("ssdlite320_mobilenet_v3_large", 90, 3_440_060 - 32_944),  # less those of its BatchNorms
    ],
)
def test_parameter_counts_equal_torchvisions(name, num_classes, parameters):
    model = eqx.filter_eval_shape(zoo.build, name, num_classes, key=jr.key(0))
    assert models.num_parameters(model) == parameters


def is_norm(node):
    return isinstance(node, nn.FrozenBatchNorm | nn.GroupNorm)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_detector(name):
    model = eqx.filter_eval_shape(zoo.build, name, 7, key=jr.key(0))
    assert isinstance(model, models.AbstractDetector)
    assert model.num_classes == 7 and "boxes" in model.needs
    from_scratch = eqx.filter_eval_shape(zoo.Architecture(name, "group").build, 7, key=jr.key(0))
    norms = [x for x in jax.tree.leaves(from_scratch, is_leaf=is_norm) if is_norm(x)]
    without = any(part in name for part in ("ssd300", "vitdet", "swin", "rf_detr"))  # no norms, or LayerNorm
    assert (norms or without) and not any(isinstance(norm, nn.FrozenBatchNorm) for norm in norms)
    # 32 groups, or fewer where a MobileNet's width is not a multiple of 32.
    assert all(norm.groups in (8, 16, 32) for norm in norms)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="no detector 'yolo'; choose one of faster_rcnn_resnet18_fpn, "):
        zoo.build("yolo", 3, key=jr.key(0))


def test_fields_of_a_selection_can_be_replaced_by_name():
    model = made("faster")
    chosen = models.selected(model, pre_nms_top_n=7, score_threshold=None)
    assert isinstance(chosen, models.TwoStageSelection)
    assert (chosen.pre_nms_top_n, chosen.score_threshold) == (7, model.selection.score_threshold)
    with pytest.raises(ValueError, match="TwoStageSelection has no iou; its fields are score_threshold, "):
        models.selected(model, iou=0.5)


@pytest.mark.parametrize(
    "layers, stem, first, last", [(5, True, True, True), (3, False, False, True), (0, False, False, False)]
)
def test_trainable(layers, stem, first, last):
    mask = models.trainable(made("mask"), trainable_layers=layers)
    body = mask.backbone.body
    assert body.conv1.weight is stem
    assert body.norm1.weight is stem
    assert body.layers[0][0].conv1.weight is first
    assert body.layers[3][0].conv2.weight is last
    assert mask.backbone.fpn.lateral[0].weight is True
    assert mask.mask_head.mask_logits.weight is True


def test_frozen_norms_are_never_trainable(getkey):
    model = eqx.filter_eval_shape(zoo.build, "faster_rcnn_resnet18_fpn", 2, key=getkey())
    arrays = jax.tree.map(lambda leaf: jnp.zeros(()) if hasattr(leaf, "shape") else leaf, model)
    mask = models.trainable(arrays)
    assert mask.backbone.body.conv1.weight is True
    assert not any(jax.tree.leaves(mask.backbone.body.layers[3][0].norm1))
    with pytest.raises(ValueError, match=r"trainable_layers must be in 0\.\.5, got 6"):
        models.trainable(arrays, trainable_layers=6)
