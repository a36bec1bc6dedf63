"""Keypoints of a dataset: how they are read and checked, and how they reach the targets of a batch."""

import json
from dataclasses import asdict
from typing import Any

import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import data, train, zoo
from detectax_eqx.data import Category, DatasetError, load_annotations, load_coco, write_shapes_dataset


NAMES = ["nose", "left_eye", "right_eye"]
POINTS = [5, 6, 2, 0, 0, 0, 12.5, 3, 1]


def content():
    """A person with three points, one without, and a ball, whose category has one point."""
    objects = [
        {"category_id": 1, "bbox": [2, 1, 12, 6], "keypoints": [*POINTS], "num_keypoints": 2},
        {"category_id": 1, "bbox": [0, 0, 5, 5]},
        {"category_id": 3, "bbox": [10, 2, 6, 6], "keypoints": [13, 5, 2]},
    ]
    return {
        "images": [{"id": 7, "width": 20, "height": 10}],
        "annotations": [{"id": i, "image_id": 7, **each} for i, each in enumerate(objects, start=1)],
        "categories": [
            {"id": 1, "name": "person", "keypoints": [*NAMES], "skeleton": [[1, 2], [3, 1]]},
            {"id": 3, "name": "ball", "keypoints": ["middle"]},
            {"id": 8, "name": "court"},
        ],
    }


def test_reads_what_is_there():
    dataset = load_annotations(content())
    person, ball, court = dataset.categories
    assert person == Category(1, "person", tuple(NAMES), ((0, 1), (2, 0)))
    assert (ball.keypoints, ball.skeleton, court.keypoints) == (("middle",), (), ())
    assert dataset.num_keypoints == 3 and str(dataset.report) == "nothing to repair"
    keypoints = dataset.objects(0).keypoints
    assert keypoints is not None
    assert keypoints[0].tolist() == [[5, 6, 2], [0, 0, 0], [12.5, 3, 1]]
    assert not keypoints[1].any()
    assert keypoints[2].tolist() == [[13, 5, 2], [0, 0, 0], [0, 0, 0]]  # padded by points that are not labelled
    without = content()
    for category in without["categories"]:
        category |= {"keypoints": None, "skeleton": []}
    dataset = load_annotations(without)
    assert dataset.num_keypoints == 0 and dataset.objects(0).keypoints is None
    assert dataset.report.counts == {"keypoints that the category does not name": 2}


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["left_eye", "nose", "right_eye"], ((0, 2),)),
        (["RightHand", "LeftHand", "LEFT", "RIGHT"], ((1, 0), (2, 3))),
        (["left_ear", "left_eye", "top"], ()),
        (["a", "b"], ()),
        (
            zoo.published("keypoint_rcnn_resnet50_fpn").categories[0].keypoints,
            tuple((i, i + 1) for i in range(1, 17, 2)),
        ),
    ],
)
def test_pairs_of_a_flip_follow_from_names(names, pairs):
    assert Category(1, "person", tuple(names)).keypoint_pairs == pairs


def test_a_category_survives_json():
    category = load_annotations(content()).categories[0]
    assert Category.from_fields(json.loads(json.dumps(asdict(category)))) == category
    assert Category.from_fields({"id": 4, "name": "cat"}) == Category(4, "cat")


def put(place, value):
    def change(content):
        *path, last = place
        for key in path:
            content = content[key]
        content[last] = value

    return change


