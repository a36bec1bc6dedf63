"""Which ground truth each candidate answers for, and which candidates a loss looks at."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from .._xla import by_platform, varying_like
from ._boxes import _upcast


class Matches(NamedTuple):
    """Verdict on each of `m` candidates.

    - `indices`: the ground truth row that a positive candidate is to predict, and 0 for all others.
    - `positive`, `negative`: foreground and background; a candidate that is neither is to be ignored.
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
    """Match `m` candidates to `n` ground truth rows by their quality, the IoU as a rule.

    A candidate whose best quality reaches `high_threshold` is positive, below `low_threshold` negative, and in between
    neither. Its match is the row of best quality, the first of equals. `allow_low_quality` also makes those candidates
    positive that have the highest quality of all for some ground truth row, every one that ties included; they keep
    the row that is best for themselves. As in torchvision, 0 is a quality like any other: a ground truth row that
    overlaps no candidate makes every candidate positive.

    Ground truth rows that are not `valid` take no part; without a valid one all candidates are negative.

    Raises ValueError unless `low_threshold <= high_threshold`. torchvision's `Matcher`; Ren et al. 2015, section 3.1.2.

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
    quality = lax.stop_gradient(_upcast(quality))
    valid = jnp.ones(n, bool) if valid is None else valid
    quality, valid = varying_like((quality, valid))

    def run(form):
        return partial(form, allow_low_quality=allow_low_quality)

    best, indices, ties = by_platform(quality, valid, cpu=run(_best_in_turn), default=run(_best_at_once))
    positive = (best >= high_threshold) | ties
    negative = (best < low_threshold) & ~ties
    return jnp.where(positive, indices, 0), positive, negative


def _best_in_turn(quality, valid, *, allow_low_quality):
    """Each candidate's best quality, its row, and whether it is any row's best; NaN is no quality.

    A fold over the rows, which reads the matrix once.
    """
    n, m = quality.shape

    def fold(state, row):
        best, indices, ties = state
        row, valid, index = row
        row = jnp.where(valid, row, -jnp.inf)
        better = row > best  # (m,); the first of equals stays
        if allow_low_quality:
            ties |= valid & (row == row.max(initial=-jnp.inf))
        return (jnp.where(better, row, best), jnp.where(better, index, indices), ties), None

    start = jnp.full(m, -jnp.inf, quality.dtype), jnp.zeros(m, jnp.int32), jnp.zeros(m, bool)
    return lax.scan(fold, varying_like(start, quality), (quality, valid, jnp.arange(n, dtype=jnp.int32)))[0]


def _best_at_once(quality, valid, *, allow_low_quality):
    """The same by reductions over all rows, in parallel."""
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
    """Draw candidates at random without replacement: some positives, and negatives to make up the number.

    At most `int(num_samples * positive_fraction)` positives are drawn, then as many negatives as are left to draw or
    exist: the counts of torchvision's `BalancedPositiveNegativeSampler`. Every subset of that size is equally likely.
    Returns `s = min(num_samples, m)` rows, positives first, and which of them are valid; the others have index 0.
    Rows that are neither positive nor negative are never drawn, and appending such rows changes nothing.

    Raises ValueError unless `num_samples >= 1` and `0 <= positive_fraction <= 1`.

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
    # 30 random bits, read as a normal, positive float: such floats order like the integers with their bits, without the
    # ties of `uniform`, which has 23.
    smallest_normal = 0x00800000
    priority = lax.bitcast_convert_type((jr.bits(key, (m,), "uint32") >> 2) + smallest_normal, jnp.float32)
    positives = lax.top_k(jnp.where(positive, priority, 0), max_positives)[1]
    negatives = lax.top_k(jnp.where(negative, priority, 0), size)[1]
    num_positives = jnp.minimum(positive.sum(dtype=jnp.int32), max_positives)
    num_negatives = jnp.minimum(negative.sum(dtype=jnp.int32), num_samples - num_positives)
    slots = jnp.arange(size, dtype=jnp.int32)  # positives first, then negatives
    padded = jnp.pad(positives, (0, size - max_positives))
    indices = jnp.where(slots < num_positives, padded, negatives[jnp.maximum(slots - num_positives, 0)])
    valid = slots < num_positives + num_negatives
    return jnp.where(valid, indices, 0), valid
