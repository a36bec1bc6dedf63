"""Exact non-maximum suppression with static shapes.

The rule: visit the valid boxes in order of descending score, ties in input order, and keep a box unless its IoU with a
box already kept exceeds the threshold. There are three implementations. The platform and the sizes select one of them:

- `_keep_scan`: one sequential pass over the sorted boxes. Each kept box suppresses all later boxes as one vector
  operation.
- `_keep_fixed_point`: repeat "keep the boxes that no kept earlier box overlaps" until nothing changes. After k rounds
  the first k boxes are final, but a few rounds are usually enough. Each round computes all n² IoUs in parallel.
- `_select_greedy`, for few outputs of many boxes: take the best remaining box, drop the boxes that it overlaps, repeat.
  Does not sort.

For few outputs of many boxes, the valid boxes are first packed into a shorter array if they fit, which they usually do
after a score threshold.

IoUs are computed on the fly; no (n, n) array is stored.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from .._xla import by_platform, named_call, unvmap_max, varying_like
from ._boxes import _corners, _intersection_and_union


# Greedy selection takes a few passes over the boxes per output; the scan takes one pass per box, and a sort. They break
# even at about 3 boxes per output.
GREEDY_BOXES_PER_OUTPUT = 3
# The scan runs in this many parts. Each part reads only the boxes that earlier parts have not decided.
SCAN_PARTS = 4
# Up to this many boxes, the fixed-point form runs on all of them: n² IoUs are too few for packing to pay.
FIXED_POINT_BOXES = 4096
# From this many boxes on, each row of the (n, n) matrix of pairs holds the possible suppressors of one box; below it,
# each column does. The result is the same.
SUPPRESSORS_IN_ROWS = 2048
# Rounds between two convergence checks. Rounds beyond the fixed point change nothing.
ROUNDS_PER_CHECK = 4
# Capacities for packed valid boxes; the smallest that holds them is used. A confident detector has one or two thousand
# candidates above its score threshold, an unconfident one several thousand.
PACKED_BOXES = (2048, 8192)


def _comparable(iou_threshold, boxes):
    """Rounds the threshold down to the dtype of the IoUs. An IoU exceeds both numbers or neither."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie between 0 and 1, got {iou_threshold}")
    dtype = np.float64 if boxes.dtype == np.float64 else np.float32
    rounded = dtype(iou_threshold)
    return np.nextafter(rounded, dtype(-1)) if float(rounded) > iou_threshold else rounded


def _overlaps(a, b, threshold):
    """Whether boxes overlap by more than the threshold and have the same label.

    `a` and `b` are `(*corners, labels or None)` and broadcast against each other. Compares the quotient with the
    threshold, as torchvision does; comparing the intersection with `threshold * union` rounds differently.
    """
    intersection, union = _intersection_and_union(a[:4], b[:4])
    overlaps = intersection / jnp.where(union > 0, union, 1) > threshold
    return overlaps if a[4] is None else overlaps & (a[4] == b[4])


def _at(rows, i):
    return tuple(None if x is None else x[i] for x in rows)


def _keep_scan(rows, valid, threshold):
    """Keep mask of boxes sorted by score, computed one vectorised row at a time."""

    def suppress_by_first(count, rows, keep):
        positions = jnp.arange(keep.size, dtype=jnp.int32)

        def suppress(i, keep):
            return keep & ~(_overlaps(_at(rows, i), rows, threshold) & keep[i] & (positions > i))

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), suppress, keep)

    part_size, decided, keep = -(-valid.size // SCAN_PARTS), [], valid
    for start in range(0, valid.size, part_size):
        keep = suppress_by_first(min(part_size, keep.size), _at(rows, slice(start, None)), keep)
        decided.append(keep[:part_size])
        keep = keep[part_size:]
    return jnp.concatenate(decided)


def _keep_fixed_point(rows, valid, threshold):
    """Keep mask of boxes sorted by score, computed for all rows at once and repeated until nothing changes."""
    positions = jnp.arange(valid.size, dtype=jnp.int32)
    row, column = (slice(None), None), (None, slice(None))
    later, first = (row, column) if valid.size >= SUPPRESSORS_IN_ROWS else (column, row)
    earlier = positions[first] < positions[later]  # (n, n)

    def one_round(keep):
        overlaps = _overlaps(_at(rows, later), _at(rows, first), threshold)  # (n, n)
        return valid & ~jnp.any(overlaps & earlier & keep[first], axis=later.index(None))

    def run_rounds(state):
        keep, _ = state
        for _ in range(ROUNDS_PER_CHECK - 1):
            keep = one_round(keep)
        return one_round(keep), keep

    return lax.while_loop(lambda state: jnp.any(state[0] != state[1]), run_rounds, run_rounds((valid, valid)))[0]


def _sorted_keep(rows, scores, valid, threshold, *, keep):
    """Rows in order of descending score, valid or not, and which of them to keep."""
    order = jnp.argsort(scores, descending=True, stable=True).astype(jnp.int32)
    return order, keep(_at(rows, order), valid[order], threshold)


def _keep_mask(*args, keep):
    order, sorted_mask = _sorted_keep(*args, keep=keep)
    return jnp.zeros_like(sorted_mask).at[order].set(sorted_mask, unique_indices=True)


def _select_sorted(*args, max_outputs, keep):
    """Rows of the best `max_outputs` kept boxes, and their number."""
    order, sorted_mask = _sorted_keep(*args, keep=keep)
    positions, count = _first_true(sorted_mask, max_outputs)
    return jnp.where(jnp.arange(max_outputs, dtype=jnp.int32) < count, order[positions], 0), count


def _first_true(mask, size):
    """Positions of the first `size` true elements, then zeros, and the number of these positions."""
    positions = jnp.nonzero(mask, size=size, fill_value=0)[0].astype(jnp.int32)
    return positions, jnp.minimum(mask.sum(dtype=jnp.int32), size)


def _select_greedy(rows, scores, valid, threshold, *, max_outputs):
    """Like `_select_sorted`, without a sort: takes the best remaining box up to `max_outputs` times."""
    positions = jnp.arange(valid.size, dtype=jnp.int32)
    ranks = _ranks(scores, valid)
    removed = jnp.iinfo(ranks.dtype).min

    def best(ranks):
        # The first position of the maximum, or `valid.size` if all boxes are removed.
        top = jnp.max(ranks)
        return jnp.min(jnp.where((ranks == top) & (ranks != removed), positions, valid.size))

    def select(state):
        count, i, ranks, indices = state
        ranks = jnp.where(_overlaps(_at(rows, i), rows, threshold) | (positions == i), removed, ranks)
        return count + 1, best(ranks), ranks, indices.at[count].set(i)

    def unfinished(state):
        return (state[0] < max_outputs) & (state[1] < valid.size)

    start = jnp.int32(0), best(ranks), ranks, jnp.zeros(max_outputs, jnp.int32)
    count, _, _, indices = lax.while_loop(unfinished, select, varying_like(start, rows))
    return indices, count


def _ranks(scores, valid):
    """Integers in the order of the scores. Invalid rows, and only those, get the smallest integer of the dtype."""
    # The bits of negative floats order in reverse. -0.0 and 0.0 are equal, so both get the same bits.
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), f"int{jnp.finfo(scores.dtype).bits}")
    info = jnp.iinfo(bits.dtype)
    return jnp.where(valid, jnp.where(bits < 0, bits ^ info.max, bits), info.min)