PERSON, FIRST = ("categories", 0), ("annotations", 0)


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (put((*PERSON, "keypoints"), "nose"), "wrong keypoint names", "categories[0] is 'nose'. Make it a list"),
        (put((*PERSON, "keypoints"), ["nose", "nose"]), "wrong keypoint names", "different strings"),
        (put((*PERSON, "keypoints"), ["nose", 3]), "wrong keypoint names", "different strings"),
        (put((*PERSON, "skeleton"), [[0, 1]]), "wrong skeleton", "positions in its 3 keypoints, from 1"),
        (put((*PERSON, "skeleton"), [[1, 4]]), "wrong skeleton", "[[1, 4]]"),
        (put((*PERSON, "skeleton"), [[1, 2, 3]]), "wrong skeleton", "pairs"),
        (put((*PERSON, "skeleton"), "1-2"), "wrong skeleton", "pairs"),
        (put((*FIRST, "keypoints"), POINTS[:6]), "wrong keypoints", "each of the 3 points: 9 finite numbers"),
        (put((*FIRST, "keypoints"), [[5, 6, 2]]), "wrong keypoints", "annotation 1"),
        (put((*FIRST, "keypoints"), "x"), "wrong keypoints", "\"keypoints\" is 'x'"),
        (put((*FIRST, "keypoints", 0), float("nan")), "wrong keypoints", "finite"),
        (put((*FIRST, "keypoints", 1), None), "wrong keypoints", "finite"),
        (put((*FIRST, "keypoints", 2), 3), "wrong visibility", "0 (not labelled), 1 (hidden) or 2 (visible)"),
        (put((*FIRST, "keypoints", 2), 0.5), "wrong visibility", "[0.5, 0, 1]"),
    ],
)
def test_errors_name_place_and_remedy(change, kind, words):
    changed = content()
    change(changed)
    with pytest.raises(DatasetError) as caught:
        load_annotations(changed)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "change, counts",
    [
        (put((*FIRST, "num_keypoints"), 3), {"wrong num_keypoints": 1}),
        (put((*FIRST, "num_keypoints"), "two"), {"wrong num_keypoints": 1}),
        (put((*FIRST, "num_keypoints"), None), {}),
        (put((*FIRST, "keypoints", 0), -1), {"keypoints outside the image": 1}),
        (put((*FIRST, "keypoints", 3), -1), {}),  # a point that is not labelled may be anywhere
        (put((*FIRST, "keypoints"), []), {}),
    ],
)
def test_smaller_problems_are_counted(change, counts):
    changed = content()
    change(changed)
    assert load_annotations(changed).report.counts == counts


def test_keypoints_in_fractions_of_the_image():
    fractions, size = content(), (20, 10)
    for annotation in fractions["annotations"]:
        annotation["bbox"] = [number / size[i % 2] for i, number in enumerate(annotation["bbox"])]
        points = annotation.get("keypoints", [])
        annotation["keypoints"] = [number / (*size, 1)[i % 3] for i, number in enumerate(points)]
    dataset, expected = load_annotations(fractions, box_format="normalized_xywh"), load_annotations(content())
    found, wanted = dataset.objects(0).keypoints, expected.objects(0).keypoints
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted)


def test_categories_must_have_the_same_keypoints():
    ours = [Category(1, "person", ("nose", "chin"))]
    options: Any = {"found_in": "val.json", "known_in": "the model"}
    data.check_categories(ours, ours, **options)
    data.check_categories([Category(1, "person")], ours, **options)
    with pytest.raises(DatasetError, match=r'keypoint 2 of id 1 is "chin" in val\.json and "ear" in the model'):
        data.check_categories(ours, [Category(1, "person", ("nose", "ear"))], **options)
    data.check_categories(ours, [Category(1, "person", ("nose", "ear"))], allow_renamed=True, **options)
    with pytest.raises(DatasetError, match=r"id 1 has 2 keypoints in val\.json and 1 in the model"):
        data.check_categories(ours, [Category(1, "person", ("nose",))], allow_renamed=True, **options)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return load_coco(*write_shapes_dataset(folder, num_images=12, seed=0, keypoints=True))


