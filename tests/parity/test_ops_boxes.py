"""Boxes, coders, anchors, NMS, matching and losses against torchvision's own operators, on random and awkward cases.

Cases are padded to one shape and computed by one vmapped call per option; torchvision computes them in a loop.
"""
# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import ops


torchvision = pytest.importorskip("torchvision", reason="needs the environment of `make parity`")
torch = pytest.importorskip("torch", reason="needs the environment of `make parity`")

from torchvision.models.detection import _utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.boxes import _batched_nms_vanilla


CASES = 1000
KINDS = ["ordinary", "crowded", "tiny", "degenerate", "inverted", "huge", "negative", "integer", "duplicate", "far"]
CAPACITY = 24


def make_boxes(rng, n, kind):
    """`n` boxes of one kind."""
    low, high, side = {
        "crowded": (0, 30, 40),
        "tiny": (0, 1, 1e-3),
        "huge": (-1e6, 1e6, 1e7),
        "negative": (-500, -100, 300),
        "far": (1e6, 1e6 + 300, 100),
    }.get(kind, (0, 300, 200))
    x0y0 = rng.uniform(low, high, (n, 2))
    boxes = np.concatenate([x0y0, x0y0 + rng.uniform(0, side, (n, 2))], axis=1).astype(np.float32)
    if kind == "integer":
        boxes = np.round(boxes / 20)
    if kind == "degenerate":
        flat = rng.uniform(size=(n, 2)) < 0.4
        boxes[:, 2:] = np.where(flat, boxes[:, :2], boxes[:, 2:])
    if kind == "inverted":
        boxes = np.where(rng.uniform(size=(n, 1)) < 0.2, boxes[:, [2, 1, 0, 3]], boxes)
    if kind == "duplicate" and n:
        boxes = boxes[rng.integers(0, max(n // 2, 1), n)]
    return boxes


def box_cases(seed, cases=CASES):
    """Arrays of 0 to CAPACITY boxes, with each kind equally often."""
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.uniform(size=cases) < 0.05, 0, rng.integers(1, CAPACITY + 1, cases))
    return [make_boxes(rng, n, KINDS[i % len(KINDS)]) for i, n in enumerate(sizes)]


def pad(cases, capacity=CAPACITY):
    """Cases padded with zeros to `(cases, capacity, …)`, and which rows are valid."""
    padded = np.zeros((len(cases), capacity, *cases[0].shape[1:]), cases[0].dtype)
    valid = np.zeros(padded.shape[:2], bool)
    for i, case in enumerate(cases):
        padded[i, : len(case)], valid[i, : len(case)] = case, True
    return jnp.asarray(padded), jnp.asarray(valid)


def assert_close_where_finite(ours, theirs, scale=1.0):
    """Finite everywhere, and within 1e-5 of the scale wherever torchvision is finite."""
    ours, theirs, scale = np.broadcast_arrays(np.asarray(ours), np.asarray(theirs), scale)
    assert np.isfinite(ours).all()
    finite = np.isfinite(theirs)
    assert (np.abs(ours - theirs)[finite] <= 1e-5 * np.maximum(scale, np.maximum(1, np.abs(theirs)))[finite]).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.pairwise_iou, torchvision.ops.box_iou),
        (ops.pairwise_giou, torchvision.ops.generalized_box_iou),
        (ops.pairwise_diou, torchvision.ops.distance_box_iou),
        (ops.pairwise_ciou, torchvision.ops.complete_box_iou),
    ],
)
def test_pairwise(ours, theirs):
    a, b = box_cases(0), box_cases(1)
    for i in range(0, CASES, 7):  # some boxes are in both sets
        count = min(len(a[i]), len(b[i])) // 2
        a[i][:count] = b[i][:count]
    values = jax.jit(jax.vmap(ours))(pad(a)[0], pad(b)[0])
    for p, q, value in zip(a, b, np.asarray(values), strict=True):
        expected = theirs(torch.tensor(p), torch.tensor(q)).numpy()
        value = value[: len(p), : len(q)]
        assert_close_where_finite(value, expected)
        if ours is ops.pairwise_iou:
            np.testing.assert_array_equal(value, np.where(np.isnan(expected), 0, expected))


