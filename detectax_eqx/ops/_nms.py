"""Non-maximum suppression, exact and of static shape.

The rule: go through the valid boxes from best score to worst, the earlier first among equals, and keep a box unless its
IoU with a kept one exceeds the threshold. Three forms compute it; the platform and the sizes decide between them:

- `_keep_scan`: one pass over the sorted boxes, each kept box suppressing the later ones as a vector. Sequential.
- `_keep_fixed_point`: iterate "keep what no kept earlier box overlaps" until nothing changes. After k rounds the first
  k boxes are right, but a handful is usually enough. Each round computes all n² IoUs, in parallel.
- `_select_greedy`, for few outputs of many boxes: take the best remaining box, drop what it overlaps, repeat. No sort.

Where few outputs of many boxes are wanted, the valid ones are first moved together if they are few, as after a score
threshold.

IoU rows are computed on the fly; nothing of size n × n is stored.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from .._xla import by_platform, first_true, named_call, unvmap_max, varying_like
from ._boxes import _corners, _intersection_and_union


# Greedy selection costs a few passes over the boxes per output, the scan one pass per box and a sort: they break even
# at about 3 boxes per output.
GREEDY_BOXES_PER_OUTPUT = 3
# Parts of the scan. Each works on the boxes that the parts before it have not decided.
SCAN_PARTS = 4
# Up to this many boxes the fixed-point form takes all of them: its n² IoUs are not worth a packing.
FIXED_POINT_BOXES = 4096
# From this many boxes on, the boxes that suppress another lie along the rows of the matrix of pairs, below it along the
# columns. The result is the same.
SUPPRESSORS_IN_ROWS = 2048
# Rounds between two checks for a change. Rounds beyond the fixed point change nothing.
ROUNDS_PER_CHECK = 4
# Capacities for the valid boxes that are moved together; the smallest that holds them is used. Candidates above a
# detector's score threshold are one or two thousand where it is confident, and several thousand where not.
PACKED_BOXES = (2048, 8192)


def _comparable(iou_threshold, boxes):
    """The largest number of the IoUs' dtype that is not above the threshold: an IoU exceeds both or neither."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie between 0 and 1, got {iou_threshold}")
    dtype = np.float64 if boxes.dtype == np.float64 else np.float32
    rounded = dtype(iou_threshold)
    return np.nextafter(rounded, dtype(-1)) if float(rounded) > iou_threshold else rounded


def _overlaps(a, b, threshold):
    """Whether boxes `(*corners, labels or None)` that broadcast against each other overlap and share their label.

    The quotient is compared, not the intersection with `threshold * union`: that would round otherwise than
    torchvision.
    """
    intersection, union = _intersection_and_union(a[:4], b[:4])
    overlaps = intersection / jnp.where(union > 0, union, 1) > threshold
    return overlaps if a[4] is None else overlaps & (a[4] == b[4])


def _at(rows, i):
    return tuple(None if x is None else x[i] for x in rows)