def test_shapes_have_keypoints(shapes, tmp_path):
    assert str(shapes.report) == "nothing to repair" and shapes.num_keypoints == 4
    assert shapes.keypoint_pairs == ((3, 1),)
    states = []
    for index in range(len(shapes)):
        objects = shapes.objects(index)
        assert objects.keypoints is not None
        for box, points in zip(objects.boxes, objects.keypoints, strict=True):
            top, right, bottom, left = points[:, :2]
            assert top[1] <= min(left[1], right[1]) and bottom[1] >= max(left[1], right[1]) and left[0] < right[0]
            # Boxes are those of the visible parts, whose outlines follow the edges of pixels.
            assert left[0] - 1 < box[0] < box[2] < right[0] + 1 and top[1] - 1 < box[1] < box[3] < bottom[1] + 1
            states += points[:, 2].tolist()
        (top, right, bottom, left), box = objects.keypoints[-1, :, :2], objects.boxes[-1]  # on top of all others
        assert (objects.keypoints[-1, :, 2] == 2).all()
        np.testing.assert_allclose([left[0], top[1], right[0], bottom[1]], box, atol=0.011)
    assert set(states) == {1, 2}
    plain, _ = write_shapes_dataset(tmp_path, num_images=12, seed=0)
    for index, other in enumerate(load_annotations(plain)._objects):
        np.testing.assert_array_equal(other.boxes, shapes.objects(index).boxes)


def test_a_batch_holds_keypoints_on_the_canvas(shapes):
    buckets = data.make_buckets(shapes.sizes, canvases=[(64, 64)], max_source=96, min_size=64, max_size=64)
    options = {"batch_size": 4, "buckets": buckets, "max_objects": 3, "mask_size": None}
    batch = data.Loader(shapes, keypoints=True, **options).batch(1)
    assert batch.targets.keypoints is not None and batch.targets.keypoints.shape == (4, 3, 4, 3)
    for slot, index in enumerate(batch.images.indices):
        expected = shapes.objects(int(index)).keypoints
        assert expected is not None
        count = min(3, len(expected))
        ratio = batch.images.sizes[slot, 0] / 128
        assert 0 < ratio < 1
        np.testing.assert_allclose(
            batch.targets.keypoints[slot, :count, :, :2], expected[:count, :, :2] * ratio, rtol=1e-5
        )
        np.testing.assert_array_equal(batch.targets.keypoints[slot, :count, :, 2], expected[:count, :, 2])
        assert not batch.targets.keypoints[slot, count:].any()
        moved = data.Loader(shapes, keypoints=True, keypoint_offset=0.5, **options).batch(1).targets.keypoints
        assert moved is not None
        np.testing.assert_allclose(moved[slot, :count, :, :2], (expected[:count, :, :2] + 0.5) * ratio, rtol=1e-5)
        np.testing.assert_array_equal(moved[slot, ..., 2], batch.targets.keypoints[slot, ..., 2])
    assert data.Loader(shapes, **options).batch(1).targets.keypoints is None


def test_a_flip_keeps_left_points_left(shapes):
    buckets = data.make_buckets(shapes.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    batch = data.Loader(shapes, batch_size=1, buckets=buckets, max_objects=4, mask_size=None, keypoints=True).batch(0)
    targets = type(batch.targets)(*(None if field is None else field[0] for field in vars(batch.targets).values()))
    options = {"canvas": (128, 128), "min_sizes": (128,), "max_size": 128, "key": jr.key(0)}
    _, _, flipped = train.augment(
        batch.images.pixels[0],
        batch.images.sizes[0],
        targets,
        flip_probability=1.0,
        keypoint_pairs=shapes.keypoint_pairs,
        **options,
    )
    assert flipped.keypoints is not None and targets.keypoints is not None
    points = np.asarray(flipped.keypoints)[np.asarray(targets.valid)]
    original = np.asarray(targets.keypoints)[np.asarray(targets.valid)]
    np.testing.assert_allclose(points[:, 3, 0], 128 - original[:, 1, 0], atol=1e-3)
    assert (points[:, 3, 0] < points[:, 1, 0]).all()
    np.testing.assert_allclose(points[:, 0, 1], original[:, 0, 1], atol=1e-3)


def test_a_loader_refuses_a_dataset_without_keypoints(tmp_path):
    dataset = load_coco(*write_shapes_dataset(tmp_path, num_images=2, seed=0))
    buckets = data.make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    with pytest.raises(DatasetError, match="no category names keypoints, but keypoints=True asks for them"):
        data.Loader(dataset, batch_size=2, buckets=buckets, mask_size=None, keypoints=True)
