"""Detectors on synthetic arrays: one program, batch = vmap, finite losses for any targets, and learning."""

import functools
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Detections, Targets, models, nn, ops, train, zoo

from .zoo_names import NAMES


CANVAS = (64, 96)
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SAMPLING = models.TwoStageSampling(pre_nms_top_n=50, post_nms_top_n=40, rpn_samples=32, box_samples=32)
PREPROCESSING = models.Preprocessing(models.ShortestEdge(64, 96))


def tiny_body(key):
    return nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=key, width=8, norm=nn.GroupNorm)


def tiny_resnet(body_key, fpn_key, norm=None):
    return nn.BackboneWithFPN(tiny_body(body_key), key=fpn_key, channels=16, norm=norm)


def tiny_vit(body_key, fpn_key):
    options = {"side": 4, "window": 3, "global_blocks": (1,), "relative_side": 4}
    return nn.ViTFPN(nn.ViT(16, 2, 2, key=body_key, **options), key=fpn_key, channels=16)


def tiny_swin(body_key, fpn_key):
    body = nn.Swin(8, (1, 2, 1, 1), (1, 2, 2, 2), key=body_key, window=4, drop_path=0.0)
    return nn.BackboneWithFPN(body, key=fpn_key, channels=16, norm=nn.LayerNorm2d)


def tiny_two_stage(build, key, num_classes=3, make_backbone=tiny_resnet, **parts):
    body_key, fpn_key, heads_key = jr.split(key, 3)
    backbone = make_backbone(body_key, fpn_key)
    sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (96.0,))
    model = build(backbone, num_classes, key=heads_key, hidden_size=32, anchor_sizes=sizes, **parts)
    return replace(model, preprocessing=PREPROCESSING, sampling=SAMPLING)


def tiny_dense(build, key, num_classes=3, **parts):
    body_key, fpn_key, top_key, heads_key = jr.split(key, 4)
    top = nn.ConvolvedTop(16, 16, key=top_key)
    backbone = nn.BackboneWithFPN(tiny_body(body_key), key=fpn_key, channels=16, finest=3, top=top)
    return replace(build(backbone, num_classes, key=heads_key, depth=2, **parts), preprocessing=PREPROCESSING)


def tiny_mobilenet(build, key, num_classes=3):
    """A Faster R-CNN on a narrow MobileNet: levels of strides 16 to 64, the last two of the body of equal size."""
    body_key, fpn_key, heads_key = jr.split(key, 3)
    body = build(key=body_key, width_multiplier=0.25, norm=partial(nn.GroupNorm, groups=8))
    backbone = nn.MobileNetFPN(body, key=fpn_key, channels=16, levels=(3, 4, 5))
    sizes = ((8.0, 16.0, 32.0, 64.0),) * 4
    model = models.faster_rcnn(backbone, num_classes, key=heads_key, hidden_size=32, anchor_sizes=sizes)
    # Among two levels of equal anchors, detection must leave out the proposals that training leaves out.
    return replace(
        model,
        preprocessing=PREPROCESSING,
        sampling=replace(SAMPLING, rpn_score_threshold=0.01),
        selection=models.selected(model, rpn_score_threshold=0.01),
    )


BOXES = models.DefaultBoxes(steps=None)


def tiny_ssd(key, num_classes=3):
    body_key, extras_key, heads_key = jr.split(key, 3)
    extras = ((32, 2, 1), (16, 2, 1), (16, 2, 1), (16, 2, 1))
    backbone = nn.SSDVGG(nn.vgg16(key=body_key, width=8), key=extras_key, fc_channels=32, extras=extras)
    model = models.ssd(backbone, num_classes, key=heads_key, default_boxes=BOXES)
    return replace(model, preprocessing=PREPROCESSING)


def tiny_ssdlite(key, num_classes=3):
    body_key, extras_key, heads_key = jr.split(key, 3)
    norm = partial(nn.GroupNorm, groups=8)
    body = nn.mobilenet_v3_large(key=body_key, norm=norm, width_multiplier=0.25, reduced_tail=True)
    backbone = nn.SSDMobileNet(body, key=extras_key, norm=norm, extras=(32, 16, 16, 16))
    return replace(models.ssdlite(backbone, num_classes, key=heads_key, norm=norm), preprocessing=PREPROCESSING)


