"""Files from other tools: what is rejected, what is repaired, and what is reported."""

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from detectax_eqx.data import BoxFormat, DatasetError, load_coco, write_shapes_dataset


DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
FORMATS = get_args(BoxFormat)


def written_as(box_format, bbox, image):
    """Converts a box from COCO's format to another one."""
    x, y, width, height = bbox
    if box_format.startswith("normalized_"):
        x, y, width, height = x / image["width"], y / image["height"], width / image["width"], height / image["height"]
    return {
        "xywh": [x, y, width, height],
        "xyxy": [x, y, x + width, y + height],
        "cxcywh": [x + width / 2, y + height / 2, width, height],
    }[box_format.removeprefix("normalized_")]


def rewrite(annotations, box_format, target):
    """Writes the annotations to `target` with boxes in another format (and polygons, if it is a normalised one)."""
    content = json.loads(annotations.read_text())
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        annotation["bbox"] = written_as(box_format, annotation["bbox"], image)
        if box_format.startswith("normalized_") and isinstance(annotation.get("segmentation"), list):
            unit = np.array([image["width"], image["height"]])
            annotation["segmentation"] = [
                (np.reshape(polygon, (-1, 2)) / unit).ravel().tolist() for polygon in annotation["segmentation"]
            ]
    target.write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """About fifty shapes in images 160 pixels wide and 128 high."""
    folder = tmp_path_factory.mktemp("shapes")
    return write_shapes_dataset(folder, num_images=12, seed=0, image_size=(128, 160))


def check_formats(annotations, images, folder, *, boxes_of):
    """Each format is read under its own name. Under another, the error message names the right one."""
    expected = load_coco(annotations, images, check_images=False)
    for box_format in FORMATS:
        file = rewrite(annotations, box_format, folder / "other.json")
        dataset = load_coco(file, images, check_images=False, box_format=box_format)
        for index in boxes_of(expected):
            np.testing.assert_allclose(dataset.objects(index).boxes, expected.objects(index).boxes, atol=1e-3)
        assert dataset.report.counts.keys() <= expected.report.counts.keys() | {"box partly outside"}
        for other in FORMATS:
            if other == box_format:
                continue
            with pytest.raises(DatasetError, match=rf'another format.*(?s:.)*"{box_format}".*--box-format') as caught:
                load_coco(file, images, check_images=False, box_format=other)
            assert [problem.kind for problem in caught.value.problems] == ["boxes in another format"]


def test_boxes_of_every_format(shapes, tmp_path):
    annotations, images = shapes
    check_formats(annotations, images, tmp_path, boxes_of=lambda dataset: range(len(dataset)))


@needs_data
@pytest.mark.parametrize(
    "file, images", [("bccd/val.json", "bccd/images"), ("coco-mini/annotations/instances_val2017.json", "coco-mini")]
)
def test_boxes_of_every_format_in_photographs(file, images, tmp_path):
    check_formats(DATA / file, DATA / images, tmp_path, boxes_of=lambda dataset: range(0, len(dataset), 7))


BAD = [None, "x", [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, 10**400], [1, 2, 3, math.nan], [1, 2, 3, math.inf], {"a": 1}]


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize("field", ["bbox", "area", "segmentation"])
@pytest.mark.parametrize("value", BAD, ids=str)
def test_wrong_values_are_refused_in_every_format(tmp_path, box_format, field, value):
    content = _one_image(tmp_path, [[0.1, 0.1, 0.5, 0.5]])
    content["annotations"][0][field] = value
    if field == "segmentation" and value in (None, []):
        assert len(_load(tmp_path, content, box_format=box_format)) == 1
        return
    with pytest.raises(DatasetError, match="annotation 1: "):
        _load(tmp_path, content, box_format=box_format)


def test_polygons_of_fractions(shapes, tmp_path):
    annotations, images = shapes
    file = rewrite(annotations, "normalized_cxcywh", tmp_path / "other.json")
    expected = load_coco(annotations, images).objects(3).segmentations
    found = load_coco(file, images, box_format="normalized_cxcywh").objects(3).segmentations
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, tuple) and isinstance(theirs, tuple)
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-9)


def test_the_message_says_what_it_looks_like(shapes, tmp_path):
    file = rewrite(shapes[0], "xyxy", tmp_path / "corners.json")
    with pytest.raises(DatasetError) as caught:
        load_coco(file, shapes[1])
    text = str(caught.value)
    assert 'not a valid "bbox" as [x, y, width, height] in pixels' in text and "[x0, y0, x1, y1] in pixels" in text
    assert 'Pass box_format="xyxy" (--box-format on the command line), or convert them.' in text


