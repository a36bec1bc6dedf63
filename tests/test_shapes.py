"""The synthetic dataset: its annotations match its pixels."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detectax_eqx.data import load_coco, mask_in_box, write_shapes_dataset
from detectax_eqx.data._masks import polygon_coverage
from detectax_eqx.data._outline import signed_area, trace_outlines


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_images=40, seed=1)


def test_is_read_back(written):
    dataset = load_coco(*written)
    assert len(dataset) == 40 and dataset.report.counts == {}
    assert [(category.id, category.name) for category in dataset.categories] == [
        (1, "circle"),
        (3, "square"),
        (4, "triangle"),
        (7, "star"),
    ]
    assert all(1 <= len(dataset.objects(i).boxes) <= 6 for i in range(40))


def test_has_every_class_and_size_and_overlaps(written):
    annotations = json.loads(written[0].read_text())["annotations"]
    assert set(Counter(a["category_id"] for a in annotations)) == {1, 3, 4, 7}
    sides = np.sqrt([a["area"] for a in annotations])
    assert (sides < 32).mean() > 0.2 and ((sides > 32) & (sides < 96)).mean() > 0.2
    hidden = [a for a in annotations if len(a["segmentation"]) > 1 or len(a["segmentation"][0]) > 96]
    assert len(hidden) > 5


def test_large_objects_where_there_is_room(tmp_path):
    annotations, _ = write_shapes_dataset(tmp_path, num_images=12, seed=0, image_size=(240, 320))
    areas = [a["area"] for a in json.loads(annotations.read_text())["annotations"]]
    assert max(areas) > 96**2 and min(areas) < 32**2


def test_is_a_function_of_its_arguments(tmp_path):
    contents = []
    for name, number, seed in (("a", 3, 5), ("b", 3, 5), ("c", 5, 5), ("d", 3, 6)):
        annotations, images = write_shapes_dataset(tmp_path / name, num_images=number, seed=seed)
        pixels = [np.asarray(Image.open(path)) for path in sorted(images.iterdir())]
        contents.append((json.loads(annotations.read_text()), pixels))
    assert contents[0][0] == contents[1][0]
    np.testing.assert_array_equal(contents[0][1], contents[1][1])
    np.testing.assert_array_equal(contents[0][1], contents[2][1][:3])
    assert (contents[0][1][0] != contents[3][1][0]).any()


def test_annotations_are_of_the_visible_part(written):
    """Colour changes at the annotated outlines: pixels within a mask agree, those just outside the shapes do not."""
    dataset = load_coco(*written)
    for index in range(40):
        pixels = np.asarray(Image.open(dataset.images[index].path), np.float64)
        objects = dataset.objects(index)
        taken = np.zeros(pixels.shape[:2])
        for box, polygons in zip(objects.boxes, objects.segmentations, strict=True):
            assert isinstance(polygons, tuple)
            coverage = sum(polygon_coverage(polygon, size=pixels.shape[:2]) for polygon in polygons)
            points = np.concatenate(polygons)
            np.testing.assert_allclose(box, [*points.min(axis=0), *points.max(axis=0)], atol=0.02)
            taken += coverage
            inside = pixels[coverage > 0.99]
            assert np.median(np.abs(inside - np.median(inside, axis=0))) < 8  # one colour and noise
            assert mask_in_box(polygons, box, size=28).max() > 200
        assert taken.max() < 1.75  # outlines of neighbours overlap by at most half a pixel


def test_lossy_and_random_hues(tmp_path):
    dataset = load_coco(
        *write_shapes_dataset(tmp_path, num_images=2, image_size=(64, 96), class_colors=False, suffix=".jpg")
    )
    path = dataset.images[0].path
    assert dataset.sizes == ((64, 96), (64, 96)) and isinstance(path, Path) and path.suffix == ".jpg"


MISTAKES = [
    ({"num_images": 0}, "num_images"),
    ({"max_objects": 0}, "max_objects"),
    ({"seed": -1}, "seed"),
    ({"image_size": (16, 64)}, "image_size"),
    ({"suffix": ".gif"}, "suffix"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_shapes_dataset(tmp_path, **({"num_images": 1} | options))


@pytest.mark.parametrize("seed", range(20))
def test_outlines_enclose_the_mask_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(7, 9)) < rng.choice([0.2, 0.5, 0.8])
    outlines, has_hole = trace_outlines(mask)
    covered = sum((polygon_coverage(outline, size=mask.shape) for outline in outlines), np.zeros(mask.shape))
    assert (covered[mask] >= 1).all()
    assert has_hole == bool((covered[~mask] > 0).any())
    if not has_hole:
        np.testing.assert_array_equal(covered, mask)
        assert sum(signed_area(outline) for outline in outlines) == mask.sum()


OUTLINES = [
    ([[1, 0], [0, 1]], 2, False),  # parts that touch at a corner
    ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], 1, True),
    ([[1, 1, 1], [1, 0, 1], [1, 1, 0]], 1, False),  # the gap is open at a corner
    ([[0, 0]], 0, False),
]


@pytest.mark.parametrize("mask, number, hole", OUTLINES)
def test_outlines_by_hand(mask, number, hole):
    outlines, has_hole = trace_outlines(np.array(mask, bool))
    assert (len(outlines), has_hole) == (number, hole)