def tiny_rf_detr(build, key, num_classes=3):
    """On canvases that need not be square: patches of 8 pixels, in four windows."""
    keys = jr.split(key, 3)
    body = nn.WindowedViT(16, 2, key=keys[0], patch_size=8, side=8, windows=2, taps=(1, 2))
    backbone = nn.ProjectedViT(body, key=keys[1], channels=16, depth=1)
    options = {"layers": 2, "queries": 20, "groups": 2, "self_heads": 2, "cross_heads": 2, "hidden_size": 32}
    return replace(build(backbone, num_classes, key=keys[2], **options), preprocessing=PREPROCESSING)


def tiny_detr(key, num_classes=3):
    keys = jr.split(key, 3)
    body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=keys[0], norm=nn.GroupNorm, width=8)
    backbone = nn.ProjectedResNet(body, key=keys[1], channels=16)
    options = {"layers": 2, "queries": 20, "heads": 2, "hidden_size": 32}
    return replace(models.detr(backbone, num_classes, key=keys[2], **options), preprocessing=PREPROCESSING)


def tiny_deformable_detr(key, num_classes=3):
    keys = jr.split(key, 3)
    body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=keys[0], norm=nn.GroupNorm, width=8)
    backbone = nn.ProjectedLevels(body, key=keys[1], channels=16)
    options = {"layers": 2, "queries": 20, "heads": 2, "points": 2, "hidden_size": 32, "refine": True}
    return replace(models.deformable_detr(backbone, num_classes, key=keys[2], **options), preprocessing=PREPROCESSING)


V2 = {
    "make_backbone": partial(tiny_resnet, norm=nn.GroupNorm),
    "rpn_depth": 2,
    "box_head": partial(models.ConvBoxHead, hidden_channels=16, depth=2, norm=nn.GroupNorm),
}
# How to build each tiny detector, and the names of its loss terms.
MODELS = {
    "faster": (partial(tiny_two_stage, models.faster_rcnn), LOSSES),
    "mask": (partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16), LOSSES | {"loss_mask"}),
    "keypoint": (
        partial(tiny_two_stage, models.keypoint_rcnn, num_keypoints=3, hidden_channels=16, depth=2),
        LOSSES | {"loss_keypoint"},
    ),
    "mask_v2": (
        partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16, mask_norm=nn.GroupNorm, **V2),
        LOSSES | {"loss_mask"},
    ),
    "cascade": (
        partial(tiny_two_stage, models.mask_rcnn, hidden_channels=16, box_head=models.CascadeHead),
        {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
        | {f"{name}_stage{i}" for name in ("loss_classifier", "loss_box_reg") for i in range(3)},
    ),
    "vit": (partial(tiny_two_stage, models.faster_rcnn, make_backbone=tiny_vit), LOSSES),
    "swin": (partial(tiny_two_stage, models.faster_rcnn, make_backbone=tiny_swin), LOSSES),
    "mobilenet": (partial(tiny_mobilenet, nn.mobilenet_v3_large), LOSSES),
    "retinanet": (
        partial(tiny_dense, models.retinanet, anchor_sizes=((12.0,), (24.0,), (36.0,), (48.0,), (64.0,))),
        {"classification", "bbox_regression"},
    ),
    "ssd": (tiny_ssd, {"classification", "bbox_regression"}),
    "ssdlite": (tiny_ssdlite, {"classification", "bbox_regression"}),
    "rf_detr": (partial(tiny_rf_detr, models.rf_detr), {"loss_class", "loss_l1", "loss_giou"}),
    "rf_detr_seg": (
        partial(tiny_rf_detr, models.rf_detr_seg),
        {"loss_class", "loss_l1", "loss_giou", "loss_mask", "loss_dice"},
    ),
    "detr": (tiny_detr, {"loss_class", "loss_l1", "loss_giou"}),
    "deformable_detr": (tiny_deformable_detr, {"loss_class", "loss_l1", "loss_giou"}),
    "fcos": (partial(tiny_dense, models.fcos), {"classification", "bbox_regression", "bbox_ctrness"}),
}


def targets_of(boxes, labels, capacity=4):
    """Rectangular objects, padded to a capacity. Three points of each lie on the diagonal of its box."""
    n = len(labels)
    padded = jnp.zeros((capacity, 4)).at[:n].set(jnp.asarray(boxes, jnp.float32).reshape(n, 4))
    return Targets(
        padded,
        jnp.zeros(capacity, jnp.int32).at[:n].set(jnp.asarray(labels, jnp.int32)),
        jnp.arange(capacity) < n,
        jnp.full((capacity, 14, 14), 255, jnp.uint8),
        padded,
        points_of(padded),
    )


