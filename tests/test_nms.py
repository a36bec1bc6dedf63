"""Non-maximum suppression: each implementation, and the public functions that choose between them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx.ops import _nms as forms, class_aware_nms, nms, nms_indices, pairwise_iou


CHAIN = jnp.array([[0, 0, 10, 10], [4.2, 0, 14.2, 10], [8.4, 0, 18.4, 10]], jnp.float32)  # IoU .408, .408, .087
CHAIN_SCORES = jnp.array([0.9, 0.8, 0.7])
THRESHOLDS = [0.0, 0.3, 0.5, 0.7, 1.0]


def random_boxes(seed, n, spread=60):
    """Clustered boxes on both sides of the origin, some of them duplicates and some without area."""
    rng = np.random.default_rng(seed)
    x0y0 = rng.uniform(-spread, spread, (n, 2))
    boxes = np.concatenate([x0y0, x0y0 + rng.uniform(5, 50, (n, 2))], axis=1)
    boxes = np.where(rng.uniform(size=(n, 1)) < 0.2, np.roll(boxes, 1, axis=0), boxes)
    boxes[::13, 2] = boxes[::13, 0]
    return jnp.asarray(boxes, jnp.float32)


def random_case(seed, n):
    """Boxes; scores of both signs with many ties, including zeros of both signs; labels; validity."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([-1.0, 1.0], n) * rng.integers(0, n // 4 + 1, n) / n
    labels, valid = rng.integers(0, 3, n), rng.uniform(size=n) < 0.8
    return random_boxes(seed, n), jnp.asarray(scores, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.asarray(valid)


def naive_nms(boxes, scores, labels, valid, threshold):
    """Indices of the boxes to keep, best first, in float64."""
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
@pytest.mark.parametrize("n", [1, 2, 100])
def test_equals_naive_reference(threshold, n):
    boxes, scores, labels, valid = random_case(n, n)
    plain = naive_nms(boxes, scores, np.zeros(n), np.ones(n), threshold)
    by_label = naive_nms(boxes, scores, labels, valid, threshold)
    np.testing.assert_array_equal(nms(boxes, scores, iou_threshold=threshold), mask(plain, n))
    np.testing.assert_array_equal(
        class_aware_nms(boxes, scores, labels, valid, iou_threshold=threshold), mask(by_label, n)
    )
    for max_outputs in (n // 4 + 1, n + 3):  # greedy selection, and selection in order
        options = {"iou_threshold": threshold, "max_outputs": max_outputs}
        indices, kept = nms_indices(boxes, scores, valid, labels=labels, **options)
        count = min(len(by_label), max_outputs)
        np.testing.assert_array_equal(kept, np.arange(max_outputs) < count)
        np.testing.assert_array_equal(indices[:count], by_label[:count])
        np.testing.assert_array_equal(indices[count:], 0)


@pytest.mark.parametrize("labelled", [False, True])
def test_forms_agree(labelled):
    # Which one runs depends on the platform, so each is called by name.
    n, max_outputs = 300, 60
    boxes, scores, labels, valid = random_case(0, n)
    args = forms._prepared(boxes, scores, labels if labelled else None, valid)

    @jax.jit
    def run(args: tuple[Any, Any, Any], threshold):
        keeps = (forms._keep_scan, forms._keep_fixed_point)
        masks = [forms._keep_mask(*args, threshold, keep=keep) for keep in keeps]
        in_order = [forms._select_sorted(*args, threshold, max_outputs=max_outputs, keep=keep) for keep in keeps]
        return masks, [forms._select_greedy(*args, threshold, max_outputs=max_outputs), *in_order]

    for threshold in THRESHOLDS:
        (scan, fixed_point), (greedy, *in_order) = run(args, forms._comparable(threshold, boxes))
        np.testing.assert_array_equal(scan, fixed_point)
        assert 0 < scan.sum() <= valid.sum()
        for indices, count in in_order:
            np.testing.assert_array_equal(indices, greedy[0])
            assert count == greedy[1]


@pytest.mark.parametrize("size_of_rows", [1, 1000])
@pytest.mark.parametrize("keep", [forms._keep_scan, forms._keep_fixed_point])
def test_forms_on_a_long_chain(keep, size_of_rows, monkeypatch):
    monkeypatch.setattr(forms, "SUPPRESSORS_IN_ROWS", size_of_rows)
    # Each box overlaps only the next and every second one is kept: the most rounds for the fixed point.
    x = 4.2 * jnp.arange(101, dtype=jnp.float32)
    rows = (x, jnp.zeros(101), x + 10, jnp.full(101, 10.0), None)
    np.testing.assert_array_equal(keep(rows, jnp.ones(101, bool), 0.3), np.arange(101) % 2 == 0)


IN_ORDER = partial(forms._select_sorted, keep=forms._keep_fixed_point)


@pytest.mark.parametrize("select", [forms._select_greedy, IN_ORDER], ids=["greedy", "in order"])
def test_few_and_many_valid_boxes_among_very_many(select, monkeypatch):
    """All branches of packing, unbatched and batched, against the plain greedy form."""
    monkeypatch.setattr(forms, "PACKED_BOXES", (200, 800))
    (less, room), max_outputs = forms.PACKED_BOXES, 20
    n = room + 500
    boxes, scores, labels, _ = random_case(5, n)
    counts = jnp.array([0, less, less + 1, room, room + 1])
    places = jax.vmap(lambda key: jax.random.permutation(key, n))(jax.random.split(jax.random.key(0), len(counts)))
    valid = places < counts[:, None]

    @jax.jit
    def packed(valid):
        rows, scores_, valid = forms._prepared(boxes, scores, labels, valid)
        indices, count = forms._select_packed(
            rows, scores_, valid, jnp.float32(0.5), max_outputs=max_outputs, select=select
        )
        return indices, jnp.arange(max_outputs) < count

    expected = []
    for row in valid:
        indices, count = forms._select_greedy(
            *forms._prepared(boxes, scores, labels, row), jnp.float32(0.5), max_outputs=max_outputs
        )
        expected.append((indices, jnp.arange(max_outputs) < count))
    for i, row in enumerate(valid):
        for found, wanted in zip(packed(row), expected[i], strict=True):
            np.testing.assert_array_equal(found, wanted)
    for subset in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        indices, kept = jax.vmap(packed)(valid[jnp.array(subset)])
        np.testing.assert_array_equal(indices, jnp.stack([expected[i][0] for i in subset]))
        np.testing.assert_array_equal(kept, jnp.stack([expected[i][1] for i in subset]))


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
    # In float32 the IoU 3/10 rounds up, above the float64 threshold 0.3: torchvision suppresses, and so does this.
    boxes = jnp.array([[0, 0, 10, 1], [0, 0, 3, 1]], jnp.float32)
    iou = pairwise_iou(boxes[:1], boxes[1:]).item()
    assert iou > 0.3
    assert nms(boxes, jnp.array([0.9, 0.8]), iou_threshold=0.3).tolist() == [True, False]
    assert nms(boxes, jnp.array([0.9, 0.8]), iou_threshold=iou).tolist() == [True, True]


def test_equal_scores_keep_the_earlier():
    boxes = jnp.array([[1, 0, 11, 10], [0, 0, 10, 10], [0, 0, 10, 10]], jnp.float32)
    for scores in ([0.5, 0.5, 0.5], [0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]):
        assert nms(boxes, jnp.array(scores), iou_threshold=0.5).tolist() == [True, False, False]
        for max_outputs in (1, 3):  # greedy selection, and selection in order
            indices, _ = nms_indices(boxes, jnp.array(scores), iou_threshold=1.0, max_outputs=max_outputs)
            assert indices.tolist() == [0, 1, 2][:max_outputs]


def test_boxes_without_area_are_kept_and_suppress_nothing():
    boxes = jnp.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 9, 0], [0, 0, 9, 0], [0, 0, 9, 9], [5, 5, 1, 1]], jnp.float32)
    assert nms(boxes, jnp.linspace(1, 0, 6), iou_threshold=0.0).all()


