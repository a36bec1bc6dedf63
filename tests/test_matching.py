"""Matching candidates to ground truth, and sampling the ones that a loss uses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx.ops import _matching, match_boxes, sample_balanced


THRESHOLDS: dict[str, Any] = {"low_threshold": 0.3, "high_threshold": 0.7}


def random_quality(seed, n, m):
    """Qualities in multiples of 1/20, so that ties and values on the thresholds occur, and validity flags of rows."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 21, (n, m)) / 20, jnp.float32), jnp.asarray(rng.uniform(size=n) < 0.7)


def naive_match(quality, valid, low, high, allow_low_quality):
    """`(index, positive, negative)` of each candidate, straight from the definition."""
    quality = np.asarray(quality)
    rows = [i for i in range(quality.shape[0]) if valid[i]]
    verdicts = []
    for j in range(quality.shape[1]):
        best = max(rows, key=lambda i: quality[i, j], default=None)
        value = -np.inf if best is None else quality[best, j]
        restored = allow_low_quality and any(quality[i, j] == quality[i].max() for i in rows)
        positive = bool(value >= np.float32(high) or restored)
        verdicts.append((best if positive else 0, positive, bool(value < np.float32(low)) and not restored))
    return [np.array(x) for x in zip(*verdicts, strict=True)]


@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (12, 100)])
def test_match_equals_naive_reference(allow_low_quality, n, m):
    for seed in range(6):
        quality, valid = random_quality(seed, n, m)
        matches = match_boxes(quality, valid, allow_low_quality=allow_low_quality, **THRESHOLDS)
        for got, expected in zip(matches, naive_match(quality, valid, 0.3, 0.7, allow_low_quality), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("allow_low_quality", [False, True])
def test_forms_of_matching_agree(allow_low_quality):
    # Which form `match_boxes` uses depends on the platform.
    for seed in range(6):
        quality, valid = random_quality(seed, 12, 100)
        quality = quality.at[seed, seed::9].set(jnp.nan)
        forms = [
            jax.jit(partial(form, allow_low_quality=allow_low_quality))(quality, valid)
            for form in (_matching._best_in_turn, _matching._best_at_once)
        ]
        for in_turn, at_once in zip(*forms, strict=True):
            np.testing.assert_array_equal(in_turn, at_once)


def test_match_by_hand():
    quality = jnp.array([[0.9, 0.4, 0.1, 0.7, 0.3], [0.2, 0.5, 0.2, 0.7, 0.0], [0.0, 0.1, 0.2, 0.0, 0.2]])
    matches = match_boxes(quality, **THRESHOLDS)
    assert matches.indices.tolist() == [0, 0, 0, 0, 0]  # candidate 3 is tied between rows 0 and 1: the first wins
    assert matches.positive.tolist() == [True, False, False, True, False]
    assert matches.negative.tolist() == [False, False, True, False, False]
    # Row 2 is best matched by candidates 2 and 4, which tie; 4 keeps row 0, its own best.
    matches = match_boxes(quality, allow_low_quality=True, **THRESHOLDS)
    assert matches.indices.tolist() == [0, 0, 1, 0, 0]
    assert matches.positive.tolist() == [True, False, True, True, True]
    assert not matches.negative.any()


def test_a_row_that_nothing_overlaps_makes_all_positive():
    quality = jnp.array([[0.9, 0.1, 0.2], [0.0, 0.0, 0.0]])
    assert match_boxes(quality, allow_low_quality=True, **THRESHOLDS).positive.all()
    padded = match_boxes(quality, jnp.array([True, False]), allow_low_quality=True, **THRESHOLDS)
    assert padded.positive.tolist() == [True, False, False]


@pytest.mark.parametrize("allow_low_quality", [False, True])
def test_without_ground_truth_all_are_negative(allow_low_quality):
    for quality in (jnp.ones((2, 3)), jnp.ones((0, 3))):
        valid = jnp.zeros(len(quality), bool)
        matches = match_boxes(quality, valid, allow_low_quality=allow_low_quality, **THRESHOLDS)
        assert matches.negative.all() and not matches.positive.any() and not matches.indices.any()
    assert match_boxes(jnp.ones((2, 0)), allow_low_quality=allow_low_quality, **THRESHOLDS).positive.shape == (0,)


def test_match_jit_vmap_padding_and_dtype():
    def run(quality, valid):
        return match_boxes(quality, valid, allow_low_quality=True, **THRESHOLDS)

    cases = [random_quality(seed, 6, 20) for seed in range(3)]
    jitted, batched = jax.jit(run), jax.jit(jax.vmap(run))(*(jnp.stack(x) for x in zip(*cases, strict=True)))
    for i, (quality, valid) in enumerate(cases):
        expected = jitted(quality, valid)
        half = quality.astype(jnp.bfloat16)
        padded = jnp.pad(quality, ((0, 4), (0, 0)), constant_values=1), jnp.pad(valid, (0, 4))
        for others, same in (
            (run(quality, valid), expected),
            ([x[i] for x in batched], expected),
            (jitted(*padded), expected),
            (jitted(half, valid), jitted(half.astype(jnp.float32), valid)),
        ):
            for x, y in zip(others, same, strict=True):
                np.testing.assert_array_equal(x, y)


def test_match_lets_no_gradient_through():
    def loss(quality):
        indices, positive, _ = match_boxes(quality, **THRESHOLDS)
        return jnp.where(positive, jnp.take_along_axis(quality, indices[None], axis=0)[0], 0).sum()

    quality, _ = random_quality(0, 4, 9)
    matches = match_boxes(quality, **THRESHOLDS)
    slopes = jax.jit(jax.grad(loss))(quality)
    np.testing.assert_array_equal(slopes.sum(axis=0), matches.positive.astype(jnp.float32))


def test_match_errors():
    with pytest.raises(ValueError, match=r"low_threshold must be at most high_threshold, got 0\.8 and 0\.7"):
        match_boxes(jnp.ones((2, 3)), low_threshold=0.8, high_threshold=0.7)
    with pytest.raises(Exception, match="valid"):
        match_boxes(jnp.ones((2, 3)), jnp.ones(3, bool), **THRESHOLDS)


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "num_samples", "fraction", "expected"),
    [
        (20, 60, 16, 0.25, (4, 12)),
        (2, 60, 16, 0.25, (2, 14)),
        (0, 60, 16, 0.5, (0, 16)),
        (20, 5, 16, 0.5, (8, 5)),
        (20, 60, 7, 0.5, (3, 4)),
        (20, 60, 16, 0.0, (0, 16)),
        (20, 60, 16, 1.0, (16, 0)),
        (0, 0, 16, 0.5, (0, 0)),
        (20, 60, 1000, 0.5, (20, 60)),
        (100, 0, 1000, 0.05, (50, 0)),
    ],
)
def test_sample_counts(num_positive, num_negative, num_samples, fraction, expected, getkey):
    roles = np.random.default_rng(0).permutation(100)
    positive = roles < num_positive
    negative = (roles >= num_positive) & (roles < num_positive + num_negative)
    draw = partial(sample_balanced, num_samples=num_samples, positive_fraction=fraction)
    indices, valid = jax.jit(draw)(jnp.asarray(positive), jnp.asarray(negative), key=getkey())
    assert indices.shape == valid.shape == (min(num_samples, 100),)
    drawn = np.asarray(indices)[np.asarray(valid)]
    assert len(set(drawn.tolist())) == len(drawn) == sum(expected)
    assert positive[drawn[: expected[0]]].all() and negative[drawn[expected[0] :]].all()
    np.testing.assert_array_equal(valid, np.arange(len(valid)) < sum(expected))
    assert not np.asarray(indices)[len(drawn) :].any()


