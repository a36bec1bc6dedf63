"""Parts of SSD against hand tables and loops: default boxes, matching, hard negatives, and its backbones."""

import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, nn, ops
from detectax_eqx.models import _ssd as ssd


def test_default_boxes_of_a_cell():
    """Two squares, then a wide and a tall box per ratio, around the centre of the cell."""
    boxes = models.DefaultBoxes(aspect_ratios=((2.0,),), scales=(0.2, 0.8), steps=None)([(1, 2)], (60, 120))
    x, y = 30.0, 30.0  # of the first of two cells of 60×60
    larger, long, short = math.sqrt(0.2 * 0.8), 0.2 * math.sqrt(2), 0.2 / math.sqrt(2)
    sides = [(0.2, 0.2), (larger, larger), (long, short), (short, long)]
    expected = [[x - 60 * w, y - 30 * h, x + 60 * w, y + 30 * h] for w, h in sides]  # halves of 120 w and 60 h
    np.testing.assert_allclose(boxes[:4], expected, rtol=1e-6)
    np.testing.assert_allclose(boxes[4:], np.array(expected) + np.array([60, 0, 60, 0]), rtol=1e-6)


def test_default_boxes_of_ssd300():
    """8732 boxes; the coarsest map's step of 300 pixels, and a scale above 1, which is cut to the canvas."""
    sizes = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    boxes = np.asarray(models.DefaultBoxes()(sizes, (300, 300)))
    assert boxes.shape == (8732, 4)
    np.testing.assert_allclose(boxes[0], [4 - 10.5, 4 - 10.5, 4 + 10.5, 4 + 10.5], atol=1e-4)  # .07 · 300 = 21
    np.testing.assert_allclose(boxes[-4], [19.5, 19.5, 280.5, 280.5], atol=1e-4)  # .87 · 300 = 261
    side = 300 * math.sqrt(0.87 * 1.05)
    np.testing.assert_allclose(boxes[-3], [150 - side / 2, 150 - side / 2, 150 + side / 2, 150 + side / 2], atol=1e-3)
    long = 300.0  # .87 · √2 > 1
    np.testing.assert_allclose(boxes[-2, [0, 2]], [150 - long / 2, 150 + long / 2], atol=1e-4)


def test_default_boxes_refuse():
    with pytest.raises(ValueError, match="scales must have one entry more than the 2 levels"):
        models.DefaultBoxes(aspect_ratios=((), ()), scales=(0.1, 0.2), steps=None)
    with pytest.raises(ValueError, match="There are default boxes for 6 levels, but 1 maps"):
        models.DefaultBoxes()([(2, 2)], (10, 10))
    model = eqx.filter_eval_shape(lambda: nn.SSDVGG(nn.vgg16(key=jr.key(0)), key=jr.key(1)))
    with pytest.raises(ValueError, match="default_boxes has 1 levels, but the backbone has 6"):
        models.ssd(model, 3, key=jr.key(0), default_boxes=models.DefaultBoxes(((),), (0.1, 0.2), None))


def naive_match(iou, valid, threshold):
    """The matching rule, one default box and then one object at a time."""
    matched, positive = np.zeros(iou.shape[1], int), np.zeros(iou.shape[1], bool)
    for a in range(iou.shape[1]):
        rows = [n for n in range(len(iou)) if valid[n]]
        if rows and max(iou[n, a] for n in rows) >= threshold:
            matched[a], positive[a] = max(rows, key=lambda n: (iou[n, a], -n)), True
    for n in range(len(iou)):
        if valid[n]:
            best = int(np.argmax(iou[n]))
            matched[best], positive[best] = n, True
    return matched, positive