def test_huge_boxes():
    boxes = jnp.array([[0, 0, 1e18, 1e18], [0, 0, 1e18, 0.9e18], [0, 0, 1e30, 1e30]], jnp.float32)
    assert nms(boxes, jnp.array([0.9, 0.8, 0.7]), iou_threshold=0.5).tolist() == [True, False, True]


def test_labels_are_compared_not_offset():
    # Coordinate offsets per class would get both pairs wrong: the far one loses precision, the negative one collides.
    far = CHAIN + 1e6
    labels = jnp.array([0, 4000, 4000])
    assert class_aware_nms(far, CHAIN_SCORES, labels, iou_threshold=0.3).tolist() == [True, True, False]
    assert class_aware_nms(CHAIN - 100, CHAIN_SCORES, -labels, iou_threshold=0.3).tolist() == [True, True, False]


def test_invalid_and_nan_rows_take_no_part():
    boxes, scores, labels, _ = random_case(0, 30)
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


def test_nan_boxes_suppress_nothing():
    boxes, scores, _, valid = random_case(0, 30)
    with_nan = nms(boxes.at[0].set(jnp.nan), scores, valid, iou_threshold=0.4)
    np.testing.assert_array_equal(with_nan[1:], nms(boxes, scores, valid.at[0].set(False), iou_threshold=0.4)[1:])


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
def test_jit_and_vmap(max_outputs):
    cases = [random_case(seed, 40) for seed in range(4)]
    cases[1] = (*cases[1][:3], jnp.zeros(40, bool))
    batch = jax.tree.map(lambda *x: jnp.stack(x), *cases)

    def run(boxes, scores, labels, valid):
        keep = class_aware_nms(boxes, scores, labels, valid, iou_threshold=0.4)
        return keep, *nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs, labels=labels)

    jitted, batched = jax.jit(run), jax.jit(jax.vmap(run))(*batch)
    for i, case in enumerate(cases):
        for eager, once, row in zip(run(*case), jitted(*case), (x[i] for x in batched), strict=True):
            np.testing.assert_array_equal(eager, once)
            np.testing.assert_array_equal(eager, row)
    assert not batched[0][1].any() and not batched[2][1].any()


