"""Datasets in the YOLO format: what is read, what is rejected by file and line, and COCO files of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

from detectax_eqx import data
from detectax_eqx.data import DatasetError, load_yolo


ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 40, 20
TRIANGLE = "0 .25 .5 .75 .5 .5 1"


def write(folder, labels=None, about=None, images="images/train"):
    """A dataset of two images; the second has no objects, unless `labels` say so. Returns its data.yaml."""
    labels = {"a": "1 .5 .5 .5 1\n\n" + TRIANGLE} if labels is None else labels
    place = folder / images
    place.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(place / f"{name}.png")
    target = folder / images.replace("images", "labels")
    target.mkdir(parents=True, exist_ok=True)
    for name, text in labels.items():
        (target / f"{name}.txt").write_text(text)
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"train": images, "names": ["cat", "dog"]} | (about or {})))
    return file


def test_boxes_and_polygons(tmp_path):
    dataset = load_yolo(write(tmp_path))
    assert [image.file for image in dataset.images] == ["a.png", "b.png"]
    assert dataset.sizes == ((HEIGHT, WIDTH),) * 2
    assert [(category.id, category.name) for category in dataset.categories] == [(0, "cat"), (1, "dog")]
    objects = dataset.objects(0)
    np.testing.assert_array_equal(objects.boxes, [[10, 0, 30, 20], [10, 10, 30, 20]])
    assert objects.labels.tolist() == [1, 0] and objects.annotation_ids == (1, 2)
    assert objects.segmentations[0] is None
    polygons = objects.segmentations[1]
    assert isinstance(polygons, tuple)
    np.testing.assert_array_equal(polygons[0], [[10, 10], [30, 10], [20, 20]])
    assert len(dataset.objects(1).labels) == 0 and str(dataset.report) == "nothing to repair"


@pytest.mark.parametrize(
    "about",
    [
        {"path": "."},
        {"path": "/nowhere/else"},  # where the dataset was made
        {"train": ["images/train"]},
        {"train": "../images/train"},  # as Roboflow writes
        {"train": "list.txt"},
        {"names": {1: "dog", 0: "cat"}, "nc": 2},
        {"train": None, "val": "images/train"},
    ],
    ids=str,
)
def test_places_of_images(about, tmp_path):
    (tmp_path / "list.txt").write_text("./images/train/a.png\nimages/train/b.png\n")
    split = "val" if "val" in about else "train"
    dataset = load_yolo(write(tmp_path, about=about), split)
    assert [image.file for image in dataset.images] == ["a.png", "b.png"]
    assert [category.name for category in dataset.categories] == ["cat", "dog"]


def test_classes_may_have_gaps_and_photographs_may_lie_on_their_side(tmp_path):
    file = write(tmp_path, labels={"a": "7 .5 .5 .5 .5"}, about={"names": {3: "cat", 7: "dog"}})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images/train/a.png", exif=exif)
    dataset = load_yolo(file)
    assert dataset.category_ids == (3, 7) and dataset.sizes[0] == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(dataset.objects(0).boxes, [[5, 10, 15, 30]])


REFUSED = {
    "a word": ("dog .5 .5 .5 .5", r"wrong label: line 1 of .*a\.txt is 'dog"),
    "four numbers": ("0 .5 .5 .5", r"line 1 of .*a\.txt is .* Make it \"class cx cy w h\""),
    "a point and a half": ("\n0 .1 .1 .2 .1 .2 .2 .3", r"wrong label: line 2 of"),
    "not finite": ("0 nan .5 .5 .5", "wrong label"),
    "a class beyond the names": ("2 .5 .5 .5 .5", r"unknown class: line 1 .* add class 2 to \"names\""),
    "half a class": ("0.5 .5 .5 .5 .5", "unknown class"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_wrong_lines(text, message, tmp_path):
    with pytest.raises(DatasetError, match=message) as raised:
        load_yolo(write(tmp_path, labels={"a": text}))
    assert "image 1 (a.png)" in str(raised.value)


def test_boxes_are_checked_as_those_of_coco(tmp_path):
    dataset = load_yolo(write(tmp_path, labels={"a": "0 .9 .5 .4 .5\n0 .5 .5 0 .5\n0 .5 .5 .5 .5"}))
    assert dataset.report.counts == {"box partly outside": 1, "box of no area": 1}
    np.testing.assert_array_equal(dataset.objects(0).boxes[0], [28, 5, 40, 15])
    pixels = "\n".join(f"0 {20 + i} 10 8 6" for i in range(6))
    with pytest.raises(DatasetError, match="format"):
        load_yolo(write(tmp_path / "pixels", labels={"a": pixels}))


ABOUT = {
    "no names": ({"names": None}, r'"names" is None'),
    "names by name": ({"names": {"cat": 0}}, r"\"names\" is \{'cat': 0\}"),
    "another count": ({"nc": 3}, r'"nc" is 3, but there are 2 "names"'),
    "a missing folder": ({"train": "pictures"}, "there is no .*pictures"),
    "a number": ({"train": 3}, r'"train" is 3'),
    "no such split": ({"train": None, "val": "images/train"}, r"has no \"train\"\. .* choose one of \['val'\]"),
    "poses": ({"kpt_shape": [17, 3]}, "Poses are read from COCO files only"),
}


@pytest.mark.parametrize("about, message", ABOUT.values(), ids=ABOUT)
def test_wrong_descriptions(about, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        load_yolo(write(tmp_path, about=about))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.yaml: no such file"):
        load_yolo(tmp_path / "none.yaml")
    (tmp_path / "data.yaml").write_text("names: [cat")
    with pytest.raises(DatasetError, match="cannot be read as YAML"):
        load_yolo(tmp_path / "data.yaml")
    (tmp_path / "data.yaml").write_text("!!python/object/apply:os.system ['false']")
    with pytest.raises(DatasetError, match="cannot be read as YAML"):
        load_yolo(tmp_path / "data.yaml")
    with pytest.raises(DatasetError, match="no image of train has a label file"):
        load_yolo(write(tmp_path / "unlabelled", labels={}))
    file = write(tmp_path / "damaged")
    (file.parent / "images/train/b.png").write_bytes(b"no image")
    (file.parent / "labels/train/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"b\.png: cannot be read as an image") as raised:
        load_yolo(file)
    assert "unreadable labels" in str(raised.value)


def test_coco_files_hold_the_same_dataset(tmp_path):
    dataset = load_yolo(write(tmp_path))
    data.write_coco(dataset, tmp_path / "train.json", tmp_path)
    copy = data.load_coco(tmp_path / "train.json", tmp_path)
    assert copy.images == dataset.images and copy.categories == dataset.categories
    for position in range(2):
        one, other = dataset.objects(position), copy.objects(position)
        for name in ("boxes", "labels", "crowd", "annotation_ids", "boxes_xywh", "areas"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    ours, theirs = (one.objects(0).segmentations[1] for one in (copy, dataset))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"a\.png is not in .*labels"):
        data.write_coco(dataset, tmp_path / "other.json", tmp_path / "labels")
    assert not (tmp_path / "other.json").exists()


def test_coco_files_keep_crowds_areas_and_keypoints(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    crowd = {"bbox": [0, 0, 2, 2], "iscrowd": 1, "segmentation": {"size": [2, 4], "counts": [0, 4, 4]}}
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 4, "height": 2}],
        "annotations": [
            {"id": 3, "image_id": 5, "category_id": 9, "area": 3.5, **crowd},
            {"id": 8, "image_id": 5, "category_id": 9, "bbox": [1, 0, 2, 1], "keypoints": [1.5, 0.5, 2, 0, 0, 0]},
        ],
        "categories": [{"id": 9, "name": "cat", "keypoints": ["head", "tail"], "skeleton": [[1, 2]]}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    dataset = data.load_coco(tmp_path / "one.json", tmp_path)
    data.write_coco(dataset, tmp_path / "two.json", tmp_path)
    copy = data.load_coco(tmp_path / "two.json", tmp_path)
    one, other = dataset.objects(0), copy.objects(0)
    assert copy.categories == dataset.categories and str(copy.report) == "nothing to repair"
    for name in ("boxes", "crowd", "annotation_ids", "areas", "keypoints"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.segmentations == other.segmentations


def test_command(tmp_path):
    file = write(tmp_path)
    words = [sys.executable, ROOT / "experiments/convert_dataset.py", file, tmp_path / "train.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "2 images, 2 objects; nothing to repair" in " ".join(done.stdout.split())
    assert len(data.load_coco(tmp_path / "train.json", tmp_path)) == 2
    failed = subprocess.run([*words, "--split", "test"], capture_output=True, text=True)
    assert failed.returncode and 'has no "test"' in failed.stderr and "Traceback" not in failed.stderr