def _keep_scan(rows, valid, threshold):
    """Keep mask of boxes that are sorted by score: one vectorised row at a time."""

    def suppress_by_first(count, rows, keep):
        positions = jnp.arange(keep.size, dtype=jnp.int32)

        def suppress(i, keep):
            return keep & ~(_overlaps(_at(rows, i), rows, threshold) & keep[i] & (positions > i))

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), suppress, keep)

    part, decided, keep = -(-valid.size // SCAN_PARTS), [], valid
    for start in range(0, valid.size, part):
        keep = suppress_by_first(min(part, keep.size), _at(rows, slice(start, None)), keep)
        decided.append(keep[:part])
        keep = keep[part:]
    return jnp.concatenate(decided)


def _keep_fixed_point(rows, valid, threshold):
    """Keep mask of boxes that are sorted by score: all rows at a time, until nothing changes."""
    positions = jnp.arange(valid.size, dtype=jnp.int32)
    row, column = (slice(None), None), (None, slice(None))
    later, first = (row, column) if valid.size >= SUPPRESSORS_IN_ROWS else (column, row)
    earlier = positions[first] < positions[later]

    def one_round(keep):
        overlaps = _overlaps(_at(rows, later), _at(rows, first), threshold)
        return valid & ~jnp.any(overlaps & earlier & keep[first], axis=later.index(None))

    def some_rounds(state):
        keep, _ = state
        for _ in range(ROUNDS_PER_CHECK - 1):
            keep = one_round(keep)
        return one_round(keep), keep

    return lax.while_loop(lambda state: jnp.any(state[0] != state[1]), some_rounds, some_rounds((valid, valid)))[0]


def _sorted_keep(rows, scores, valid, threshold, *, keep):
    """Positions from best to worst, valid or not, and which of them to keep."""
    order = jnp.argsort(scores, descending=True, stable=True).astype(jnp.int32)
    return order, keep(_at(rows, order), valid[order], threshold)


def _keep_mask(*args, keep):
    order, kept = _sorted_keep(*args, keep=keep)
    return jnp.zeros_like(kept).at[order].set(kept, unique_indices=True)


def _select_sorted(*args, max_outputs, keep):
    """The first `max_outputs` boxes kept, and how many there are."""
    order, kept = _sorted_keep(*args, keep=keep)
    positions, count = first_true(kept, max_outputs)
    return jnp.where(jnp.arange(max_outputs, dtype=jnp.int32) < count, order[positions], 0), count


def _select_greedy(rows, scores, valid, threshold, *, max_outputs):
    """The same without sorting: `max_outputs` times the best of what remains, or fewer if nothing does."""
    positions = jnp.arange(valid.size, dtype=jnp.int32)
    ranks = _ranks(scores, valid)
    gone = jnp.iinfo(ranks.dtype).min

    def best(ranks):
        # The first position of the maximum, or `valid.size` where all are gone.
        top = jnp.max(ranks)
        return jnp.min(jnp.where((ranks == top) & (ranks != gone), positions, valid.size))

    def select(state):
        count, i, ranks, indices = state
        ranks = jnp.where(_overlaps(_at(rows, i), rows, threshold) | (positions == i), gone, ranks)
        return count + 1, best(ranks), ranks, indices.at[count].set(i)

    def unfinished(state):
        return (state[0] < max_outputs) & (state[1] < valid.size)

    start = jnp.int32(0), best(ranks), ranks, jnp.zeros(max_outputs, jnp.int32)
    count, _, _, indices = lax.while_loop(unfinished, select, varying_like(start, rows))
    return indices, count


def _ranks(scores, valid):
    """Integers in the order of the scores; the least there is where they are not valid, and only there."""
    # Of two negative numbers the larger has the smaller bits; both zeros are the same number.
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), f"int{jnp.finfo(scores.dtype).bits}")
    info = jnp.iinfo(bits.dtype)
    return jnp.where(valid, jnp.where(bits < 0, bits ^ info.max, bits), info.min)


def _select_packed(rows, scores, valid, threshold, *, max_outputs, select):
    """`select` on the valid boxes alone, if there is room for them; else `_select_greedy` on all."""
    total = unvmap_max(valid.sum(dtype=jnp.int32))

    def within(rooms):
        if not rooms or valid.size <= rooms[0]:
            return _select_greedy(rows, scores, valid, threshold, max_outputs=max_outputs)
        room, *larger = rooms

        def few():
            packed, number = first_true(valid, room)
            some = _at(rows, packed), scores[packed], jnp.arange(room, dtype=jnp.int32) < number
            indices, count = select(*some, threshold, max_outputs=max_outputs)
            return jnp.where(jnp.arange(max_outputs, dtype=jnp.int32) < count, packed[indices], 0), count

        return lax.cond(total <= room, few, lambda: within(larger))

    return within(list(PACKED_BOXES))


def _prepared(boxes, scores, labels, valid):
    """Corners and labels as rows, scores, and validity; a NaN score makes a row invalid."""
    boxes, scores = lax.stop_gradient((boxes, scores))
    valid = ~jnp.isnan(scores) if valid is None else valid & ~jnp.isnan(scores)
    valid = varying_like(valid, boxes, labels)  # which boxes are kept depends on all of them
    return (*_corners(boxes), labels), jnp.where(valid, scores, -jnp.inf), valid


@jax.jit
def _nms(boxes, scores, labels, valid, threshold):
    if boxes.shape[0] == 0:
        return jnp.zeros(0, bool)
    return by_platform(
        *_prepared(boxes, scores, labels, valid),
        threshold,
        cpu=partial(_keep_mask, keep=_keep_scan),
        default=partial(_keep_mask, keep=_keep_fixed_point),
    )