@pytest.mark.parametrize("keep", [forms._keep_scan, forms._keep_fixed_point])
def test_forms_vmap(keep):
    boxes = random_boxes(0, 3 * 30).reshape(3, 30, 4)
    run = jax.jit(lambda b, v: keep((*b.T, None), v, 0.4))
    valid = jnp.ones((3, 30), bool).at[0].set(False)
    for i, row in enumerate(jax.jit(jax.vmap(run))(boxes, valid)):
        np.testing.assert_array_equal(row, run(boxes[i], valid[i]))


def test_no_boxes():
    boxes, scores = jnp.zeros((0, 4)), jnp.zeros(0)
    assert nms(boxes, scores, iou_threshold=0.5).shape == (0,)
    assert class_aware_nms(boxes, scores, jnp.zeros(0, int), iou_threshold=0.5).shape == (0,)
    indices, valid = nms_indices(boxes, scores, iou_threshold=0.5, max_outputs=3)
    assert indices.tolist() == [0, 0, 0] and not valid.any()


def test_half_precision_is_computed_in_float32():
    boxes, scores, _, valid = random_case(0, 40)
    boxes, scores = boxes.astype(jnp.bfloat16), scores.astype(jnp.bfloat16)
    expected = nms(boxes.astype(jnp.float32), scores.astype(jnp.float32), valid, iou_threshold=0.4)
    np.testing.assert_array_equal(nms(boxes, scores, valid, iou_threshold=0.4), expected)
    for max_outputs in (5, 40):
        indices, kept = nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs)
        assert indices.dtype == jnp.int32
        assert expected[indices[kept]].all()


@pytest.mark.parametrize("max_outputs", [5, 40])
def test_gradients_pass_by(max_outputs):
    boxes, scores, _, valid = random_case(0, 40)

    def total(boxes, scores):
        keep = nms(boxes, scores, valid, iou_threshold=0.4)
        indices, kept = nms_indices(boxes, scores, valid, iou_threshold=0.4, max_outputs=max_outputs)
        return jnp.where(keep, scores, 0).sum() + jnp.where(kept[:, None], boxes[indices], 0).sum()

    d_boxes, d_scores = jax.jit(jax.grad(total, argnums=(0, 1)))(boxes, scores)
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


@pytest.mark.parametrize("size", [1, 5, 40, 400])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 300])
def test_first_true_is_nonzero(n, share, size):
    masks = np.random.default_rng(n).uniform(size=(2, n)) < share
    positions, counts = jax.vmap(lambda mask: forms._first_true(mask, size))(jnp.asarray(masks))
    for mask_, indices, count in zip(masks, np.asarray(positions), np.asarray(counts), strict=True):
        np.testing.assert_array_equal(indices[:count], np.flatnonzero(mask_)[:size])
        assert count == min(mask_.sum(), size)
        assert ((indices >= 0) & (indices < n)).all()