def test_area_clip_and_conversions():
    boxes = box_cases(2)
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 400, (CASES, 2)).astype(np.int32)
    padded = pad(boxes)[0]
    clipped = np.asarray(jax.vmap(ops.clip_boxes)(padded, jnp.asarray(sizes)))
    area = np.asarray(jax.vmap(ops.box_area)(padded))
    conversions = {
        ("xyxy", "cxcywh"): ops.xyxy_to_cxcywh,
        ("cxcywh", "xyxy"): ops.cxcywh_to_xyxy,
        ("xyxy", "xywh"): ops.xyxy_to_xywh,
        ("xywh", "xyxy"): ops.xywh_to_xyxy,
    }
    converted = {formats: np.asarray(jax.vmap(op)(padded)) for formats, op in conversions.items()}
    for i, case in enumerate(boxes):
        n, case = len(case), torch.tensor(case)
        expected = torchvision.ops.clip_boxes_to_image(case, tuple(sizes[i].tolist()))
        np.testing.assert_array_equal(clipped[i, :n], expected)
        np.testing.assert_array_equal(area[i, :n], torchvision.ops.box_area(case))
        for (source, target), values in converted.items():
            expected = torchvision.ops.box_convert(case, source, target).numpy()
            np.testing.assert_allclose(values[i, :n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coders(weights):
    coder = _utils.BoxCoder(weights)
    boxes, anchors = box_cases(4), box_cases(5)
    pairs = [(b[: len(a)], a[: len(b)]) for b, a in zip(boxes, anchors, strict=True)]
    boxes, anchors = [b for b, _ in pairs], [a for _, a in pairs]
    rng = np.random.default_rng(6)
    deltas = [rng.normal(size=a.shape).astype(np.float32) * rng.choice([0.1, 3, 30]) for a in anchors]
    encode = jax.jit(jax.vmap(lambda b, a: ops.encode_boxes(b, a, weights=weights)))
    decode = jax.jit(jax.vmap(lambda d, a: ops.decode_boxes(d, a, weights=weights)))
    encoded = np.asarray(encode(pad(boxes)[0], pad(anchors)[0]))
    decoded = np.asarray(decode(pad(deltas)[0], pad(anchors)[0]))
    for i, (box, anchor, delta) in enumerate(zip(boxes, anchors, deltas, strict=True)):
        n, anchor = len(anchor), torch.tensor(anchor)
        assert_close_where_finite(encoded[i, :n], coder.encode_single(torch.tensor(box), anchor))
        # Corners are differences of large numbers: an error that is small relative to the box is rounding.
        expected = coder.decode_single(torch.tensor(delta), anchor).numpy()
        scale = np.abs(np.concatenate([expected, anchor.numpy()], axis=1)).max(axis=1, initial=1, keepdims=True)
        assert_close_where_finite(decoded[i, :n], expected, scale)


def test_anchors():
    rng = np.random.default_rng(7)
    for _ in range(CASES):
        feature_size = [(1, 1), (3, 5), (7, 4), (0, 3), (25, 42)][rng.integers(5)]
        sizes = tuple(rng.uniform(1, 600, rng.integers(1, 4)).tolist()) if rng.random() < 0.5 else (32, 65, 129)
        ratios = tuple(rng.uniform(0.1, 8, rng.integers(1, 4)).tolist()) if rng.random() < 0.5 else (0.5, 1.0, 2.0)
        stride = tuple(rng.integers(1, 130, 2).tolist())
        generator = AnchorGenerator((sizes,), (ratios,))
        expected = generator.grid_anchors([feature_size], [stride])[0].numpy()
        ours = ops.anchor_grid(feature_size, stride=stride, sizes=sizes, aspect_ratios=ratios)
        np.testing.assert_array_equal(ours, expected)


def nms_cases(seed):
    boxes = box_cases(seed, CASES // 10)
    rng = np.random.default_rng(seed)
    scores = [np.round(rng.uniform(size=len(b)), 1 if i % 2 else 7).astype(np.float32) for i, b in enumerate(boxes)]
    labels = [rng.integers(0, 3, len(b)).astype(np.int32) for b in boxes]
    return boxes, scores, labels


# IoUs of the integer boxes equal many of these, and rounding to float32 decides.
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1 / 7, 0.2, 0.3, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.9, 1.0])
def test_nms(threshold):
    boxes, scores, labels = nms_cases(int(1000 * threshold))
    (padded_boxes, valid), padded_scores, padded_labels = pad(boxes), pad(scores)[0], pad(labels)[0]
    keep = jax.vmap(lambda b, s, v: ops.nms(b, s, v, iou_threshold=threshold))
    keep_labelled = jax.vmap(lambda b, s, l, v: ops.class_aware_nms(b, s, l, v, iou_threshold=threshold))
    select = {
        count: jax.vmap(lambda b, s, v, c=count: ops.nms_indices(b, s, v, iou_threshold=threshold, max_outputs=c))
        for count in (3, CAPACITY)
    }
    kept = np.asarray(keep(padded_boxes, padded_scores, valid))
    kept_labelled = np.asarray(keep_labelled(padded_boxes, padded_scores, padded_labels, valid))
    selected = {count: run(padded_boxes, padded_scores, valid) for count, run in select.items()}
    for i, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        box, score, label = torch.tensor(box), torch.tensor(score), torch.tensor(label)
        expected = torchvision.ops.nms(box, score, threshold).numpy()
        np.testing.assert_array_equal(np.flatnonzero(kept[i]), np.sort(expected))
        for count, (indices, is_output) in selected.items():
            np.testing.assert_array_equal(indices[i][is_output[i]], expected[:count])
        expected = _batched_nms_vanilla(box, score, label, threshold) if len(box) else torch.zeros(0)
        np.testing.assert_array_equal(np.flatnonzero(kept_labelled[i]), np.sort(expected.numpy()))
        if KINDS[i % len(KINDS)] == "integer":  # coordinate offsets are exact for these
            expected = torchvision.ops.batched_nms(box, score, label, threshold).numpy()
            np.testing.assert_array_equal(np.flatnonzero(kept_labelled[i]), np.sort(expected))


def test_nms_at_thresholds_that_are_ious():
    # Thresholds equal to the IoU of a pair, and one float32 step to either side of it.
    rng = np.random.default_rng(8)
    boxes, scores = make_boxes(rng, 60, "crowded"), rng.uniform(size=60).astype(np.float32)
    ious = torchvision.ops.box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()
    for iou in rng.choice(ious[(ious > 0) & (ious < 1)], 6, replace=False):
        for threshold in (iou, np.nextafter(iou, np.float32(0)), np.nextafter(iou, np.float32(1))):
            expected = torchvision.ops.nms(torch.tensor(boxes), torch.tensor(scores), float(threshold)).numpy()
            keep = ops.nms(jnp.asarray(boxes), jnp.asarray(scores), iou_threshold=float(threshold))
            np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(expected))


