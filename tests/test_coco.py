"""COCO files: what is read, what is repaired, and that everything else is rejected."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from detectax_eqx.data import DatasetError, load_coco, mask_in_box
from detectax_eqx.data._masks import decode_rle, polygon_coverage, rle_counts


DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


def _content():
    """Two images of 20×10 pixels, one of them without annotations. The ids have gaps."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 10},
        ],
        "annotations": [
            {
                "id": 5,
                "image_id": 7,
                "category_id": 40,
                "bbox": [2, 1, 6, 4],
                "area": 24,
                "iscrowd": 0,
                "segmentation": [[2, 1, 8, 1, 8, 5, 2, 5]],
            },
            {"id": 9, "image_id": 7, "category_id": 2, "bbox": [10.5, 0, 9.5, 10], "segmentation": []},
        ],
        "categories": [{"id": 40, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def _load(folder, content, **options):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        if not (folder / "images" / name).exists():
            Image.new("RGB", (20, 10)).save(folder / "images" / name)
    (folder / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_coco(folder / "train.json", folder / "images", **options)


def _encoded(pixels) -> dict[str, Any]:
    return dict(coco_mask.encode(np.asfortranarray(pixels)))


def test_reads_what_is_there(tmp_path):
    dataset = _load(tmp_path, _content())
    assert [(image.id, image.path, image.height, image.width) for image in dataset.images] == [
        (7, tmp_path / "images" / "a.png", 10, 20),
        (3, tmp_path / "images" / "b.png", 10, 20),
    ]
    assert [(category.id, category.name) for category in dataset.categories] == [(2, "dog"), (40, "cat")]
    assert dataset.category_ids == (2, 40) and dataset.num_classes == 2 and len(dataset) == 2
    assert dataset.sizes == ((10, 20), (10, 20))
    objects = dataset.objects(0)
    np.testing.assert_array_equal(objects.boxes, np.array([[2, 1, 8, 5], [10.5, 0, 20, 10]], np.float32))
    assert objects.labels.tolist() == [1, 0] and objects.annotation_ids == (5, 9)
    assert not objects.crowd.any()
    assert isinstance(objects.segmentations[0], tuple)
    assert objects.segmentations[0][0].tolist() == [[2, 1], [8, 1], [8, 5], [2, 5]]
    assert objects.segmentations[1] is None
    assert dataset.objects(1).boxes.shape == (0, 4)
    assert dataset.report.counts == {} and not dataset.report.errors


def test_runs_compressed_or_not_and_crowds(tmp_path):
    mask = np.zeros((10, 20), np.uint8)
    mask[2:5, 3:9] = 1
    compressed = _encoded(mask)
    runs = rle_counts(compressed["counts"])
    assert runs.sum() == 200
    content = _content()
    content["annotations"][0]["segmentation"] = {"size": [10, 20], "counts": compressed["counts"].decode()}
    content["annotations"][1] |= {"segmentation": {"size": [10, 20], "counts": runs.tolist()}, "iscrowd": 1}
    objects = _load(tmp_path, content).objects(0)
    assert objects.crowd.tolist() == [False, True]
    for segmentation in objects.segmentations:
        assert isinstance(segmentation, dict)
        np.testing.assert_array_equal(decode_rle(segmentation), mask)


REPAIRS = [
    ([2, 1, 0, 0], "box of no area", None),
    ([2, 1, 5, 0], "box of no area", None),
    ([2, 1, -5, 3], "box of no area", None),
    ([20, 1, 5, 3], "box outside the image", None),
    ([-9, 1, 5, 3], "box outside the image", None),
    ([2, 10.5, 5, 3], "box outside the image", None),
    ([15, 1, 1e-9, 3], "box outside the image", None),
    ([-2, -3, 6, 6], "box partly outside", [0, 0, 4, 3]),
    ([15, 5, 10, 10], "box partly outside", [15, 5, 20, 10]),
    ([15, 5, 5.001, 5], None, [15, 5, 20, 10]),
]


@pytest.mark.parametrize("bbox, kind, box", REPAIRS)
def test_boxes_are_mended_and_counted(tmp_path, bbox, kind, box):
    content = _content()
    content["annotations"][0]["bbox"] = bbox
    dataset = _load(tmp_path, content)
    objects = dataset.objects(0)
    assert dataset.report.counts == ({} if kind is None else {kind: 1})
    if box is None:
        assert objects.annotation_ids == (9,)
    else:
        np.testing.assert_array_equal(objects.boxes[0], np.array(box, np.float32))
    if kind is not None:
        (repair,) = dataset.report.repairs
        assert (repair.image_id, repair.annotation_id) == (7, 5)
        assert "train.json: image 7 (a.png), annotation 5: " in str(repair) and f"{kind} ×1" in str(dataset.report)


def test_pieces_without_area_are_dropped_where_others_remain(tmp_path):
    content = _content()
    content["annotations"][0]["segmentation"].append([1, 1, 2, 2])
    dataset = _load(tmp_path, content)
    assert dataset.report.counts == {"piece with fewer than 3 points": 1}
    pieces = dataset.objects(0).segmentations[0]
    assert isinstance(pieces, tuple) and len(pieces) == 1


def _set(part, position, **values):
    def change(content):
        content[part][position].update(values)

    return change


def _remove(part, position, key):
    def change(content):
        del content[part][position][key]

    return change


def _put(part, position, value):
    def change(content):
        content[part][position] = value

    return change


def _rle(counts, size=(10, 20)):
    return _set("annotations", 0, segmentation={"size": list(size), "counts": counts})


POINTS, SHORT = [2, 1, 8, 1, 8, 5, 2], [2, 1, 8, 5]
# (change, expected kind of problem, image id, annotation id)
ERRORS = [
    (_set("annotations", 0, id=-3), "negative annotation id", 7, -3),
    (_set("annotations", 1, id=5), "duplicate annotation id", 7, 5),
    (_set("annotations", 0, id="5"), "wrong type", 7, "5"),
    (_set("annotations", 0, id=True), "wrong type", 7, True),
    (_set("images", 1, id=7), "duplicate image id", 7, None),
    (_set("images", 1, id="3"), "wrong type", "3", None),
    (_set("images", 1, id=3.0), "wrong type", 3.0, None),
    (_set("images", 1, file_name=4), "wrong type", 3, None),
    (_set("images", 1, file_name=""), "wrong type", 3, None),
    (_set("images", 1, width=0), "wrong image size", 3, None),
    (_set("images", 1, height="10"), "wrong image size", 3, None),
    (_set("images", 1, height=21), "unusable image", 3, None),
    (_set("images", 1, file_name="c.png"), "unusable image", 3, None),
    (_remove("images", 1, "width"), "missing key", 3, None),
    (_remove("images", 1, "file_name"), "missing key", 3, None),
    (_put("images", 1, 5), "wrong type", None, None),
    (_set("categories", 0, id=2), "duplicate category id", None, None),
    (_set("categories", 0, id="40"), "wrong category", None, None),
    (_remove("categories", 0, "name"), "wrong category", None, None),
    (_put("categories", 0, None), "wrong category", None, None),
    (_set("annotations", 0, category_id=41), "unknown category", 7, 5),
    (_set("annotations", 0, category_id="40"), "unknown category", 7, 5),
    (_set("annotations", 0, image_id=8), "unknown image", 8, 5),
    (_set("annotations", 0, image_id=[7]), "unknown image", [7], 5),
    (_remove("annotations", 0, "bbox"), "missing key", 7, 5),
    (_remove("annotations", 0, "category_id"), "missing key", 7, 5),
    (_remove("annotations", 0, "image_id"), "missing key", None, 5),
    (_remove("annotations", 0, "id"), "missing key", 7, "at position 0"),
    (_put("annotations", 0, [1]), "wrong type", None, None),
    (_set("annotations", 0, iscrowd=2), "wrong type", 7, 5),
    (_set("annotations", 0, area="24"), "wrong area", 7, 5),
    (_set("annotations", 0, area=math.nan), "wrong area", 7, 5),
    (_set("annotations", 0, area=-1), "wrong area", 7, 5),
    (_set("annotations", 0, bbox=[1, 2, 3]), "wrong box", 7, 5),
    (_set("annotations", 0, bbox=[1, 2, 3, "4"]), "wrong box", 7, 5),
    (_set("annotations", 0, bbox=[1, 2, 3, math.nan]), "wrong box", 7, 5),
    (_set("annotations", 0, bbox=[1, 2, 3, math.inf]), "wrong box", 7, 5),
    (_set("annotations", 0, bbox=[1, 2, 3, 10**400]), "wrong box", 7, 5),
    (_set("annotations", 0, bbox={"x": 1}), "wrong box", 7, 5),
    (_set("annotations", 0, segmentation=[POINTS]), "polygon of odd length", 7, 5),
    (_set("annotations", 0, segmentation=[SHORT]), "polygon with fewer than 3 points", 7, 5),
    (_set("annotations", 0, segmentation=[[]]), "polygon with fewer than 3 points", 7, 5),
    (_set("annotations", 0, segmentation=[SHORT, SHORT]), "polygon with fewer than 3 points", 7, 5),
    (_set("annotations", 0, segmentation=POINTS), "wrong polygon", 7, 5),
    (_set("annotations", 0, segmentation=[[2, 1, 8, 1, 8, math.nan]]), "wrong polygon", 7, 5),
    (_set("annotations", 0, segmentation=[[2, 1, 8, 1, 8, None]]), "wrong polygon", 7, 5),
    (_set("annotations", 0, segmentation="polygon"), "wrong segmentation", 7, 5),
    (_rle([200], size=(20, 10)), "malformed run-length encoding", 7, 5),
    (_rle([100, 99]), "malformed run-length encoding", 7, 5),
    (_rle([300, -100]), "malformed run-length encoding", 7, 5),
    (_rle([100, 100.0]), "malformed run-length encoding", 7, 5),
    (_rle([]), "malformed run-length encoding", 7, 5),
    (_rle(None), "malformed run-length encoding", 7, 5),
    (_rle(""), "malformed run-length encoding", 7, 5),
    (_rle("52203"), "malformed run-length encoding", 7, 5),
    (_rle("52é03"), "malformed run-length encoding", 7, 5),
    (_rle("5220P"), "malformed run-length encoding", 7, 5),
    (_rle("o" * 300 + "0"), "malformed run-length encoding", 7, 5),
    (_set("annotations", 0, segmentation={"counts": [200]}), "malformed run-length encoding", 7, 5),
]


@pytest.mark.parametrize("change, kind, image_id, annotation_id", ERRORS)
def test_errors_are_reported_where_they_are(tmp_path, change, kind, image_id, annotation_id):
    content = _content()
    change(content)
    with pytest.raises(DatasetError) as caught:
        _load(tmp_path, content)
    problem = caught.value.problems[0]
    # Annotations of an unusable category are reported as well. No other problem causes further ones.
    further_kinds = {other.kind for other in caught.value.problems[1:]}
    assert further_kinds <= ({"unknown category"} if "category" in kind else set()), caught.value
    assert (problem.kind, problem.image_id, problem.annotation_id) == (kind, image_id, annotation_id)
    assert problem.file == tmp_path / "train.json" and problem.remedy
    assert str(problem) in str(caught.value)


def _without(key):
    return {name: value for name, value in _content().items() if name != key}


UNREADABLE = [
    ("[1, 2", "cannot be read as JSON"),
    ("[1, 2]", "is a list"),
    (_without("images"), 'no "images"'),
    (_without("annotations"), 'no "annotations"'),
    (_without("categories"), 'no "categories"'),
    (_content() | {"annotations": {}}, '"annotations" must be a list'),
    (_content() | {"images": []}, '"images" is empty'),
    (_content() | {"categories": []}, '"categories" is empty'),
]


@pytest.mark.parametrize("content, message", UNREADABLE)
def test_files_that_are_no_dataset(tmp_path, content, message):
    with pytest.raises(DatasetError, match=r"train\.json.*" + message):
        _load(tmp_path, content)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        load_coco(tmp_path / "train.json", tmp_path / "images")
    with pytest.raises(DatasetError, match=r"train\.json: no such annotation file"):
        load_coco(tmp_path / "train.json", tmp_path)


def test_all_errors_come_together_and_the_list_has_an_end(tmp_path):
    content = _content()
    content["annotations"] = [
        copy.deepcopy(content["annotations"][0]) | {"id": i + 1, "category_id": 1000 + i} for i in range(50)
    ]
    with pytest.raises(DatasetError, match=r"unknown category ×50") as caught:
        _load(tmp_path, content)
    assert len(caught.value.problems) == 50
    assert "… and 30 more" in str(caught.value) and len(str(caught.value).splitlines()) == 22


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _trailing(path):
    path.write_bytes(path.read_bytes() + b"\0" * 40)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_truncated_images_are_found_and_trailing_bytes_allowed(tmp_path, format):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, format)
    _load(tmp_path, _content())
    if format in ("PNG", "JPEG"):
        _trailing(path)
        _load(tmp_path, _content())
        _cut(path)
    if format == "TIFF":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes(path.read_bytes()[: -(60 if format in ("PNG", "JPEG") else 20)])
    with pytest.raises(DatasetError, match=r"image 7 \(a\.png\)") as caught:
        _load(tmp_path, _content())
    assert [problem.kind for problem in caught.value.problems] == ["unusable image"]
    assert len(_load(tmp_path, _content(), check_images=False)) == 2


def test_a_rotated_image_may_be_annotated_either_way(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png", exif=exif)
    _load(tmp_path, _content())
    content = _content()
    content["images"][0] |= {"width": 10, "height": 20}
    content["annotations"] = []
    assert _load(tmp_path, content).sizes[0] == (20, 10)


# Masks


def _sampled(polygon, box, size, samples=64):
    """Coverage from sample points that are tested against the polygon with the even-odd rule."""
    x0, y0, x1, y1 = box
    xs = x0 + (np.arange(size * samples) + 0.5) / (size * samples) * (x1 - x0)
    ys = y0 + (np.arange(size * samples) + 0.5) / (size * samples) * (y1 - y0)
    inside = np.zeros((len(ys), len(xs)), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (ay > ys) != (by > ys)
        at = ax + (ys - ay) / np.where(by == ay, 1.0, by - ay) * (bx - ax)
        inside ^= crosses[:, None] & (xs[None] < at[:, None])
    return inside.reshape(size, samples, size, samples).mean((1, 3))


@pytest.mark.parametrize("seed", range(8))
def test_polygon_coverage_agrees_with_sampling(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    polygon = 10 + rng.uniform(2, 9, (9, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    polygon = polygon[:: rng.choice([-1, 1])]
    # The box crops the polygon.
    box = np.array([rng.uniform(0, 6), rng.uniform(0, 6), rng.uniform(12, 25), rng.uniform(12, 25)])
    mask = mask_in_box((polygon,), box, size=7)
    assert mask.dtype == np.uint8 and mask.shape == (7, 7)
    np.testing.assert_allclose(mask / 255, _sampled(polygon, box, 7), atol=0.01)


COVERAGE = [
    ([[0, 0], [2, 0], [2, 2], [0, 2]], [[1, 1], [1, 1]]),
    ([[0, 0], [0, 2], [2, 2], [2, 0]], [[1, 1], [1, 1]]),
    ([[0, 0], [2, 0], [0, 2]], [[1, 0.5], [0.5, 0]]),
    ([[-5, -5], [5, -5], [5, 0.25], [-5, 0.25]], [[0.25, 0.25], [0, 0]]),
    ([[0.5, -9], [0.75, -9], [0.75, 9], [0.5, 9]], [[0.25, 0], [0.25, 0]]),
    ([[3, 0], [4, 0], [4, 2]], [[0, 0], [0, 0]]),
    ([[0, 0], [1, 1], [2, 2]], [[0, 0], [0, 0]]),
    ([[0, 0], [2, 2], [2, 0], [0, 2]], [[0.5, 0.5], [0.5, 0.5]]),  # an hourglass on its side: both lobes count
]


@pytest.mark.parametrize("points, expected", COVERAGE)
def test_polygon_coverage_by_hand(points, expected):
    np.testing.assert_allclose(polygon_coverage(np.array(points, np.float64), size=(2, 2)), expected, atol=1e-12)


def test_pieces_add_up():
    left, right = np.array([[0.0, 0], [1, 0], [1, 2], [0, 2]]), np.array([[1.5, 0], [2, 0], [2, 2], [1.5, 2]])
    mask = mask_in_box((left, right, left), np.array([0.0, 0, 2, 2]), size=2)
    assert mask.tolist() == [[255, 128], [255, 128]]


@pytest.mark.parametrize("box", [[3, 2, 9, 6], [2.5, 1.25, 9.75, 6.5], [4.2, 3.1, 4.9, 3.3], [-2, -1, 22, 11]])
def test_runs_become_exact_areas(box):
    pixels = np.random.default_rng(0).integers(0, 2, (10, 20), np.uint8)
    rle = _encoded(pixels)
    mask = mask_in_box(rle, np.array(box, np.float32), size=5)
    x0, y0, x1, y1 = box
    samples = (np.arange(5 * 200) + 0.5) / (5 * 200)
    x, y = np.floor(x0 + samples * (x1 - x0)).astype(int), np.floor(y0 + samples * (y1 - y0)).astype(int)
    padded = np.pad(pixels, 3)
    expected = padded[np.ix_(y + 3, x + 3)].reshape(5, 200, 5, 200).mean((1, 3))
    np.testing.assert_allclose(mask / 255, expected, atol=0.01)


def test_runs_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 60, 2)
        pixels = np.asfortranarray(rng.uniform(size=(height, width)) < rng.choice([0, 0.02, 0.5, 1]), np.uint8)
        np.testing.assert_array_equal(decode_rle(_encoded(pixels)), pixels)


# Real data


@needs_data
@pytest.mark.parametrize("split, images, crowds", [("train2017", 80, 8), ("val2017", 79, 5)])
def test_coco(split, images, crowds):
    dataset = load_coco(DATA / f"coco-mini/annotations/instances_{split}.json", DATA / "coco-mini" / split)
    assert (len(dataset), dataset.num_classes, dataset.category_ids[-1]) == (images, 80, 90)
    assert sum(int(dataset.objects(i).crowd.sum()) for i in range(images)) == crowds
    assert dataset.report.counts == {}


@needs_data
@pytest.mark.parametrize("split, images, degenerate", [("train", 205, 1), ("val", 87, 1), ("test", 72, 0)])
def test_blood_cells(split, images, degenerate):
    dataset = load_coco(DATA / f"bccd/{split}.json", DATA / "bccd/images")
    assert (len(dataset), dataset.num_classes) == (images, 3)
    assert dataset.report.counts == ({"box of no area": 1} if degenerate else {})


@needs_data
def test_masks_of_coco_agree_with_pycocotools():
    dataset = load_coco(
        DATA / "coco-mini/annotations/instances_val2017.json", DATA / "coco-mini/val2017", check_images=False
    )
    for index in range(12):
        image, objects = dataset.images[index], dataset.objects(index)
        for box, segmentation in zip(objects.boxes, objects.segmentations, strict=True):
            if (box[2] - box[0]) * (box[3] - box[1]) < 1024:
                continue
            if isinstance(segmentation, tuple):
                polygons = [polygon.ravel().tolist() for polygon in segmentation]
                rle = dict(coco_mask.merge(coco_mask.frPyObjects(polygons, image.height, image.width)))
            else:
                rle = segmentation
            ours, theirs = mask_in_box(segmentation, box, size=28), mask_in_box(rle, box, size=28)
            both, either = np.minimum(ours, theirs).sum(dtype=int), np.maximum(ours, theirs).sum(dtype=int)
            assert both / either > 0.9
