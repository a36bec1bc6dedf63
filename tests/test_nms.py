"""Non-maximum suppression: each of its forms, and the public functions that choose between them."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import _nms as forms, class_aware_nms, nms, nms_indices, pairwise_iou


CHAIN = jnp.array([[0, 0, 10, 10], [4.2, 0, 14.2, 10], [8.4, 0, 18.4, 10]], jnp.float32)  # IoU .408, .408, .087
CHAIN_SCORES = jnp.array([0.9, 0.8, 0.7])
THRESHOLDS = [0.0, 0.3, 0.5, 0.7, 1.0]


def random_boxes(key, n, spread=60):
    """Clustered boxes on both sides of the origin, some of them duplicates and some without area."""
    corner, size, copy = jr.split(key, 3)
    x0y0 = jr.uniform(corner, (n, 2), minval=-spread, maxval=spread)
    boxes = jnp.concatenate([x0y0, x0y0 + jr.uniform(size, (n, 2), minval=5, maxval=50)], axis=1)
    boxes = jnp.where(jr.bernoulli(copy, 0.2, (n, 1)), jnp.roll(boxes, 1, axis=0), boxes)
    return boxes.at[::13, 2].set(boxes[::13, 0])


def random_case(key, n):
    """Boxes, scores with many ties, labels and validity."""
    keys = jr.split(key, 4)
    scores = jr.randint(keys[1], (n,), 0, n // 2).astype(jnp.float32) / n
    return random_boxes(keys[0], n), scores, jr.randint(keys[2], (n,), 0, 3), jr.bernoulli(keys[3], 0.8, (n,))


def naive_nms(boxes, scores, labels, valid, threshold):
    """Indices kept, best first, in float64."""
    boxes, kept = np.asarray(boxes, np.float64), []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        overlaps = False
        for j in kept:
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            if width > 0 and height > 0 and labels[i] == labels[j]:
                area_i, area_j = (np.prod(b[2:] - b[:2]) for b in (boxes[i], boxes[j]))
                overlaps |= width * height / (area_i + area_j - width * height) > threshold
        if valid[i] and not overlaps:
            kept.append(int(i))
    return kept


def mask(indices, n):
    return np.isin(np.arange(n), indices)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("n", [1, 2, 40, 150])
def test_equals_naive_reference(threshold, n, getkey):
    boxes, scores, labels, valid = random_case(getkey(), n)
    zeros, ones = np.zeros(n, int), np.ones(n, bool)
    plain = naive_nms(boxes, scores, zeros, ones, threshold)
    by_label = naive_nms(boxes, scores, labels, valid, threshold)
    np.testing.assert_array_equal(nms(boxes, scores, iou_threshold=threshold), mask(plain, n))
    np.testing.assert_array_equal(
        class_aware_nms(boxes, scores, labels, valid, iou_threshold=threshold), mask(by_label, n)
    )
    for max_outputs in (1, n // 4 + 1, n, n + 3):
        indices, kept = nms_indices(
            boxes, scores, valid, iou_threshold=threshold, max_outputs=max_outputs, labels=labels
        )
        count = min(len(by_label), max_outputs)
        np.testing.assert_array_equal(kept, np.arange(max_outputs) < count)
        np.testing.assert_array_equal(indices[:count], by_label[:count])
        np.testing.assert_array_equal(indices[count:], 0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("labelled", [False, True])
def test_forms_agree(threshold, labelled, getkey):
    # The platform chooses one of them, so each is called by name.
    n, max_outputs = 300, 60
    boxes, scores, labels, valid = random_case(getkey(), n)
    args = forms._prepared(boxes, scores, labels if labelled else None, valid)
    threshold = forms._rounded_down(threshold)
    scan, fixed_point = (
        jax.jit(partial(forms._keep_mask, threshold=threshold, keep=keep))(*args)
        for keep in (forms._keep_scan, forms._keep_fixed_point)
    )
    np.testing.assert_array_equal(scan, fixed_point)
    options = {"threshold": threshold, "max_outputs": max_outputs}
    greedy = jax.jit(partial(forms._select_greedy, **options))(*args)
    for keep in (forms._keep_scan, forms._keep_fixed_point):
        in_order = jax.jit(partial(forms._select_sorted, **options, keep=keep))(*args)
        np.testing.assert_array_equal(greedy[0], in_order[0])
        assert greedy[1] == in_order[1]


@pytest.mark.parametrize("keep", [forms._keep_scan, forms._keep_fixed_point])
def test_forms_on_a_long_chain(keep):
    # Each box overlaps only the next: every second one is kept, which takes the fixed point the most rounds.
    x = 4.2 * jnp.arange(101, dtype=jnp.float32)
    rows = (x, jnp.zeros(101), x + 10, jnp.full(101, 10.0), None)
    np.testing.assert_array_equal(keep(rows, jnp.ones(101, bool), 0.3), np.arange(101) % 2 == 0)


@pytest.mark.parametrize("threshold", [0.30, 0.35])
def test_chain_by_hand(threshold):
    np.testing.assert_allclose(pairwise_iou(CHAIN[:1], CHAIN[1:])[0], [0.408, 0.087], atol=1e-3)
    assert nms(CHAIN, CHAIN_SCORES, iou_threshold=threshold).tolist() == [True, False, True]
    assert nms(CHAIN - 1000, CHAIN_SCORES, iou_threshold=threshold).tolist() == [True, False, True]
    assert nms(CHAIN, CHAIN_SCORES[::-1], iou_threshold=0.05).tolist() == [False, False, True]
    assert nms(CHAIN, CHAIN_SCORES, iou_threshold=0.41).all()


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.5, True), (float(np.nextafter(np.float32(0.5), np.float32(0))), False), (0.5 - 1e-12, False)],
)
def test_suppression_is_strict(threshold, kept):
    boxes = jnp.array([[0, 0, 4, 4], [0, 0, 4, 2]], jnp.float32)  # IoU exactly 1/2
    assert nms(boxes, jnp.array([0.9, 0.8]), iou_threshold=threshold).tolist() == [True, kept]


def test_thresholds_at_both_ends():
    boxes = jnp.array([[0, 0, 4, 4], [0, 0, 4, 4], [4, 0, 8, 4], [7.99, 0, 12, 4]], jnp.float32)
    scores = jnp.array([0.9, 0.8, 0.7, 0.6])
    assert nms(boxes, scores, iou_threshold=1).all()
    assert nms(boxes, scores, iou_threshold=0).tolist() == [True, False, True, False]
    assert nms(boxes[:2], scores[:2], iou_threshold=float(np.nextafter(1, 0))).tolist() == [True, False]


def test_threshold_is_compared_exactly():
    # The IoU 3/10 is rounded up to float32, which is more than the double .3: torchvision suppresses, and so does this.
    boxes = jnp.array([[0, 0, 10, 1], [0, 0, 3, 1]], jnp.float32)
    iou = pairwise_iou(boxes[:1], boxes[1:]).item()
    assert iou > 0.3
    assert nms(boxes, jnp.array([0.9, 0.8]), iou_threshold=0.3).tolist() == [True, False]
    assert nms(boxes, jnp.array([0.9, 0.8]), iou_threshold=iou).tolist() == [True, True]


def test_equal_scores_keep_the_earlier():
    boxes = jnp.array([[1, 0, 11, 10], [0, 0, 10, 10], [0, 0, 10, 10]], jnp.float32)
    for scores in ([0.5, 0.5, 0.5], [0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]):
        assert nms(boxes, jnp.array(scores), iou_threshold=0.5).tolist() == [True, False, False]
        indices, _ = nms_indices(boxes, jnp.array(scores), iou_threshold=1.0, max_outputs=3)
        assert indices.tolist() == [0, 1, 2]


def test_boxes_without_area_are_kept_and_suppress_nothing():
    boxes = jnp.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 9, 0], [0, 0, 9, 0], [0, 0, 9, 9], [5, 5, 1, 1]], jnp.float32)
    assert nms(boxes, jnp.linspace(1, 0, 6), iou_threshold=0.0).all()


def test_huge_boxes():
    boxes = jnp.array([[0, 0, 1e18, 1e18], [0, 0, 1e18, 0.9e18], [0, 0, 1e30, 1e30]], jnp.float32)
    assert nms(boxes, jnp.array([0.9, 0.8, 0.7]), iou_threshold=0.5).tolist() == [True, False, True]


def test_labels_are_compared_not_offset():
    # With offsets of the coordinates both pairs go wrong: the far one loses its precision, the negative one collides.
    far = CHAIN + 1e6
    labels = jnp.array([0, 4000, 4000])
    assert class_aware_nms(far, CHAIN_SCORES, labels, iou_threshold=0.3).tolist() == [True, True, False]
    assert class_aware_nms(CHAIN - 100, CHAIN_SCORES, -labels, iou_threshold=0.3).tolist() == [True, True, False]


def test_invalid_and_nan_rows_take_no_part(getkey):
    boxes, scores, labels, _ = random_case(getkey(), 30)
    for junk_score, junk_valid in ((5.0, False), (jnp.nan, True), (jnp.inf, False), (jnp.nan, False)):
        padded_boxes = jnp.concatenate([boxes, boxes[:5]])
        padded_scores = jnp.concatenate([scores, jnp.full(5, junk_score)])
        valid = jnp.concatenate([jnp.ones(30, bool), jnp.full(5, junk_valid)])
        keep = nms(padded_boxes, padded_scores, valid, iou_threshold=0.4)
        np.testing.assert_array_equal(keep[:30], nms(boxes, scores, iou_threshold=0.4))
        assert not keep[30:].any()
        for max_outputs in (5, 30):
            options = {"iou_threshold": 0.4, "max_outputs": max_outputs}
            padded = nms_indices(padded_boxes, padded_scores, valid, labels=jnp.pad(labels, (0, 5)), **options)
            for got, expected in zip(padded, nms_indices(boxes, scores, labels=labels, **options), strict=True):
                np.testing.assert_array_equal(got, expected)
    keep = nms(boxes.at[0].set(jnp.nan), scores, iou_threshold=0.4)
    np.testing.assert_array_equal(keep[1:], nms(boxes[1:], scores[1:], iou_threshold=0.4))


def test_infinite_scores_are_scores():
    scores = jnp.array([-jnp.inf, jnp.inf, -jnp.inf])
    assert nms(CHAIN, scores, iou_threshold=0.3).tolist() == [False, True, False]
    assert nms(CHAIN, scores, iou_threshold=0.5).all()
    for boxes, max_outputs in ((CHAIN, 3), (jnp.tile(CHAIN, (4, 1)), 3)):
        valid = jnp.arange(len(boxes)) < 3
        scores = jnp.full(len(boxes), -jnp.inf)
        indices, kept = nms_indices(boxes, scores, valid, iou_threshold=0.5, max_outputs=max_outputs)
        assert indices.tolist() == [0, 1, 2] and kept.all()


@pytest.mark.parametrize("max_outputs", [4, 40])
def test_jit_and_vmap(max_outputs, getkey):
    cases = [random_case(getkey(), 40) for _ in range(4)]
    cases[1] = (*cases[1][:3], jnp.zeros(40, bool))
    batch = jax.tree.map(lambda *x: jnp.stack(x), *cases)

    def run(boxes, scores, labels, valid):
        keep = class_aware_nms(boxes, scores, labels, valid, iou_threshold=0.4)
        return keep, *nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs, labels=labels)

    batched = jax.jit(jax.vmap(run))(*batch)
    for i, case in enumerate(cases):
        for eager, jitted, row in zip(run(*case), jax.jit(run)(*case), (x[i] for x in batched), strict=True):
            np.testing.assert_array_equal(eager, jitted)
            np.testing.assert_array_equal(eager, row)
    assert not batched[0][1].any() and not batched[2][1].any()


@pytest.mark.parametrize("keep", [forms._keep_scan, forms._keep_fixed_point])
def test_forms_vmap(keep, getkey):
    boxes = jnp.stack([random_boxes(getkey(), 30) for _ in range(3)])
    run = lambda b, v: keep((*b.T, None), v, 0.4)  # noqa: E731
    valid = jnp.ones((3, 30), bool).at[0].set(False)
    for i, row in enumerate(jax.vmap(run)(boxes, valid)):
        np.testing.assert_array_equal(row, run(boxes[i], valid[i]))


def test_no_boxes():
    boxes, scores = jnp.zeros((0, 4)), jnp.zeros(0)
    assert nms(boxes, scores, iou_threshold=0.5).shape == (0,)
    assert class_aware_nms(boxes, scores, jnp.zeros(0, int), iou_threshold=0.5).shape == (0,)
    indices, valid = nms_indices(boxes, scores, iou_threshold=0.5, max_outputs=3)
    assert indices.tolist() == [0, 0, 0] and not valid.any()


def test_half_precision_is_computed_in_float32(getkey):
    boxes, scores, _, valid = random_case(getkey(), 60)
    boxes, scores = boxes.astype(jnp.bfloat16), scores.astype(jnp.bfloat16)
    expected = nms(boxes.astype(jnp.float32), scores.astype(jnp.float32), valid, iou_threshold=0.4)
    np.testing.assert_array_equal(nms(boxes, scores, valid, iou_threshold=0.4), expected)
    for max_outputs in (10, 60):
        indices, _ = nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs)
        assert indices.dtype == jnp.int32


@pytest.mark.parametrize("max_outputs", [5, 40])
def test_gradients_pass_by(max_outputs, getkey):
    boxes, scores, _, valid = random_case(getkey(), 40)

    def total(boxes, scores):
        keep = nms(boxes, scores, valid, iou_threshold=0.4)
        indices, kept = nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs)
        return jnp.where(keep, scores, 0).sum() + jnp.where(kept[:, None], boxes[indices], 0).sum()

    d_boxes, d_scores = jax.grad(total, argnums=(0, 1))(boxes, scores)
    np.testing.assert_array_equal(d_scores, nms(boxes, scores, valid, iou_threshold=0.4).astype(jnp.float32))
    assert set(np.unique(d_boxes)) <= {0, 1} and d_boxes.any()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_exports(platform):
    def run(boxes, scores):
        few = nms_indices(boxes, scores, iou_threshold=0.5, max_outputs=2)
        return nms(boxes, scores, iou_threshold=0.5), few, nms_indices(boxes, scores, iou_threshold=0.5, max_outputs=64)

    shapes = jax.ShapeDtypeStruct((64, 4), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
    exported = jax.export.export(jax.jit(run), platforms=[platform])(*shapes)
    assert "custom_call" not in exported.mlir_module()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_errors(threshold):
    message = f"iou_threshold must lie between 0 and 1, got {threshold}"
    with pytest.raises(ValueError, match=message):
        nms(CHAIN, CHAIN_SCORES, iou_threshold=threshold)
    with pytest.raises(ValueError, match=message):
        class_aware_nms(CHAIN, CHAIN_SCORES, jnp.zeros(3, int), iou_threshold=threshold)
    with pytest.raises(ValueError, match=message):
        nms_indices(CHAIN, CHAIN_SCORES, iou_threshold=threshold, max_outputs=3)
    with pytest.raises(ValueError, match="max_outputs must be at least 1, got 0"):
        nms_indices(CHAIN, CHAIN_SCORES, iou_threshold=0.5, max_outputs=0)
    with pytest.raises(Exception, match="scores"):
        nms(CHAIN, CHAIN_SCORES[:2], iou_threshold=0.5)
