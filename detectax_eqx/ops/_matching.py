"""Matching of candidates to ground truth, and sampling of candidates for a loss."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from .._xla import by_platform, varying_like
from ._boxes import upcast


class Matches(NamedTuple):
    """The result of matching `m` candidates to ground truth.

    - `indices`: the ground truth row matched to each positive candidate, and 0 for all others.
    - `positive`, `negative`: foreground and background candidates. A candidate that is neither is ignored.
    """

    indices: Int32[Array, " m"]
    positive: Bool[Array, " m"]
    negative: Bool[Array, " m"]


def match_boxes(
    quality: Float[Array, "n m"],
    valid: Bool[Array, " n"] | None = None,
    *,
    low_threshold: float,
    high_threshold: float,
    allow_low_quality: bool = False,
) -> Matches:
    """Matches `m` candidates to `n` ground truth rows by their quality, usually the IoU.

    A candidate is positive if its best quality is at least `high_threshold`, negative if it is below `low_threshold`,
    and neither in between. It is matched to the row with the best quality, on ties the first. With
    `allow_low_quality`, the candidates with the highest quality for some ground truth row, including ties, are positive
    as well; each is still matched to its own best row. As in torchvision, a quality of 0 is not special: a ground truth
    row that overlaps no candidate makes every candidate positive.

    Ground truth rows that are not `valid` are ignored. Without valid rows, all candidates are negative.

    Raises a `ValueError` unless `low_threshold <= high_threshold`. Follows torchvision's `Matcher`; Ren et al. 2015,
    section 3.1.2.

    >>> quality = jnp.array([[0.9, 0.4, 0.1], [0.2, 0.5, 0.2]])
    >>> indices, positive, negative = match_boxes(quality, low_threshold=0.3, high_threshold=0.7)
    >>> indices.tolist(), positive.tolist(), negative.tolist()
    ([0, 0, 0], [True, False, False], [False, False, True])
    >>> match_boxes(quality, low_threshold=0.3, high_threshold=0.7, allow_low_quality=True).indices.tolist()
    [0, 1, 0]
    """
    if not low_threshold <= high_threshold:
        raise ValueError(f"low_threshold must be at most high_threshold, got {low_threshold} and {high_threshold}")
    return Matches(*_match(quality, valid, low_threshold, high_threshold, allow_low_quality=allow_low_quality))


@partial(jax.jit, static_argnames="allow_low_quality")
def _match(quality, valid, low_threshold, high_threshold, *, allow_low_quality):
    n = quality.shape[0]
    quality = lax.stop_gradient(upcast(quality))
    valid = jnp.ones(n, bool) if valid is None else valid
    quality, valid = varying_like((quality, valid))

    def run(form):
        return partial(form, allow_low_quality=allow_low_quality)

    best, indices, ties = by_platform(quality, valid, cpu=run(_best_in_turn), default=run(_best_at_once))
    positive = (best >= high_threshold) | ties
    negative = (best < low_threshold) & ~ties
    return jnp.where(positive, indices, 0), positive, negative


def _best_in_turn(quality, valid, *, allow_low_quality):
    """Best quality of each candidate, its row, and whether the candidate is the best of any row. Ignores NaN.

    Scans over the rows, which reads the matrix once.
    """
    n, m = quality.shape

    def fold(state, row):
        best, indices, ties = state
        row, valid, index = row
        row = jnp.where(valid, row, -jnp.inf)
        better = row > best  # (m,); on ties the first row stays
        if allow_low_quality:
            ties |= valid & (row == row.max(initial=-jnp.inf))
        return (jnp.where(better, row, best), jnp.where(better, index, indices), ties), None

    start = jnp.full(m, -jnp.inf, quality.dtype), jnp.zeros(m, jnp.int32), jnp.zeros(m, bool)
    return lax.scan(fold, varying_like(start, quality), (quality, valid, jnp.arange(n, dtype=jnp.int32)))[0]


def _best_at_once(quality, valid, *, allow_low_quality):
    """Like `_best_in_turn`, by parallel reductions over all rows."""
    n, m = quality.shape
    if n == 0:
        nothing = jnp.full(m, -jnp.inf, quality.dtype), jnp.zeros(m, jnp.int32), jnp.zeros(m, bool)
        return varying_like(nothing, quality)
    quality = jnp.where(valid[:, None], quality, -jnp.inf)  # (n, m)
    numbers = jnp.where(jnp.isnan(quality), -jnp.inf, quality)
    ties = varying_like(jnp.zeros(m, bool), quality)
    if allow_low_quality:
        ties = (valid[:, None] & (quality == quality.max(axis=1, initial=-jnp.inf, keepdims=True))).any(axis=0)
    return numbers.max(axis=0), lax.argmax(numbers, 0, jnp.int32), ties  # (m,) each


def sample_balanced(
    positive: Bool[Array, " m"],
    negative: Bool[Array, " m"],
    *,
    num_samples: int,
    positive_fraction: float,
    key: PRNGKeyArray,
) -> tuple[Int32[Array, " s"], Bool[Array, " s"]]:
    """Samples positive and negative candidates uniformly at random, without replacement.

    Draws up to `int(num_samples * positive_fraction)` positives and fills the remaining samples with negatives, as far
    as there are any. These are the counts of torchvision's `BalancedPositiveNegativeSampler`. All subsets of these
    sizes are equally likely. Returns `s = min(num_samples, m)` rows, positives first, and which of them are valid.
    Invalid rows have index 0. Candidates that are neither positive nor negative are never drawn, and appending such
    candidates changes nothing.

    Raises a `ValueError` unless `num_samples >= 1` and `0 <= positive_fraction <= 1`.

    >>> positive, negative = jnp.array([True, False, False, False]), jnp.array([False, True, False, True])
    >>> indices, valid = sample_balanced(positive, negative, num_samples=3, positive_fraction=0.5, key=jr.key(0))
    >>> indices[0].item(), sorted(indices.tolist()), valid.tolist()
    (0, [0, 1, 3], [True, True, True])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"positive_fraction must lie between 0 and 1, got {positive_fraction}")
    m = positive.size
    size, max_positives = min(num_samples, m), min(int(num_samples * positive_fraction), m)
    # 30 random bits, reinterpreted as a positive normal float. Such floats order like the integers with the same bits
    # and tie less often than the 23 random bits of `uniform`.
    smallest_normal = 0x00800000
    priority = lax.bitcast_convert_type((jr.bits(key, (m,), "uint32") >> 2) + smallest_normal, "float32")
    positives = lax.top_k(jnp.where(positive, priority, 0), max_positives)[1]
    negatives = lax.top_k(jnp.where(negative, priority, 0), size)[1]
    num_positives = jnp.minimum(positive.sum(dtype=jnp.int32), max_positives)
    num_negatives = jnp.minimum(negative.sum(dtype=jnp.int32), num_samples - num_positives)
    slots = jnp.arange(size, dtype=jnp.int32)  # positives first, then negatives
    padded = jnp.pad(positives, (0, size - max_positives))
    indices = jnp.where(slots < num_positives, padded, negatives[jnp.maximum(slots - num_positives, 0)])
    valid = slots < num_positives + num_negatives
    return jnp.where(valid, indices, 0), valid
