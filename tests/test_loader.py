"""The loader uses every image equally often, makes batch k deterministic, and leaves no threads behind."""

import json
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from detectax_eqx.data import DatasetError, Loader, _fill, eval_batches, load_coco, make_buckets, write_shapes_dataset
from detectax_eqx.data._order import BatchOrder


DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = {"canvases": [(64, 96), (96, 64)], "min_size": 64, "max_size": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(folder):
    """13 images, 9 wide and 4 tall: some without objects, one with only a crowd, one with a crowd and other objects."""
    (folder / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "thing"}]}
    rng = np.random.default_rng(0)
    for i in range(13):
        height, width = (60 - i, 90) if i < 9 else (80, 50)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        content["images"].append({"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width})
        for j in range(i % 5):
            polygon = [5 + j, 5, 30, 5, 30, 25 + j, 5 + j, 25 + j]
            content["annotations"].append(
                {"image_id": 100 + i, "category_id": 4, "bbox": [5 + j, 5, 25 - j, 20 + j], "segmentation": [polygon]}
            )
    for position, annotation in enumerate(content["annotations"]):
        annotation |= {"id": position + 1, "iscrowd": int(annotation["image_id"] in (101, 108) and position % 3 == 0)}
    (folder / "train.json").write_text(json.dumps(content))
    return load_coco(folder / "train.json", folder / "images")


@pytest.fixture
def buckets(dataset):
    return make_buckets(dataset.sizes, **SMALL)


def _same(a, b):
    assert a.images.canvas == b.images.canvas
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("detectax-data")]


def test_rows_are_those_of_the_whole_batch(dataset, buckets):
    """The rows of two processes together make up the batch, in any order."""
    options = {"batch_size": 4, "buckets": buckets, "max_objects": 3, "mask_size": 14, "seed": 5}
    whole = Loader(dataset, **options)
    parts = [Loader(dataset, rows=rows, **options) for rows in ([0, 2], np.array([3, 1]))]
    for k in (0, 3, 6):
        joined = jax.tree.map(lambda *x: np.concatenate(x)[[0, 3, 1, 2]], *(part.batch(k) for part in parts))
        _same(joined, whole.batch(k))
    assert parts[0].steps_per_epoch == whole.steps_per_epoch
    for wrong in ([], [4], [-1, 0]):
        with pytest.raises(ValueError, match=r"rows must be some of 0\.\.3"):
            Loader(dataset, rows=wrong, **options)


def test_shards_of_evaluation_hold_every_image_once(dataset, buckets):
    def images(**options):
        batches = eval_batches(dataset, batch_size=2, buckets=buckets, **options)
        return [int(i) for images in batches for i in images.indices[images.valid]]

    shards = [images(shard=(i, 3)) for i in range(3)]
    assert sorted(i for shard in shards for i in shard) == sorted(images()) == list(range(13))
    assert all(shards)
    for wrong in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="shard must be"):
            eval_batches(dataset, batch_size=2, buckets=buckets, shard=wrong)


def test_a_batch_holds_the_images_and_their_objects(dataset, buckets):
    loader = Loader(dataset, batch_size=4, buckets=buckets, max_objects=3, mask_size=14)
    seen = set()
    for k in range(8):
        batch = loader.batch(k)
        images = batch.images
        bucket = next(bucket for bucket in buckets if bucket.canvas == images.canvas)
        assert images.pixels.shape == (4, *bucket.source, 3) and images.valid.all()
        for slot, index in enumerate(images.indices.tolist()):
            seen.add(index)
            assert index in bucket.indices
            pixels = np.asarray(Image.open(dataset.images[index].path))
            height, width = pixels.shape[:2]
            np.testing.assert_array_equal(images.pixels[slot, :height, :width], pixels)
            assert not images.pixels[slot, height:].any() and not images.pixels[slot, :, width:].any()
            assert images.sizes[slot].tolist() == images.original_sizes[slot].tolist() == [height, width]
            objects, targets = dataset.objects(index), batch.targets
            boxes = objects.boxes[~objects.crowd]
            number = min(3, len(boxes))
            assert batch.overflow[slot] == len(boxes) - number
            assert targets.valid[slot].tolist() == [row < number for row in range(3)]
            np.testing.assert_array_equal(targets.boxes[slot, :number], boxes[:number])
            assert targets.mask_boxes is not None and targets.masks is not None
            np.testing.assert_array_equal(targets.mask_boxes[slot], targets.boxes[slot])
            assert (targets.masks[slot, :number] == 255).all()  # these objects fill their boxes
            assert not targets.masks[slot, number:].any() and not targets.boxes[slot, number:].any()
    assert seen == set(range(13))


