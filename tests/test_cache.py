"""The cache of decoded images: batches stay the same, whatever happens to the cache or to the images."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from PIL import Image

from detectax_eqx.data import Loader, _cache, load_coco, make_buckets, write_shapes_dataset


IMAGES = 12


@pytest.fixture
def files(tmp_path):
    return write_shapes_dataset(tmp_path / "data", num_images=IMAGES, seed=0, image_size=(64, 96))


def make_loader(files, cache, *, max_source=None, **options):
    dataset = load_coco(*files)
    buckets = make_buckets(dataset.sizes, canvases=[(64, 96)], min_size=64, max_size=96, max_source=max_source)
    return Loader(
        dataset, batch_size=4, buckets=buckets, max_objects=6, mask_size=7, num_threads=1, cache=cache, **options
    )


def batches(files, cache, **options):
    """The batches of three passes, and the counts of the cache."""
    loader = make_loader(files, cache, **options)
    return [batch for _, batch in loader.iterate(0, 9)], loader.cache_counts


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("max_source", [None, 32])
def test_batches_are_the_same_with_and_without(files, tmp_path, max_source):
    expected, counts = batches(files, None, max_source=max_source)
    assert counts == {}
    loader = make_loader(files, tmp_path / "cache", max_source=max_source)
    first = [batch for _, batch in loader.iterate(0, 3)]
    assert loader.cache_counts == {"added": IMAGES}
    assert_same([*first, *(batch for _, batch in loader.iterate(3, 9))], expected)
    assert loader.cache_counts == {"added": IMAGES, "found": 2 * IMAGES}
    actual, counts = batches(files, tmp_path / "cache", max_source=max_source)
    assert counts == {"found": 3 * IMAGES}
    assert_same(actual, expected)
    other = 32 if max_source is None else None  # the same image on another canvas is another entry
    assert batches(files, tmp_path / "cache", max_source=other)[1]["added"] >= IMAGES


def test_images_are_packed(files, tmp_path):
    batches(files, tmp_path / "cache")
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(stored) < IMAGES
    assert sum(path.stat().st_size for path in stored) < 1.5 * IMAGES * 64 * 96 * 3


def test_a_changed_image_is_made_anew(files, tmp_path, tally):
    batches(files, tmp_path / "cache")
    path = files[1] / "000005.png"
    Image.fromarray(np.full((64, 96, 3), 77, np.uint8)).save(path)
    actual, counts = batches(files, tmp_path / "cache")
    expected, _ = batches(files, None)
    assert_same(actual, expected)
    os.utime(path, ns=(0, 0))  # the size stays the same, the modification time changes
    _, again = batches(files, tmp_path / "cache")
    survived = counts["changed"] == again["changed"] == 1 and "damaged" not in counts
    tally("cached image whose file changed", 2, 2 * survived, "rebuilt and counted")
    assert survived
    path.unlink()
    with pytest.raises(ValueError, match=r"000005\.png: no such image file"):
        batches_unchecked(files, tmp_path / "cache")


def batches_unchecked(files, cache):
    dataset = load_coco(*files, check_images=False)
    buckets = make_buckets(dataset.sizes, canvases=[(64, 96)], min_size=64, max_size=96)
    return list(Loader(dataset, batch_size=4, buckets=buckets, mask_size=None, cache=cache).iterate(0, 3))


def test_flipped_bits_are_made_anew_or_told(files, tmp_path, tally):
    """After any bit flip in any file, the image is rebuilt and counted, or the error names the unusable cache."""
    expected, _ = batches(files, None)
    intact = tmp_path / "whole"
    batches(files, intact)
    names = [path.relative_to(intact) for path in intact.rglob("*") if path.is_file()]
    rng = np.random.default_rng(0)
    tried = rebuilt = refused = 0
    for name in names:
        for _ in range(-(-30 // len(names))):
            cache = tmp_path / f"cache{tried}"
            shutil.copytree(intact, cache)
            content = bytearray((cache / name).read_bytes())
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            (cache / name).write_bytes(content)
            tried += 1
            try:
                actual, counts = batches(files, cache)
            except OSError as error:
                assert f"The cache {cache} cannot be used" in str(error) and "delete it" in str(error)
                refused += 1
            else:
                assert_same(actual, expected)
                rebuilt += counts.get("damaged", 0) + counts.get("added", 0) > 0
    tally("flipped bit in the image cache", tried, tried, "image rebuilt and counted, or cache refused by name")
    assert rebuilt > 3 and refused > 0


SCRIPT = """
    import os, sys, threading
    from pathlib import Path
    from detectax_eqx.data import Loader, _cache, load_coco, make_buckets
    annotations, images, cache, die = sys.argv[1:]
    _cache.PART = 3 * 64 * 96 * 3
    commit, commits = _cache.ImageCache._commit, []
    def count(self):
        if len(commits) == int(die) > 0:
            threading.Timer(0.002, os.kill, (os.getpid(), 9)).start()
        commit(self)
        commits.append(1)
    _cache.ImageCache._commit = count
    dataset = load_coco(annotations, images)
    buckets = make_buckets(dataset.sizes, canvases=[(64, 96)], min_size=64, max_size=96)
    loader = Loader(dataset, batch_size=4, buckets=buckets, mask_size=None, cache=cache)
    for _ in loader.iterate(0, 3): pass
    if int(die): os.kill(os.getpid(), 9)
    print(sorted(loader.cache_counts.items()))
