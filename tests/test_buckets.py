"""Buckets: the canvas that an image is assigned to, and the size of its source."""

import numpy as np
import pytest

from detectax_eqx.data import Bucket, make_buckets


WIDE, TALL, SQUARE = (800, 1344), (1344, 800), (1088, 1088)


CHOICES = [
    ((480, 640), {}, WIDE),
    ((640, 480), {}, TALL),
    ((500, 500), {}, WIDE),  # equal areas: the first canvas wins
    ((427, 640), {}, WIDE),
    ((100, 3000), {}, WIDE),  # limited by its long side
    ((3000, 100), {}, TALL),
    ((1, 1), {}, WIDE),
    ((480, 640), {"min_size": 816}, SQUARE),  # 816×1088
    ((640, 480), {"min_size": 816}, SQUARE),
    ((500, 500), {"min_size": 1000}, SQUARE),
    ((500, 500), {"min_size": 1200}, SQUARE),  # fits no canvas; shrunk least on this one
    ((300, 600), {"min_size": 1000, "max_size": 3000}, WIDE),  # 1000×2000: scaled by .672, by .544 on SQUARE
    ((600, 300), {"min_size": 1000, "max_size": 3000}, TALL),
]


@pytest.mark.parametrize("size, options, canvas", CHOICES)
def test_smallest_that_holds_it_or_shrinks_it_least(size, options, canvas):
    (bucket,) = make_buckets([size], **options)
    assert bucket.canvas == canvas and bucket.indices == (0,)


def test_agrees_with_a_loop_over_canvases():
    rng = np.random.default_rng(0)
    sizes = [(int(height), int(width)) for height, width in rng.integers(1, 3000, (300, 2))]
    canvases = [(320, 512), (512, 320), (416, 416), (256, 608)]
    buckets = make_buckets(sizes, canvases=canvases, min_size=320, max_size=640)
    assert sorted(i for bucket in buckets for i in bucket.indices) == list(range(300))
    for bucket in buckets:
        for index in bucket.indices:
            height, width = sizes[index]
            scale = min(320 / min(height, width), 640 / max(height, width))
            h, w = max(1, int(height * scale)), max(1, int(width * scale))
            holding = [canvas for canvas in canvases if canvas[0] >= h and canvas[1] >= w]
            if holding:
                assert bucket.canvas[0] * bucket.canvas[1] == min(a * b for a, b in holding)
                assert bucket.canvas in holding
            else:
                assert min(bucket.canvas[0] / h, bucket.canvas[1] / w) == max(min(a / h, b / w) for a, b in canvases)


def test_sources_hold_their_images():
    sizes = [(480, 640), (333, 500), (640, 427), (512, 640)]
    assert make_buckets(sizes) == (Bucket(WIDE, (512, 640), (0, 1, 3)), Bucket(TALL, (640, 448), (2,)))
    assert make_buckets([(3024, 4032)])[0].source == (3040, 4032)
    assert make_buckets([(3024, 4032), (480, 640)], max_source=1344)[0].source == (1344, 1344)
    assert make_buckets([]) == ()


MISTAKES = [
    ({"sizes": [(0, 5)]}, "sizes must be positive"),
    ({"canvases": []}, "canvases must hold"),
    ({"canvases": [(0, 5)]}, "canvases must hold"),
    ({"min_size": 0}, "min_size and max_size"),
    ({"max_size": -1}, "min_size and max_size"),
    ({"max_source": 1000}, "multiple of 32"),
    ({"max_source": 0}, "multiple of 32"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_buckets(**({"sizes": [(5, 5)]} | options))