def test_masks_are_optional(dataset, buckets):
    targets = Loader(dataset, batch_size=2, buckets=buckets, mask_size=None).batch(0).targets
    assert targets.masks is None and targets.mask_boxes is None


def test_batches_depend_on_seed_and_number_alone(dataset, buckets):
    options = {"batch_size": 3, "buckets": buckets, "mask_size": 7, "max_objects": 5}
    one, four = Loader(dataset, num_threads=1, **options), Loader(dataset, num_threads=4, prefetch=5, **options)
    batches = dict(one.iterate(0, 14))
    assert list(batches) == list(range(14))
    for (k, batch), direct in zip(four.iterate(4, 14), range(4, 14), strict=True):
        assert k == direct
        _same(batch, batches[k])
    _same(Loader(dataset, **options).batch(11), batches[11])
    other = Loader(dataset, seed=1, **options)
    indices = [batch.images.indices.tolist() for batch in batches.values()]
    assert [other.batch(k).images.indices.tolist() for k in range(4)] != indices[:4]
    orders = [indices[start : start + 4] for start in (0, 4)]
    assert orders[0] != orders[1]


def test_batches_draw_their_canvases(dataset, buckets):
    """The same from anywhere, each about equally often, and another order with another seed; the images stay."""
    canvases, new = [(64, 64), (96, 96), (128, 128)], partial(Loader, dataset, batch_size=3, mask_size=7)
    loader, plain = (new(buckets=buckets, canvases=x) for x in (canvases, ()))
    drawn = [batch.images.canvas for _, batch in loader.iterate(0, 60)]
    assert drawn[40:50] == [loader.batch(k).images.canvas for k in range(40, 50)]
    assert min(Counter(drawn)[canvas] for canvas in canvases) > 10
    other = new(buckets=buckets, canvases=canvases, seed=1)
    assert [other.batch(k).images.canvas for k in range(20)] != drawn[:20]
    for k in range(5):
        one, same = loader.batch(k).images, plain.batch(k).images
        np.testing.assert_array_equal(one.indices, same.indices)
        np.testing.assert_array_equal(one.pixels, same.pixels)