def _nms_indices(boxes, scores, labels, valid, *, iou_threshold, max_outputs):
    threshold = _comparable(iou_threshold, boxes)
    n = boxes.shape[0]
    if n == 0:
        return jnp.zeros(max_outputs, jnp.int32), jnp.zeros(max_outputs, bool)
    few = n >= GREEDY_BOXES_PER_OUTPUT * max_outputs
    scan, fixed_point = (partial(_select_sorted, keep=keep) for keep in (_keep_scan, _keep_fixed_point))
    cpu = partial(_select_packed, select=_select_greedy) if few else scan
    default = partial(_select_packed, select=fixed_point) if few and n > FIXED_POINT_BOXES else fixed_point
    indices, count = by_platform(
        *_prepared(boxes, scores, labels, valid),
        threshold,
        cpu=partial(cpu, max_outputs=max_outputs),
        default=partial(default, max_outputs=max_outputs),
    )
    return indices, jnp.arange(max_outputs, dtype=jnp.int32) < count


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    valid: Bool[Array, " n"] | None = None,
    *,
    iou_threshold: float,
) -> Bool[Array, " n"]:
    """Which boxes non-maximum suppression keeps, in input order.

    A box is dropped if its IoU with a kept box of a better score, or of the same score and an earlier row, is greater
    than `iou_threshold`: strictly, with the IoU computed in float32 as torchvision does. Boxes `(x0, y0, x1, y1)` may
    lie anywhere; a box without area overlaps nothing and is kept. Rows that are not `valid` are neither kept nor do
    they suppress, and the same goes for rows whose score is NaN. A score of `-inf` alone does not make a row invalid.
    No gradient flows through.

    Raises ValueError unless `0 <= iou_threshold <= 1`, which is a static number.

    >>> boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    >>> nms(boxes, jnp.array([0.8, 0.9, 0.7]), iou_threshold=0.5).tolist()
    [False, True, True]
    """
    return _nms(boxes, scores, None, valid, _comparable(iou_threshold, boxes))


def class_aware_nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"],
    valid: Bool[Array, " n"] | None = None,
    *,
    iou_threshold: float,
) -> Bool[Array, " n"]:
    """`nms` in which boxes only suppress boxes of their own label.

    Labels are compared, not turned into offsets of the coordinates: neither large nor negative coordinates lose
    precision. Any integers will do as labels, feature levels for instance.

    >>> boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [2.0, 0.0, 12.0, 10.0]])
    >>> class_aware_nms(boxes, jnp.array([0.8, 0.9, 0.7]), jnp.array([0, 1, 1]), iou_threshold=0.5).tolist()
    [True, True, False]
    """
    return _nms(boxes, scores, labels, valid, _comparable(iou_threshold, boxes))


def nms_indices(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    valid: Bool[Array, " n"] | None = None,
    *,
    iou_threshold: float,
    max_outputs: int,
    labels: Int[Array, " n"] | None = None,
) -> tuple[Int32[Array, " {max_outputs}"], Bool[Array, " {max_outputs}"]]:
    """Rows that `nms` keeps, best score first, at most `max_outputs` of them, and which of the outputs are valid.

    With `labels`, rows that `class_aware_nms` keeps. Outputs beyond the rows kept have index 0 and are not valid, also
    where `max_outputs` is more than `n`. All `n` rows are candidates: nothing is cut off before suppression.

    Raises ValueError unless `0 <= iou_threshold <= 1` and `max_outputs >= 1`; both are static numbers.

    >>> boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    >>> indices, valid = nms_indices(boxes, jnp.array([0.8, 0.9, 0.7]), iou_threshold=0.5, max_outputs=4)
    >>> indices.tolist(), valid.tolist()
    ([1, 2, 0, 0], [True, True, False, False])
    """
    if max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1, got {max_outputs}")
    # Of the IoUs' dtype, so that whoever recognises the call compares with the same number.
    options = {"iou_threshold": float(_comparable(iou_threshold, boxes)), "max_outputs": max_outputs}
    return named_call(_nms_indices, boxes, scores, labels, valid, **options)
