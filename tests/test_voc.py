"""Datasets in the format of Pascal VOC: what is read, and that everything else is rejected by file and object."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data
from detectax_eqx.data import DatasetError, load_voc


ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 40, 20
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def thing(name, *box, more=""):
    sides = "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


WHOLE, DIFFICULT = thing("dog", 1, 1, WIDTH, HEIGHT), thing("cat", 3, 2, 7, 5, more="<difficult>1</difficult>")
FILES = {"a": SIZE + WHOLE + DIFFICULT, "b": SIZE}


def write(folder, files=None, *, standard=True):
    """A dataset of two images. `standard`: in the folders of Pascal VOC."""
    images, annotations = (folder / name if standard else folder for name in ("JPEGImages", "Annotations"))
    for place in (images, annotations):
        place.mkdir(parents=True, exist_ok=True)
    for name, text in (files or FILES).items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{name}.jpg")
        (annotations / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    if standard:
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("a\n")
        (lists / "dog_train.txt").write_text("b -1\na  1\n")
    return folder


@pytest.mark.parametrize("standard", [True, False], ids=["in its folders", "beside the images"])
def test_objects(standard, tmp_path):
    dataset = load_voc(write(tmp_path, standard=standard))
    assert [image.file for image in dataset.images] == ["a.jpg", "b.jpg"]
    assert [(category.id, category.name) for category in dataset.categories] == [(1, "cat"), (2, "dog")]
    objects = dataset.objects(0)
    np.testing.assert_array_equal(objects.boxes, [[0, 0, WIDTH, HEIGHT], [2, 1, 7, 5]])
    assert objects.labels.tolist() == [1, 0] and objects.crowd.tolist() == [False, True]
    assert objects.annotation_ids == (1, 2) and len(dataset.objects(1).labels) == 0


def test_images_of_subfolders_are_others(tmp_path):
    """Also those of the same name."""
    write(tmp_path, standard=False)
    write(tmp_path / "valid", {"a": SIZE}, standard=False)
    assert [image.path for image in load_voc(tmp_path).images] == [tmp_path / "a.jpg", tmp_path / "b.jpg"]


def test_lists_classes_and_the_first_pixel(tmp_path):
    write(tmp_path)
    assert [image.file for image in load_voc(tmp_path, "train").images] == ["a.jpg"]
    assert [image.file for image in load_voc(tmp_path, "dog_train").images] == ["b.jpg", "a.jpg"]
    dataset = load_voc(tmp_path, "train", classes=["dog", "bird", "cat"], first_pixel=0)
    assert dataset.objects(0).labels.tolist() == [0, 2] and dataset.num_classes == 3
    np.testing.assert_array_equal(dataset.objects(0).boxes[1], [3, 2, 8, 6])
    with pytest.raises(ValueError, match="first_pixel must be 0 or 1, got 2"):
        load_voc(tmp_path, first_pixel=2)
    with pytest.raises(DatasetError, match=r"val\.txt: no such list\. Choose one of \['train'\]"):
        load_voc(tmp_path, "val")


def test_a_size_that_is_not_written_is_that_of_the_image(tmp_path):
    empty = "<size><width>0</width><height>0</height></size>"
    assert load_voc(write(tmp_path, {"a": WHOLE, "b": empty})).sizes == ((HEIGHT, WIDTH),) * 2


REFUSED = {
    "no number": (thing("dog", 1, 1, "wide", 5), r"a\.xml\): wrong box: .* object 1 are \['1', '1', 'wide', '5'\]"),
    "not finite": (thing("dog", 1, 1, "nan", 5), "wrong box"),
    "no box": (WHOLE + "<object><name>dog</name></object>", "object 2 are"),
    "another size": ("<size><width>9</width><height>9</height></size>", "is 40×20 pixels, but annotated as 9×9"),
    "not XML": ("<object>", r"unreadable file: .*a\.xml: mismatched tag"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_wrong_files(text, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        load_voc(write(tmp_path, {"a": text, "b": SIZE + WHOLE}))


def test_missing_files_and_classes(tmp_path):
    write(tmp_path)
    with pytest.raises(DatasetError, match=r"object 1 is of 'dog', which is not among the classes \['cat'\]"):
        load_voc(tmp_path, classes=["cat"])
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"image 1 \(a\.xml\): missing file: there is no image of this name"):
        load_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\nc\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "JPEGImages" / "c.jpg")
    with pytest.raises(DatasetError, match=r"\(c\.xml\): missing file: there is no XML file of this name"):
        load_voc(tmp_path, "train")
    with pytest.raises(DatasetError, match="there are no XML files"):
        load_voc(tmp_path / "JPEGImages")


def test_command(tmp_path):
    words = [sys.executable, ROOT / "experiments/convert_dataset.py", write(tmp_path), tmp_path / "train.json"]
    done = subprocess.run([*words, "--split", "train"], capture_output=True, text=True, check=True)
    assert "1 images, 2 objects" in " ".join(done.stdout.split())
    assert data.load_coco(tmp_path / "train.json", tmp_path).objects(0).crowd.tolist() == [False, True]
    subprocess.run(words, capture_output=True, check=True)
    assert len(data.load_coco(tmp_path / "train.json", tmp_path)) == 2