@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize("thresholds", [(0.3, 0.7), (0.5, 0.5), (0.4, 0.5)])
def test_matcher(allow_low_quality, thresholds):
    low, high = thresholds
    matcher = _utils.Matcher(high, low, allow_low_quality_matches=allow_low_quality)
    truth, candidates = (box_cases(seed) for seed in (9, 10))
    rng = np.random.default_rng(11)
    qualities = []
    for i, (t, c) in enumerate(zip(truth, candidates, strict=True)):
        t, c = (x if len(x) else make_boxes(rng, 1, "ordinary") for x in (t, c))
        c = np.concatenate([c[: CAPACITY // 2], t[: CAPACITY // 2] + np.float32(i % 3)])  # some good matches
        quality = np.nan_to_num(torchvision.ops.box_iou(torch.tensor(t), torch.tensor(c)).numpy())
        qualities.append(np.round(quality, 1) if i % 2 else quality)
    # Columns are padded with -1, which is below any threshold and never a row's best; `valid` marks padded rows.
    filled = [np.pad(q, ((0, 0), (0, CAPACITY - q.shape[1])), constant_values=-1) for q in qualities]
    padded, valid = pad(filled)
    match = jax.jit(
        jax.vmap(
            lambda q, v: ops.match_boxes(
                q, v, low_threshold=low, high_threshold=high, allow_low_quality=allow_low_quality
            )
        )
    )
    indices, positive, negative = (np.asarray(x) for x in match(padded, valid))
    for i, quality in enumerate(qualities):
        m, expected = quality.shape[1], matcher(torch.tensor(quality)).numpy()
        np.testing.assert_array_equal(positive[i, :m], expected >= 0)
        np.testing.assert_array_equal(negative[i, :m], expected == matcher.BELOW_LOW_THRESHOLD)
        np.testing.assert_array_equal(indices[i, :m], expected.clip(min=0))


@pytest.mark.parametrize(("num_samples", "fraction"), [(16, 0.5), (15, 0.25), (7, 0.9), (64, 0.5), (3, 0.1)])
def test_sampler_counts(num_samples, fraction):
    rng = np.random.default_rng(12)
    cases, m = CASES // 5, 40
    sampler = _utils.BalancedPositiveNegativeSampler(num_samples, fraction)
    shares = rng.dirichlet((0.4, 0.4, 0.4), cases)
    verdicts = np.stack([rng.choice([-1, 0, 1], m, p=share) for share in shares])
    sample = jax.vmap(
        lambda p, n, k: ops.sample_balanced(p, n, num_samples=num_samples, positive_fraction=fraction, key=k)
    )
    keys = jr.split(jr.key(0), cases)
    indices, valid = (np.asarray(x) for x in sample(jnp.asarray(verdicts == 1), jnp.asarray(verdicts == 0), keys))
    for verdict, row, is_sample in zip(verdicts, indices, valid, strict=True):
        expected = [int(mask[0].sum()) for mask in sampler([torch.tensor(verdict)])]
        drawn = verdict[row[is_sample]]
        assert len(np.unique(row[is_sample])) == len(drawn)
        assert [int((drawn == 1).sum()), int((drawn == 0).sum())] == expected
        assert (np.diff(drawn) <= 0).all()  # positives first


def gradients(loss, *args):
    """Values of an elementwise torch loss, and their gradients with respect to its first argument."""
    first, *rest = (torch.tensor(np.asarray(x)) for x in args)
    first.requires_grad_()
    values = loss(first, *rest)
    values.sum().backward()
    return values.detach().numpy(), first.grad.numpy()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.giou_loss, torchvision.ops.generalized_box_iou_loss),
        (ops.diou_loss, torchvision.ops.distance_box_iou_loss),
        (ops.ciou_loss, torchvision.ops.complete_box_iou_loss),
    ],
)
def test_box_losses(ours, theirs):
    rng = np.random.default_rng(13)
    for kind in KINDS:
        a, b = make_boxes(rng, CASES, kind), make_boxes(rng, CASES, kind)
        a[::10] = b[::10]
        expected, slope = gradients(theirs, a, b)
        assert_close_where_finite(jax.jit(ours)(jnp.asarray(a), jnp.asarray(b)), expected)
        ours_slope = jax.jit(jax.grad(lambda x, y: ours(x, y).sum()))(jnp.asarray(a), jnp.asarray(b))
        assert np.isfinite(ours_slope).all()
        if kind in ("ordinary", "crowded", "negative"):
            assert_close_where_finite(ours_slope, slope)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (None, 2.0), (0.7, 1.5), (0.5, 0.0)])