def test_sample_is_unbiased(getkey):
    positive, negative = jnp.arange(20) % 4 == 0, jnp.arange(20) % 4 == 1

    def drawn(key):
        indices, valid = sample_balanced(positive, negative, num_samples=4, positive_fraction=0.5, key=key)
        return jnp.zeros(20, jnp.int32).at[jnp.where(valid, indices, 20)].set(1, mode="drop")

    times = jax.jit(jax.vmap(drawn))(jr.split(getkey(), 4000))
    frequency = np.asarray(times).mean(axis=0)
    np.testing.assert_allclose(frequency, np.where(positive | negative, 2 / 5, 0), atol=5 * np.sqrt(0.24 / 4000))
    times = np.asarray(times)
    together = (times[:, 0] * times[:, 4]).mean()  # 1 of the 10 pairs of 5 positives
    np.testing.assert_allclose(together, 1 / 10, atol=5 * np.sqrt(0.09 / 4000))


def test_sample_jit_vmap_and_padding(getkey):
    def run(positive, negative, key):
        return sample_balanced(positive, negative, num_samples=8, positive_fraction=0.5, key=key)

    verdicts = np.random.default_rng(0).integers(-1, 2, (3, 30))
    verdicts[0] = np.minimum(verdicts[0], 0)
    positive, negative, keys = jnp.asarray(verdicts == 1), jnp.asarray(verdicts == 0), jr.split(getkey(), 3)
    jitted, batched = jax.jit(run), jax.jit(jax.vmap(run))(positive, negative, keys)
    for i in range(3):
        expected = jitted(positive[i], negative[i], keys[i])
        padded = jitted(jnp.pad(positive[i], (0, 7)), jnp.pad(negative[i], (0, 7)), keys[i])
        eager = run(positive[i], negative[i], keys[i])
        for x, e, row, more in zip(expected, eager, batched, padded, strict=True):
            np.testing.assert_array_equal(x, e)
            np.testing.assert_array_equal(x, row[i])
            np.testing.assert_array_equal(x, more)
    other, _ = jitted(positive[1], negative[1], keys[0])
    assert (other != batched[0][1]).any()


def test_sample_of_nothing(getkey):
    none = jnp.zeros(0, bool)
    indices, valid = sample_balanced(none, none, num_samples=8, positive_fraction=0.5, key=getkey())
    assert indices.shape == valid.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"positive_fraction": 1.5}, r"positive_fraction must lie between 0 and 1, got 1\.5"),
    ],
)
def test_sample_errors(change, message, getkey):
    options = {"num_samples": 4, "positive_fraction": 0.5, "key": getkey()} | change
    with pytest.raises(ValueError, match=message):
        sample_balanced(jnp.ones(3, bool), jnp.zeros(3, bool), **options)