"""


def build_elsewhere(files, cache, die=0):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, files), str(cache), str(die)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_it_is_built_and_built_by_two(files, tmp_path, tally):
    expected, _ = batches(files, None)
    killed = build_elsewhere(files, tmp_path / "killed", die=2)
    both = [build_elsewhere(files, tmp_path / "both") for _ in range(2)]
    for process in (killed, *both):
        output, errors = process.communicate()
        assert process.returncode == (-signal.SIGKILL if process is killed else 0), output + errors
    actual, counts = batches(files, tmp_path / "killed")
    assert_same(actual, expected)
    survived = "damaged" not in counts and 0 < counts["added"] < IMAGES
    tally("kill -9 while the image cache is built", 1, survived, "the rest is added")
    assert survived, counts
    actual, counts = batches(files, tmp_path / "both")
    assert_same(actual, expected)
    tally("two processes build one image cache", 1, counts == {"found": 3 * IMAGES}, "both go on, all images are there")
    assert counts == {"found": 3 * IMAGES}


def test_a_cache_that_cannot_be_written_is_told(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"The cache .*file cannot be used: .* Free up space or choose another folder"):
        batches(files, tmp_path / "file")
    cache = tmp_path / "cache"
    batches(files, cache)
    damaged = [path for path in cache.rglob("*") if path.is_file() and path.name.startswith("manifest")]
    for path in damaged:
        path.write_bytes(b"no manifest")
    with pytest.raises(OSError, match=r"The cache .*cache cannot be used: .* delete it: it will be rebuilt"):
        batches(files, cache)


def test_parts_are_of_bounded_size(files, tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "PART", 3 * 64 * 96 * 3)
    parts = []
    commit = _cache.ImageCache._commit
    monkeypatch.setattr(_cache.ImageCache, "_commit", lambda self: parts.append(self._part_size) or commit(self))
    _, counts = batches(files, tmp_path / "cache")
    assert counts["added"] == IMAGES and len(parts) == 4 and max(parts) <= 3 * (64 * 96 * 3 + _cache.HEADER)


@pytest.mark.long
def test_reading_is_quicker_than_decoding(tmp_path, tally):
    """Alternates whole passes with and without the cache; the work besides images is small."""
    files = write_shapes_dataset(tmp_path / "data", num_images=120, image_size=(480, 640), suffix=".jpg")
    dataset = load_coco(*files)
    buckets = make_buckets(dataset.sizes)
    options = {"batch_size": 4, "buckets": buckets, "mask_size": None, "max_objects": 6}
    plain, cached = Loader(dataset, **options), Loader(dataset, cache=tmp_path / "cache", **options)
    rates = {plain: [], cached: []}
    for repeat in range(4):
        for loader, speeds in rates.items():
            began = time.perf_counter()
            for _ in loader.iterate(30 * repeat, 30 * repeat + 30):
                pass
            speeds.append(120 / (time.perf_counter() - began))
    decoding, reading = (statistics.median(speeds[1:]) for speeds in rates.values())  # the first pass fills the cache
    assert cached.cache_counts == {"added": 120, "found": 360}
    figures = f"{reading:.0f} images/s, decoding {decoding:.0f}, filling it {rates[cached][0]:.0f}"
    tally("images of 480×640 from the cache", 360, 360, figures)
    assert reading > decoding