def test_focal_loss(alpha, gamma):
    rng = np.random.default_rng(14)
    logits = rng.choice([0.0, 1e-3, 1, 10, 100], CASES * 5) * rng.normal(size=CASES * 5)
    logits, targets = logits.astype(np.float32), rng.integers(0, 2, CASES * 5).astype(np.float32)

    def theirs(x, t):
        return torchvision.ops.sigmoid_focal_loss(x, t, alpha=-1 if alpha is None else alpha, gamma=gamma)

    def ours(x, t):
        return ops.sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma)

    expected, slope = gradients(theirs, logits, targets)
    x, t = jnp.asarray(logits), jnp.asarray(targets)
    assert_close_where_finite(jax.jit(ours)(x, t), expected)
    assert_close_where_finite(jax.jit(jax.grad(lambda x: ours(x, t).sum()))(x), slope)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1_loss(beta):
    rng = np.random.default_rng(15)
    pred, target = (rng.choice([0.0, 0.1, 1, 100], 5 * CASES) * rng.normal(size=5 * CASES) for _ in range(2))
    pred, target = pred.astype(np.float32), target.astype(np.float32)
    theirs = lambda x, t: torch.nn.functional.smooth_l1_loss(x, t, beta=beta, reduction="none")  # noqa: E731
    expected, slope = gradients(theirs, pred, target)
    x, t = jnp.asarray(pred), jnp.asarray(target)
    assert_close_where_finite(ops.smooth_l1_loss(x, t, beta=beta), expected)
    assert_close_where_finite(jax.grad(lambda x: ops.smooth_l1_loss(x, t, beta=beta).sum())(x), slope)