@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_a_loop(seed):
    """Objects that share their best default box, and padded rows, among them."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (40, 2))
    default = np.concatenate([corner, corner + rng.uniform(10, 30, (40, 2))], axis=1).astype(np.float32)
    boxes = default[rng.integers(0, 12, 9)] + rng.uniform(-6, 6, (9, 4)).astype(np.float32)
    boxes[1] = boxes[0] + 0.25
    valid = rng.random(9) < 0.7
    valid[:2] = True
    iou = np.asarray(ops.pairwise_iou(jnp.asarray(boxes), jnp.asarray(default)))
    matched, positive = jax.jit(ssd.match_default_boxes)(jnp.asarray(iou), jnp.asarray(valid))
    expected, expected_positive = naive_match(iou, valid, 0.5)
    np.testing.assert_array_equal(positive, expected_positive)
    np.testing.assert_array_equal(np.asarray(matched)[expected_positive], expected[expected_positive])
    assert np.argmax(iou[0]) == np.argmax(iou[1]) and positive.sum() > 3
    assert not ssd.match_default_boxes(jnp.asarray(iou), jnp.zeros(9, bool))[1].any()
    assert not ssd.match_default_boxes(jnp.zeros((0, 40)), jnp.zeros(0, bool))[1].any()


def test_hardest_negatives():
    rng = np.random.default_rng(0)
    losses, candidates = rng.permutation(30).astype(np.float32), rng.random(30) < 0.6
    for count in (0, 1, 7, 100):
        chosen = ssd.hardest(jnp.asarray(losses), jnp.asarray(candidates), jnp.asarray(float(count)))
        order = sorted(np.flatnonzero(candidates), key=lambda i: -losses[i])[:count]
        assert set(np.flatnonzero(np.asarray(chosen)).tolist()) == set(map(int, order))


def tiny(num_classes=3):
    extras = ((32, 2, 1), (16, 2, 1), (16, 2, 1), (16, 2, 1))
    backbone = nn.SSDVGG(nn.vgg16(key=jr.key(0), width=8), key=jr.key(1), fc_channels=32, extras=extras)
    boxes = models.DefaultBoxes(steps=None)
    model = models.ssd(backbone, num_classes, key=jr.key(2), default_boxes=boxes)
    preprocessing = replace(model.preprocessing, resize=models.Square(64))
    return replace(model, preprocessing=preprocessing)


def test_losses_equal_a_loop():
    """Both terms, from the predictions of the same model, in NumPy and float64."""
    model = eqx.filter_jit(tiny)()
    image = jr.randint(jr.key(3), (64, 64, 3), 0, 256).astype(jnp.uint8)
    objects = np.array([[8, 8, 40, 44], [30, 20, 60, 30], [0, 0, 0, 0]], np.float32)
    targets = Targets(jnp.asarray(objects), jnp.array([2, 0, 1]), jnp.array([True, True, False]))
    size = jnp.array([64, 64], jnp.int32)
    terms = eqx.filter_jit(lambda model: model.loss(image, size, targets, key=jr.key(0)))(model)
    predicted = eqx.filter_jit(lambda model: model.predict(image, size))(model)
    logits, deltas, boxes = (np.asarray(x, np.float64) for x in predicted)
    iou = np.asarray(ops.pairwise_iou(targets.boxes, predicted[2]))
    matched, positive = naive_match(iou, np.asarray(targets.valid), 0.5)
    labels = np.where(positive, np.array([3, 1, 2])[matched], 0)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), labels]
    negatives = np.sort(losses[~positive])[::-1][: 3 * positive.sum()]
    assert positive.sum() >= 2 and int(terms["classification"].count) == positive.sum()
    np.testing.assert_allclose(terms["classification"].total, losses[positive].sum() + negatives.sum(), rtol=1e-5)
    total = 0.0
    for a in np.flatnonzero(positive):
        (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes[a], objects[matched[a]]
        w, h = x1 - x0, y1 - y0
        wanted = [10 * ((u0 + u1) / 2 - (x0 + x1) / 2) / w, 10 * ((v0 + v1) / 2 - (y0 + y1) / 2) / h]
        wanted += [5 * math.log((u1 - u0) / w), 5 * math.log((v1 - v0) / h)]
        error = np.abs(deltas[a] - wanted)
        total += np.where(error < 1, 0.5 * error**2, error - 0.5).sum()
    np.testing.assert_allclose(terms["bbox_regression"].total, total, rtol=1e-4)


def test_an_image_is_made_square():
    """Boxes come back in the image's own proportions."""
    model = eqx.filter_jit(tiny)()
    image = jr.randint(jr.key(3), (50, 90, 3), 0, 256).astype(jnp.uint8)
    detections = eqx.filter_jit(lambda model, image: models.detect(model, image, score_threshold=0.005))(model, image)
    boxes = np.asarray(detections.boxes)[np.asarray(detections.valid)]
    assert len(boxes) > 20
    assert 64 < boxes[:, 2].max() <= 90 and boxes[:, 3].max() <= 50


def test_sizes_of_the_maps():
    """Those of the papers at 300 and 320 pixels, from shapes alone."""
    image = jax.ShapeDtypeStruct((3, 300, 300), jnp.float32)
    vgg = eqx.filter_eval_shape(lambda: nn.SSDVGG(nn.vgg16(key=jr.key(0), rounded_up=(2,)), key=jr.key(1)))
    maps = eqx.filter_eval_shape(lambda model, image: model(image), vgg, image)
    assert [x.shape for x in maps] == [(c, s, s) for c, s in zip(vgg.channels, (38, 19, 10, 5, 3, 1), strict=True)]
    assert vgg.channels == (512, 1024, 512, 256, 256, 256)
    image = jax.ShapeDtypeStruct((3, 320, 320), jnp.float32)

    def build():
        return nn.SSDMobileNet(nn.mobilenet_v3_large(key=jr.key(0), reduced_tail=True), key=jr.key(1))

    mobile = eqx.filter_eval_shape(build)
    maps = eqx.filter_eval_shape(lambda model, image: model(image), mobile, image)
    assert [x.shape for x in maps] == [(c, s, s) for c, s in zip(mobile.channels, (20, 10, 5, 3, 2, 1), strict=True)]
    assert mobile.channels == (672, 480, 512, 256, 256, 128)


@pytest.mark.parametrize(
    "side, kernel, stride, padding", [(7, 2, 2, 0), (8, 2, 2, 0), (7, 3, 2, 1), (6, 3, 2, 0), (5, 2, 3, 1)]
)
def test_max_pooling_rounded_up(side, kernel, stride, padding):
    """Against windows in turn, with torch's rule: the last one must begin on the map or in its first padding."""
    x = jr.normal(jr.key(0), (2, side, side + 1)) - 5.0  # negative: padding with zeros would win
    y = nn.max_pool2d(x, kernel_size=kernel, stride=stride, padding=padding, round_up=True)
    starts = [
        [
            s
            for s in range(-padding, size, stride)
            if s < size and (s == -padding or s - stride + kernel < size + padding)
        ]
        for size in x.shape[1:]
    ]
    expected = [
        [np.asarray(x)[:, max(i, 0) : i + kernel, max(j, 0) : j + kernel].max(axis=(1, 2)) for j in starts[1]]
        for i in starts[0]
    ]
    np.testing.assert_array_equal(y, np.moveaxis(np.array(expected), 2, 0))
    assert jnp.isfinite(jax.grad(lambda x: nn.max_pool2d(x, kernel_size=2, stride=2, round_up=True).sum())(x)).all()