@pytest.mark.parametrize("sizes, batch_size", [((9, 4), 4), ((9, 4), 3), ((1, 40), 8), ((2,), 16), ((5, 7, 1), 5)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_image_is_used_equally_often(sizes, batch_size, shuffle):
    ends = np.cumsum(sizes).tolist()
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    order = BatchOrder(groups, batch_size=batch_size, seed=3, shuffle=shuffle)
    passes = 3 * batch_size  # a whole number of batches for every group
    batches = [order(k) for k in range(passes * ends[-1] // batch_size)]
    assert all(set(images.tolist()) <= set(groups[group]) and len(images) == batch_size for group, images in batches)
    counts = Counter(image for _, images in batches for image in images.tolist())
    assert counts == dict.fromkeys(range(ends[-1]), passes)
    # Also at any moment, except for the order of batches within a pass and a batch that spans two passes.
    for stop in range(1, len(batches), 5):
        counts = Counter(image for _, images in batches[:stop] for image in images.tolist())
        for group in groups:
            uses = [counts[image] for image in group]
            assert max(uses) - min(uses) <= 2
    fresh = BatchOrder(groups, batch_size=batch_size, seed=3, shuffle=shuffle)
    last = len(batches) - 1
    np.testing.assert_array_equal(fresh(last)[1], batches[last][1])
    assert order.steps_per_epoch == max(1, int(ends[-1] / batch_size + 0.5))


def test_each_pass_has_an_order_of_its_own():
    order = BatchOrder([list(range(40))], batch_size=4, seed=0, shuffle=True)
    first, second = ({frozenset(order(k)[1].tolist()) for k in range(start, start + 10)} for start in (0, 10))
    assert len(first & second) < 2


def test_buckets_are_mixed_and_order_is_kept_without_shuffle():
    groups = [list(range(0, 200, 2)), list(range(1, 200, 2))]
    mixed = [BatchOrder(groups, batch_size=4, seed=0, shuffle=True)(k)[0] for k in range(50)]
    assert 5 < sum(a != b for a, b in pairwise(mixed)) < 45
    plain = BatchOrder(groups, batch_size=4, seed=0, shuffle=False)
    assert plain(0)[1].tolist() == [0, 2, 4, 6] and plain(1)[1].tolist() == [1, 3, 5, 7]


def test_empty_images_can_be_left_out(dataset, buckets):
    loader = Loader(dataset, batch_size=1, buckets=buckets, mask_size=None, drop_empty=True)
    used = {int(loader.batch(k).images.indices[0]) for k in range(2 * loader.steps_per_epoch)}
    assert used == {i for i in range(13) if (~dataset.objects(i).crowd).any()} and 0 not in used


def test_oversized_images_are_shrunk_with_their_boxes(dataset):
    buckets = make_buckets(dataset.sizes, **SMALL, max_source=32)
    loader = Loader(dataset, batch_size=4, buckets=buckets, mask_size=7)
    batch = next(batch for _, batch in loader.iterate() if 4 in batch.images.indices)
    images = batch.images
    slot = images.indices.tolist().index(4)
    assert images.pixels.shape == (4, 32, 32, 3)
    assert images.original_sizes[slot].tolist() == [56, 90] and images.sizes[slot].tolist() == [19, 32]
    expected = dataset.objects(4).boxes * np.array([32 / 90, 19 / 56] * 2, np.float32)
    np.testing.assert_allclose(batch.targets.boxes[slot, :4], expected, rtol=1e-6)
    noise = np.asarray(Image.open(dataset.images[4].path), np.float64)
    assert images.pixels[slot, :19, :32].std() < 0.6 * noise.std()  # averaged, not subsampled
    assert not images.pixels[slot, 19:].any()


def test_evaluation_sees_every_image_once(dataset, buckets):
    batches = list(eval_batches(dataset, batch_size=4, buckets=buckets))
    assert [images.valid.tolist() for images in batches] == [[True] * 4] * 2 + [[True] + [False] * 3] + [[True] * 4]
    assert sorted(i for b in batches for i in b.indices[b.valid].tolist()) == list(range(13))
    filler = batches[2]
    assert not filler.pixels[1:].any() and (filler.sizes > 0).all()
    assert not _threads()


def test_threads_end_with_the_iterator(dataset, buckets):
    loader = Loader(dataset, batch_size=2, buckets=buckets, mask_size=7)
    batches = loader.iterate()
    assert not _threads()
    next(batches)
    assert _threads()
    batches.close()
    assert not _threads()
    with pytest.raises(KeyboardInterrupt):
        for _ in loader.iterate():
            raise KeyboardInterrupt
    assert not _threads()
    assert list(loader.iterate(5, 5)) == []


def test_reads_ahead_by_no_more_than_it_may(dataset, buckets, monkeypatch):
    loader, made = Loader(dataset, batch_size=2, buckets=buckets, mask_size=7, prefetch=3), []
    empty = loader._empty
    monkeypatch.setattr(loader, "_empty", lambda k: made.append(k) or empty(k))
    for k, _ in loader.iterate(0, 20):
        assert max(made) == min(k + 3, 19)


def test_damage_found_while_reading_names_the_image(tmp_path):
    annotations, images = write_shapes_dataset(tmp_path, num_images=4, seed=0)
    dataset = load_coco(annotations, images)
    buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    path = images / "000003.png"
    path.write_bytes(path.read_bytes()[:2000])
    loader = Loader(dataset, batch_size=2, buckets=buckets, shuffle=False, mask_size=None)
    with pytest.raises(DatasetError, match=r"000003\.png"):
        loader.batch(1)
    batches = loader.iterate()
    assert next(batches)[0] == 0
    with pytest.raises(DatasetError, match=r"000003\.png"):
        next(batches)
    assert not _threads()


@pytest.fixture
def damaged(tmp_path):
    """Nine images, two of which cannot be read: the third is not an image, and the seventh is truncated."""
    annotations, images = write_shapes_dataset(tmp_path, num_images=9, seed=0)
    dataset = load_coco(annotations, images)
    (images / "000003.png").write_text("no image")
    path = images / "000007.png"
    path.write_bytes(path.read_bytes()[:2000])
    return dataset, make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)


def test_bad_images_are_left_out_up_to_a_limit(damaged, tally):
    dataset, buckets = damaged
    options = {"batch_size": 3, "buckets": buckets, "mask_size": 7, "max_objects": 6}
    loader = Loader(dataset, max_bad_images=2, **options)
    batches = dict(loader.iterate(0, 9))
    for batch in batches.values():
        valid, pixels = batch.images.valid, batch.images.pixels
        np.testing.assert_array_equal(valid, ~np.isin(batch.images.indices, [2, 6]))
        assert not pixels[~valid].any() and not batch.targets.valid[~valid].any()
        assert pixels[valid].any((1, 2, 3)).all() and batch.targets.valid[valid].any(1).all()
    assert sum(int((~batch.images.valid).sum()) for batch in batches.values()) == 6  # each of the three passes has both
    first, second = map(str, loader.bad_images)  # each reported once
    assert {"000003.png" in first, "000007.png" in first} == {"000003.png" in second, "000007.png" in second}
    # The batches do not depend on the number of threads or on the first batch.
    for k, batch in Loader(dataset, max_bad_images=2, num_threads=4, prefetch=4, **options).iterate(4, 9):
        _same(batch, batches[k])
    _same(Loader(dataset, max_bad_images=5, **options).batch(7), batches[7])
    with pytest.raises(DatasetError, match=r"(?s)More images than max_bad_images=1 .*00000[37]\.png.*00000[37]\.png"):
        list(Loader(dataset, max_bad_images=1, **options).iterate(0, 9))
    tally("image damaged amid training", 2, 2, "left out and counted up to a limit, then an error that lists them")


def test_an_error_in_a_thread_names_the_image(dataset, buckets, monkeypatch):
    """Any exception names the image. The image itself is not at fault, so none is left out."""

    def fail(segmentation, box, *, size):
        raise ZeroDivisionError("of a new kind")

    monkeypatch.setattr(_fill, "mask_in_box", fail)
    with pytest.raises(DatasetError, match=r"\d\.png: image 1\d\d cannot be converted to an example: of a new kind"):
        list(Loader(dataset, batch_size=2, buckets=buckets, max_bad_images=9).iterate(0, 6))


def test_evaluation_leaves_no_image_out(damaged):
    dataset, buckets = damaged
    with pytest.raises(DatasetError, match=r"000003\.png"):
        list(eval_batches(dataset, batch_size=2, buckets=buckets))


MEMORY = """
    import sys
    from detectax_eqx.data import Loader, load_coco, make_buckets
    annotations, images, cache, count = sys.argv[1:]
    dataset = load_coco(annotations, images)
    buckets = make_buckets(dataset.sizes, canvases=[(320, 320)], min_size=320, max_size=320)
    loader = Loader(dataset, batch_size=10, buckets=buckets, max_objects=6, cache=cache or None)
    for k, batch in loader.iterate(0, int(count) // 10):
        if (k + 1) % (int(count) // 100) == 0:
            status = open("/proc/self/status").read()
            print(status.split("VmRSS:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "count, cached", [(500, False), *[pytest.param(10_000, cached, marks=pytest.mark.long) for cached in (False, True)]]
)
@pytest.mark.timeout(900)
def test_memory_is_flat(tmp_path, count, cached, tally):
    """Compares resident memory after 30 % of the images with the maximum afterwards."""
    size = (320, 320) if count == 10_000 else (128, 128)
    files = write_shapes_dataset(tmp_path, num_images=50, seed=0, image_size=size, suffix=".jpg")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(MEMORY),
        *files,
        str(tmp_path / "cache" if cached else ""),
        str(count),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    megabytes = [int(kilobytes) / 1024 for kilobytes in done.stdout.split()]
    assert len(megabytes) == 10
    growth = max(megabytes[3:]) - megabytes[2]
    if count == 10_000:
        what = "memory over 10,000 images" + " from the cache" * cached
        tally(what, 1, growth < 10, f"{megabytes[2]:.0f} MB after 3,000, then {growth:+.1f} MB at most")
    assert growth < 10, megabytes


def test_masks_cannot_be_made_of_boxes(dataset, buckets, folder):
    content = json.loads((folder / "train.json").read_text())
    del content["annotations"][2]["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))
    boxes = load_coco(folder / "boxes.json", folder / "images")
    with pytest.raises(DatasetError, match=r"boxes\.json: image 102 \(2\.png\), annotation 3: .*mask_size=None"):
        Loader(boxes, batch_size=2, buckets=buckets)
    assert Loader(boxes, batch_size=2, buckets=buckets, mask_size=None).batch(0).targets.masks is None


MISTAKES = [
    ({"batch_size": 0}, "batch_size"),
    ({"max_objects": 0}, "max_objects"),
    ({"mask_size": 0}, "mask_size"),
    ({"num_threads": 0}, "num_threads"),
    ({"prefetch": 0}, "prefetch"),
    ({"seed": -1}, "seed"),
    ({"max_bad_images": -1}, "max_bad_images"),
    ({"buckets": ()}, "do not match this dataset"),
    ({"canvases": [(64, 64), (0, 64)]}, "canvases must hold positive sizes"),
    ({"buckets": make_buckets([(5, 5)])}, "do not match this dataset"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_mistakes(dataset, buckets, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(dataset, **({"batch_size": 2, "buckets": buckets} | options))
    with pytest.raises(ValueError, match="k must not be negative"):
        Loader(dataset, batch_size=2, buckets=buckets).batch(-1)


def test_nothing_left(tmp_path):
    annotations, images = write_shapes_dataset(tmp_path, num_images=1)
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    dataset = load_coco(annotations, images)
    buckets = make_buckets(dataset.sizes)
    assert not Loader(dataset, batch_size=2, buckets=buckets).batch(0).targets.valid.any()
    with pytest.raises(ValueError, match="no image is left"):
        Loader(dataset, batch_size=2, buckets=buckets, drop_empty=True)


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
def test_coco_without_and_with_masks():
    dataset = load_coco(
        DATA / "coco-mini/annotations/instances_val2017.json", DATA / "coco-mini/val2017", check_images=False
    )
    loader = Loader(dataset, batch_size=1, buckets=make_buckets(dataset.sizes), mask_size=14, max_objects=20)
    objects, shares = 0, []
    for _, batch in loader.iterate(0, loader.steps_per_epoch):
        objects += int(batch.targets.valid.sum() + batch.overflow.sum())
        assert batch.targets.masks is not None
        shares += (batch.targets.masks[batch.targets.valid].mean((1, 2)) / 255).tolist()
    assert 0.3 < np.median(shares) < 0.9  # share of the box that an object fills
    assert objects == sum(int((~dataset.objects(i).crowd).sum()) for i in range(len(dataset)))