def _one_image(folder, boxes, **image):
    """A dataset of one image, 100 pixels wide and 80 high, with these boxes."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (100, 80)).save(folder / "images" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80} | image],
        "annotations": [{"id": id, "image_id": 1, "category_id": 1, "bbox": bbox} for id, bbox in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return content


def _load(folder, content=None, **options):
    if content is not None:
        (folder / "train.json").write_text(json.dumps(content))
    return load_coco(folder / "train.json", folder / "images", **options)


@pytest.mark.parametrize("boxes", [[[60, 50, 90, 70]], [[60, 50, 90, 70], [50, 40, 70, 60]], [[0.2, 0.1, 0.5, 0.5]]])
def test_few_boxes_are_no_ground_for_a_guess(tmp_path, boxes):
    """A few such boxes may be annotation mistakes: they are clipped and counted."""
    _one_image(tmp_path, boxes)
    counts = _load(tmp_path).report.counts
    assert counts in ({"box partly outside": len(boxes)}, {"box below a pixel": 1})


@pytest.mark.parametrize("seed", range(20))
def test_sloppy_boxes_are_no_other_format(tmp_path, seed):
    """Any number of boxes of any size that cross the border are repaired, whatever their share of the boxes."""
    rng = np.random.default_rng(seed)
    number, scale = int(rng.choice([3, 10, 30, 300])), rng.uniform(2, 60)
    sides = rng.uniform(0.2 * scale, scale, (number, 2))
    corners = rng.uniform(-0.3, 1.3, (number, 2)) * ([100, 80] - sides)
    _one_image(tmp_path, np.concatenate([corners, sides], axis=1).round(1).tolist())
    assert _load(tmp_path).report.counts.keys() <= {"box partly outside", "box outside the image", "box below a pixel"}


def test_whole_images_counted_from_one_are_no_other_format(tmp_path):
    _one_image(tmp_path, [[1, 1, 100, 80]] * 50)
    assert _load(tmp_path).report.counts == {"box partly outside": 50}


def test_boxes_below_a_pixel_are_counted(tmp_path):
    _one_image(tmp_path, [[10, 10, 0.5, 8], [99.5, 3, 20, 4], [10, 10, 1, 1]])
    dataset = _load(tmp_path)
    assert dataset.report.counts == {"box partly outside": 1, "box below a pixel": 2}
    assert str(dataset.report) == "repaired: box partly outside ×1; kept as it is: box below a pixel ×2"
    assert dataset.objects(0).annotation_ids == (1, 2, 3)
    first = dataset.report.notes[0]
    assert (first.image_id, first.annotation_id) == (1, 1) and "0.5×8 pixels" in first.what


def test_annotation_ids_from_0_are_renumbered(tmp_path):
    content = _one_image(tmp_path, [[10, 10, 20, 20], [30, 10, 20, 20], [50, 10, 20, 20]])
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    dataset = _load(tmp_path, content)
    assert dataset.objects(0).annotation_ids == (3, 1, 2)
    assert dataset.report.counts == {"annotation id 0": 1}
    (repair,) = dataset.report.repairs
    assert (repair.annotation_id, repair.remedy) == (0, "Renumbered to 3.")
    content["annotations"][2]["id"] = 0
    with pytest.raises(DatasetError, match="duplicate annotation id"):
        _load(tmp_path, content)


def test_a_backslash_in_a_file_name_is_the_reason(tmp_path):
    _one_image(tmp_path, [[10, 10, 20, 20]], file_name="photos\\a.png")
    with pytest.raises(DatasetError, match=r'image 1 .*no such image file.*backslash.*write "photos/a\.png"'):
        _load(tmp_path)


def test_a_file_under_two_image_ids_is_reported(tmp_path):
    content = _one_image(tmp_path, [[10, 10, 20, 20]])
    content["images"] += [content["images"][0] | {"id": 5}, content["images"][0] | {"id": 9, "file_name": "./a.png"}]
    dataset = _load(tmp_path, content)
    assert dataset.report.counts == {"file under two image ids": 2} and len(dataset) == 3
    assert "image 5 (a.png): file under two image ids: image 1 has the same file." in str(dataset.report.notes[0])