def points_of(boxes):
    """`(x, y, visibility)` at one quarter, half and three quarters of the way from a box's first to its last corner."""
    along = jnp.array([0.25, 0.5, 0.75])[None, :, None]
    places = boxes[:, None, :2] * (1 - along) + boxes[:, None, 2:] * along  # (n, 3, 2)
    visibility = jnp.broadcast_to(jnp.array([2.0, 1.0, 2.0])[None, :, None], (*places.shape[:2], 1))
    return jnp.concatenate([places, visibility], axis=2)


@functools.cache
def made(kind):
    """The model of a kind, built once."""
    return eqx.filter_jit(MODELS[kind][0])(jr.key(0))


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


SIZE = jnp.array(CANVAS, jnp.int32)


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


# The steps in which detection transformers on several maps, or with masks, learn what others do in 300.
LATE = {"deformable_detr": 1500, "rf_detr": 1500, "rf_detr_seg": 3000}


def speed(kind):
    return [pytest.mark.long, pytest.mark.timeout(900)] if kind in LATE else [pytest.mark.slow]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=speed(kind) if kind != "faster" else []) for kind in MODELS])
def test_overfits_a_handful_of_images(kind):
    """Bright rectangles on a dark background: after 300 steps, or those of `LATE`, each is found, with its class.

    After 200 steps at twice the learning rate, one of seven runs that differ only in their keys or in rounding misses
    one.
    """
    steps = LATE.get(kind, 300)
    model = made(kind)
    rng = np.random.default_rng(0)
    images, targets, truths = [], [], []
    for _ in range(4):
        image = rng.integers(0, 40, (*CANVAS, 3)).astype(np.uint8)
        boxes = np.array([[4, 6, 30, 40], [50, 20, 90, 60]], np.float32) + rng.integers(-3, 4, (2, 1))
        labels = rng.permutation(3)[:2]
        for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True):
            image[y0:y1, x0:x1, label] = 220
        images.append(image)
        targets.append(targets_of(boxes, labels, 2))
        truths.append((boxes, labels))
    images = jnp.asarray(np.stack(images))
    targets = jax.tree.map(lambda *leaves: jnp.stack(leaves), *targets)
    optimizer = train.adamw(train.warmup_cosine(1e-3, total_steps=steps, warmup_steps=10), weight_decay=0.0)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, key):
        def total(model):
            one = lambda image, target, key: model.loss(image, SIZE, target, key=key)  # noqa: E731
            terms = jax.vmap(one)(images, targets, jr.split(key, 4))
            return sum(jax.tree.map(lambda x: x.sum(), term).mean() for term in terms.values())

        value, grads = eqx.filter_value_and_grad(total)(model)
        updates, state_ = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state_, value

    value = None
    for i in range(steps):
        model, state, value = step(model, state, jr.key(i))
    detect = eqx.filter_jit(lambda m, x: models.detect(m, x, score_threshold=0.5))
    for image, (boxes, labels) in zip(images, truths, strict=True):
        detections: Detections = detect(model, image)
        for box, label in zip(boxes, labels, strict=True):
            ious = [_iou(box, other) for other in np.asarray(detections.boxes)]
            best = int(
                np.argmax(np.where(np.asarray(detections.valid) & (np.asarray(detections.labels) == label), ious, -1))
            )
            assert ious[best] > 0.6, f"loss {value}, box {box}, found {detections.boxes[:4]}"
            if detections.masks is not None:
                mask = detections.masks[best]
                if detections.mask_boxes is not None:  # not in the frame of its box
                    mask = ops.paste_masks(mask[None], detections.mask_boxes[best][None], image_size=CANVAS)[0]
                    x0, y0, x1, y1 = box.astype(int)
                    mask = mask[y0:y1, x0:x1]
                assert mask.mean() > 0.7
            if detections.keypoints is not None:
                away = detections.keypoints[best, :, :2] - points_of(jnp.asarray(box)[None])[0, :, :2]
                assert jnp.abs(away).max() < 4


def _iou(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = np.prod(np.maximum(sides, 0))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


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
