"""The parts that dense detectors share, compared with naive loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import Targets, models, ops
from detectax_eqx.models import _dense as dense, _fcos as fcos


ANCHORS = np.array(
    [[x * stride - stride / 2, y * stride - stride / 2, x * stride + stride / 2, y * stride + stride / 2]
     for stride, side in ((8, 8), (16, 4), (32, 2)) for y in range(side) for x in range(side)],
    np.float32,
)  # fmt: skip
COUNTS = [64, 16, 4]


def naive_match(anchors, boxes, valid, matching):
    """The matching rule of FCOS in float64, one cell and one object at a time."""
    matched, positive = np.zeros(len(anchors), int), np.zeros(len(anchors), bool)
    for i, anchor in enumerate(anchors.astype(np.float64)):
        x, y, size = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, anchor[2] - anchor[0]
        least = 0.0 if i < COUNTS[0] else matching.least * size
        most = math.inf if i >= len(anchors) - COUNTS[-1] else matching.most * size
        best = math.inf
        for j, (x0, y0, x1, y1) in enumerate(boxes.astype(np.float64)):
            near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < matching.center_radius * size
            sides = (x - x0, y - y0, x1 - x, y1 - y)
            area = (x1 - x0) * (y1 - y0)
            if valid[j] and near and min(sides) > 0 and least < max(sides) < most and area < best:
                best, matched[i], positive[i] = area, j, True
    return matched, positive


@pytest.mark.parametrize("seed", range(5))
def test_cells_answer_for_the_smallest_object_of_their_size(seed):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 40, (7, 2)), rng.uniform(3, 60, (7, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    valid = rng.random(7) < 0.8
    targets = Targets(jnp.asarray(boxes), jnp.zeros(7, jnp.int32), jnp.asarray(valid))
    matched, positive = jax.jit(lambda t: fcos.match_cells(jnp.asarray(ANCHORS), t, COUNTS, models.FCOSMatching()))(
        targets
    )
    wanted_matched, wanted = naive_match(ANCHORS, boxes, valid, models.FCOSMatching())
    assert wanted.any()
    np.testing.assert_array_equal(positive, wanted)
    np.testing.assert_array_equal(np.asarray(matched)[wanted], wanted_matched[wanted])


def test_no_cell_answers_for_objects_that_are_not_there():
    for boxes in (jnp.zeros((0, 4)), jnp.array([[0.0, 0.0, 64.0, 64.0]])):
        targets = Targets(boxes, jnp.zeros(len(boxes), jnp.int32), jnp.zeros(len(boxes), bool))
        assert not fcos.match_cells(jnp.asarray(ANCHORS), targets, COUNTS, models.FCOSMatching())[1].any()


def test_centerness_has_a_finite_gradient_at_the_sides_of_a_box():
    """For a cell on a side of the box or outside it, centerness is 0 and so is its gradient."""
    boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [4.0, 0.0, 8.0, 8.0], [10.0, 10.0, 12.0, 12.0], [0.0, 0.0, 0.0, 0.0]])
    anchors = jnp.tile(jnp.array([[0.0, 0.0, 8.0, 8.0]]), (4, 1))
    value, gradient = jax.value_and_grad(lambda b: fcos.centerness_of(b, anchors).sum())(boxes)
    assert value == 1
    assert jnp.isfinite(gradient).all() and (gradient[1:] == 0).all()


def naive_detections(levels, canvas_size, selection):
    """The best pairs of anchor and class per level, then greedy suppression within each class, in float64."""
    candidates = []
    for logits, _, deltas, anchors in levels:
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        pairs = sorted(np.ndindex(*scores.shape), key=lambda pair: -scores[pair])[: selection.top_n]
        for i, k in pairs:
            if scores[i, k] > selection.score_threshold:
                box = (anchors + deltas)[i].clip(0, [canvas_size[1], canvas_size[0]] * 2)
                candidates.append((scores[i, k], k, box))
    candidates.sort(key=lambda candidate: -candidate[0])
    kept = []
    for candidate in candidates:
        if all(candidate[1] != other[1] or iou(candidate[2], other[2]) <= selection.nms_threshold for other in kept):
            kept.append(candidate)
    return kept[: selection.max_detections]


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


@pytest.mark.parametrize("anchors_per_cell", [1, 2])
@pytest.mark.parametrize("top_n, max_detections", [(10, 100), (1000, 5), (7, 8)])
def test_best_predictions_of_all_levels(top_n, max_detections, anchors_per_cell):
    rng = np.random.default_rng(0)
    levels = [
        (
            rng.normal(-1, 2, (count, 3)).astype(np.float32),
            np.zeros((count, 0), np.float32),
            rng.normal(0, 3, (count, 4)).astype(np.float32),
            anchors,
        )
        for count, anchors in zip(COUNTS, np.split(ANCHORS, np.cumsum(COUNTS)[:-1]), strict=True)
    ]
    size, selection = (48, 60), models.DenseSelection(top_n=top_n, max_detections=max_detections)

    def as_maps(rows):
        """Class logits of `(cells anchors)` rows, in the layout that heads return."""
        return rows.reshape(-1, anchors_per_cell, rows.shape[1]).transpose(1, 2, 0)

    @jax.jit
    def run(levels):
        levels = [(as_maps(logits), *others) for logits, *others in levels]
        decode = lambda deltas, anchors: anchors + deltas  # noqa: E731
        return dense.dense_detections(
            lambda logits, _: jax.nn.sigmoid(logits), decode, levels, jnp.array(size, jnp.int32), selection
        )

    found, wanted = run(jax.tree.map(jnp.asarray, levels)), naive_detections(levels, size, selection)
    n = len(wanted)
    assert int(found.valid.sum()) == n > 4
    np.testing.assert_allclose(found.scores[:n], [score for score, _, _ in wanted], rtol=1e-5)
    np.testing.assert_array_equal(found.labels[:n], [label for _, label, _ in wanted])
    np.testing.assert_allclose(found.boxes[:n], [box for _, _, box in wanted], rtol=1e-5, atol=1e-5)


def test_class_loss_is_that_of_rows():
    """The loss on maps has the same sum and gradient as the definition, which has one row per anchor."""
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 12), (2, 3, 4)]  # (anchors per cell, classes, cells)
    levels = [jnp.asarray(rng.normal(0, 2, shape), jnp.float32) for shape in shapes]
    count = sum(anchors * cells for anchors, _, cells in shapes)
    labels, counted = rng.integers(-1, 3, count).astype(np.int32), rng.random(count) < 0.7

    def by_rows(levels):
        rows = jnp.concatenate([x.transpose(2, 0, 1).reshape(-1, 3) for x in levels])  # (p a) k
        losses = ops.sigmoid_focal_loss(rows, jax.nn.one_hot(labels, 3))
        return jnp.where(counted, losses.sum(axis=1), 0.0).sum()

    for counting in (counted, np.zeros(count, bool)):
        counted = counting
        loss = lambda x: dense.class_loss(x, jnp.asarray(labels), jnp.asarray(counted))  # noqa: B023, E731
        (value, gradient), (wanted, wanted_gradient) = (jax.value_and_grad(f)(levels) for f in (loss, by_rows))
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        for one, other in zip(gradient, wanted_gradient, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
