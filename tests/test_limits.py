"""What each limit removes from a dataset, reported before training starts."""

import json

import numpy as np
import pytest
from PIL import Image

from detectax_eqx.data import Loader, describe_limits, load_coco, make_buckets, source_limit

from . import tiny_train


def _load(folder, sizes, boxes):
    """A dataset of blank images of the given `(height, width)`, each with its boxes."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for id, (height, width) in enumerate(sizes, 1):
        Image.new("1", (width, height)).save(folder / "images" / f"{id}.png")
        images.append({"id": id, "file_name": f"{id}.png", "height": height, "width": width})
        for bbox in boxes[id - 1]:
            annotations.append({"id": len(annotations) + 1, "image_id": id, "category_id": 1, "bbox": bbox})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return load_coco(folder / "train.json", folder / "images")


def test_objects_beyond_the_capacity_are_counted(tmp_path):
    crowded = [[x, y, 4, 4] for x in range(0, 200, 5) for y in range(0, 125, 5)]  # 1,000 boxes
    dataset = _load(tmp_path, [(128, 256), (128, 256)], [crowded, crowded[:3]])
    sizes = {"min_size": 128, "max_size": 256}
    buckets = make_buckets(dataset.sizes, canvases=[(128, 256)], **sizes)
    limits = describe_limits(dataset, buckets=buckets, max_objects=100, **sizes)
    assert (limits.objects, limits.objects_dropped, limits.images_with_drops) == (1003, 900, 1)
    assert str(limits) == "max_objects=100 leaves out 900 of 1,003 objects, in 1 of 2 images"
    loader = Loader(dataset, batch_size=2, buckets=buckets, max_objects=100, mask_size=None)
    assert loader.batch(0).overflow.sum() == limits.objects_dropped
    assert str(describe_limits(dataset, buckets=buckets, max_objects=1000, **sizes)) == "no limit has an effect"
    assert describe_limits(dataset, buckets=buckets, **sizes).lines == ()


def test_the_source_follows_the_largest_canvas(tmp_path):
    """Images of 2000×3000 are read at full size if the canvas holds them, and shrunk if it is far smaller."""
    dataset = _load(tmp_path, [(2000, 3000), (300, 400)], [[], []])
    canvases, sizes = [(2048, 3072)], {"min_size": 2000, "max_size": 3072}
    buckets = make_buckets(dataset.sizes, canvases=canvases, max_source=source_limit(canvases), **sizes)
    assert buckets[0].source == (2016, 3008)
    assert describe_limits(dataset, buckets=buckets, **sizes).shrunk_on_reading == 0
    small, sizes = [(256, 384)], {"min_size": 256, "max_size": 384}
    buckets = make_buckets(dataset.sizes, canvases=small, max_source=source_limit(small), **sizes)
    assert buckets[0].source == (768, 768)
    limits = describe_limits(dataset, buckets=buckets, **sizes)
    assert limits.shrunk_on_reading == 1
    assert str(limits) == "1 of 2 images are larger than 768 pixels and are shrunk on reading"
    loader = Loader(dataset, batch_size=2, buckets=buckets, shuffle=False, mask_size=None)
    assert loader.batch(0).images.sizes.tolist() == [[512, 768], [300, 400]]


def test_images_that_no_canvas_holds_and_boxes_that_vanish(tmp_path):
    dataset = _load(tmp_path, [(100, 400), (64, 64)], [[[0, 0, 3, 50], [0, 0, 50, 50]], [[0, 0, 2, 2]]])
    sizes = {"min_size": 64, "max_size": 400}
    buckets = make_buckets(dataset.sizes, canvases=[(64, 96)], **sizes)  # the target size is 64×256, but 24×96 fits
    limits = describe_limits(dataset, buckets=buckets, **sizes)
    assert (limits.shrunk_to_fit, limits.below_a_pixel) == (1, 1)
    assert limits.lines == (
        "1 of 2 images do not fit any canvas at their target size and are shrunk further",
        "1 of 3 objects are less than a pixel wide or high",
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_fits_is_not_counted_as_shrunk(tmp_path, seed):
    sizes = [(int(height), int(width)) for height, width in np.random.default_rng(seed).integers(1, 300, (20, 2))]
    dataset = _load(tmp_path, sizes, [[]] * 20)
    resize = {"min_size": 64, "max_size": 96}
    buckets = make_buckets(dataset.sizes, canvases=[(64, 96), (96, 64), (96, 96)], **resize)
    assert describe_limits(dataset, buckets=buckets, **resize).lines == ()


def test_training_says_what_is_cut_before_its_first_step(tmp_path, capsys, monkeypatch):
    """Of an image with 1,000 objects, 900 are cut, and another image is larger than its source."""
    crowded = [[x, y, 4, 4] for x in range(0, 200, 5) for y in range(0, 125, 5)]
    _load(tmp_path, [(128, 256), (300, 200)], [crowded, []])

    def stop(*arguments, **options):
        raise SystemExit("before a model is built")

    monkeypatch.setattr(tiny_train.script, "complete", stop)
    options = tiny_train.grouped(
        train_annotations=str(tmp_path / "train.json"),
        train_images=str(tmp_path / "images"),
        output=tmp_path / "run",
        model="faster_rcnn_resnet18_fpn",
        norm="group",
        min_sizes=(64,),
        max_size=128,
        canvases=((64, 128),),
    )
    with pytest.raises(SystemExit, match="before a model is built"):
        tiny_train.script.main(options)
    text = " ".join(capsys.readouterr().out.split())
    assert "train.json: max_objects=100 leaves out 900 of 1,000 objects, in 1 of 2 images" in text
    assert "1 of 2 images are larger than 256 pixels and are shrunk on reading" in text