def _select_packed(rows, scores, valid, threshold, *, max_outputs, select):
    """`select` on the packed valid boxes if a capacity holds them, `_select_greedy` on all boxes otherwise."""
    total = unvmap_max(valid.sum(dtype=jnp.int32))

    def within(capacities):
        if not capacities or valid.size <= capacities[0]:
            return _select_greedy(rows, scores, valid, threshold, max_outputs=max_outputs)
        capacity, *larger = capacities

        def on_packed():
            packed, num_valid = _first_true(valid, capacity)  # (capacity,) rows of valid boxes
            packed_valid = jnp.arange(capacity, dtype=jnp.int32) < num_valid
            indices, count = select(_at(rows, packed), scores[packed], packed_valid, threshold, max_outputs=max_outputs)
            return jnp.where(jnp.arange(max_outputs, dtype=jnp.int32) < count, packed[indices], 0), count

        return lax.cond(total <= capacity, on_packed, lambda: within(larger))

    return within(list(PACKED_BOXES))


def _prepared(boxes, scores, labels, valid):
    """Corners and labels of the boxes, scores, and validity. A NaN score makes a row invalid."""
    boxes, scores = lax.stop_gradient((boxes, scores))
    valid = ~jnp.isnan(scores) if valid is None else valid & ~jnp.isnan(scores)
    valid = varying_like(valid, boxes, labels)  # whether a box is kept depends on all boxes
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
    few_outputs = n >= GREEDY_BOXES_PER_OUTPUT * max_outputs
    scan, fixed_point = (partial(_select_sorted, keep=keep) for keep in (_keep_scan, _keep_fixed_point))
    cpu = partial(_select_packed, select=_select_greedy) if few_outputs else scan
    default = partial(_select_packed, select=fixed_point) if few_outputs and n > FIXED_POINT_BOXES else fixed_point
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
    """Applies non-maximum suppression. Returns a mask of the boxes to keep, in input order.

    A box is dropped if its IoU with a kept box is strictly greater than `iou_threshold` and that box has a higher
    score, or the same score and an earlier row. IoUs are computed in float32, as in torchvision. Boxes are
    `(x0, y0, x1, y1)` in any range of coordinates. A box without area overlaps nothing and is kept. Rows that are not
    `valid` or have a NaN score are neither kept nor suppress others. A score of `-inf` alone does not make a row
    invalid. The result has no gradient.

    `iou_threshold` is static. Raises a `ValueError` unless it is in 0..1.

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
    """Applies `nms` within each label: a box only suppresses boxes of the same label.

    Labels are compared directly instead of being added to the coordinates as offsets, so that large and negative
    coordinates keep their precision. Labels may be any integers, such as feature levels.

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
    """Returns the rows that `nms` keeps, highest score first, and which of the `max_outputs` outputs are valid.

    With `labels`, returns the rows that `class_aware_nms` keeps. Unused outputs have index 0 and are not valid;
    `max_outputs` may exceed `n`. All `n` rows are candidates: there is no top-k before suppression.

    `iou_threshold` and `max_outputs` are static. Raises a `ValueError` unless `0 <= iou_threshold <= 1` and
    `max_outputs >= 1`.

    >>> boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    >>> indices, valid = nms_indices(boxes, jnp.array([0.8, 0.9, 0.7]), iou_threshold=0.5, max_outputs=4)
    >>> indices.tolist(), valid.tolist()
    ([1, 2, 0, 0], [True, True, False, False])
    """
    if max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1, got {max_outputs}")
    # The threshold is already rounded, so that a program that replaces the named call compares with the same number.
    options = {"iou_threshold": float(_comparable(iou_threshold, boxes)), "max_outputs": max_outputs}
    return named_call(_nms_indices, boxes, scores, labels, valid, **options)
