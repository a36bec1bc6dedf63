"""Inspecting a dataset: best anchors compared with whole grids, padding by hand, and planted mistakes."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data, evaluate, ops

from .test_experiments import run


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")


def write_dataset(folder, objects, *, sizes=((100, 200),), categories=("cat", "dog")):
    """Writes a dataset of objects `(image, category, box as corners, options)`. Images and ids count from 1."""
    (folder / "images").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes, start=1):
        Image.new("RGB", (width, height), (90, 120, 60)).save(folder / "images" / f"{i}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                **options,
            }
            for i, (image, category, (x0, y0, x1, y1), options) in enumerate(objects, start=1)
        ],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path, folder / "images"


def test_best_anchors_are_those_of_the_whole_grids():
    from detectax_eqx import report

    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 230, (300, 2))
    boxes = np.concatenate([corners, corners + np.exp(rng.uniform(1, 5, (300, 2)))], axis=1)
    boxes = np.minimum(boxes, [320, 256, 320, 256])
    sizes, ratios = ((16.0,), (32.0, 40.0), (64.0,), (128.0,), (200.0,)), (0.5, 1.0, 2.0)
    grids = [
        ops.anchor_grid((-(-256 // stride), -(-320 // stride)), stride=stride, sizes=of_level, aspect_ratios=ratios)
        for stride, of_level in zip(report.STRIDES, sizes, strict=True)
    ]
    overlaps = ops.pairwise_iou(jnp.asarray(boxes, jnp.float32), jnp.concatenate(grids))
    expected = np.asarray(overlaps.max(axis=1))
    best = report.best_anchor_iou(boxes, sizes=sizes, aspect_ratios=ratios)
    # The grids end at the image's border; `best_anchor_iou` does not know it, so boxes near it may differ.
    inside = (boxes[:, 0] + boxes[:, 2] < 500) & (boxes[:, 1] + boxes[:, 3] < 380)
    assert inside.sum() > 150
    np.testing.assert_allclose(best[inside], expected[inside], atol=1e-5)
    assert len(np.unique(best.round(3))) > 100
    with pytest.raises(ValueError, match="each of the 5 levels, got 1"):
        report.best_anchor_iou(boxes, sizes=((32.0,),), aspect_ratios=ratios)


def test_padding_by_hand():
    from detectax_eqx import report

    sizes = [(100, 200), (200, 100), (100, 100)]
    uses = report.bucket_use(sizes, canvases=[(128, 256), (256, 128)], min_size=100, max_size=200)
    # (100, 100) goes to the first of two equal canvases.
    assert [(use.canvas, use.images, use.shrunk) for use in uses] == [((128, 256), 2, 0), ((256, 128), 1, 0)]
    assert uses[0].padding == pytest.approx(1 - 30_000 / (2 * 128 * 256))
    assert report.padding_share(uses) == pytest.approx(1 - 50_000 / (3 * 128 * 256))
    (small,) = report.bucket_use(sizes[:1], canvases=[(64, 64)], min_size=100, max_size=200)
    assert small.shrunk == 1 and small.padding == pytest.approx(1 - 32 * 64 / 64**2)


def test_proposed_canvases_hold_all_and_waste_less():
    from detectax_eqx import report

    resize = {"min_size": 100, "max_size": 200}
    sizes = [(100, 150)] * 50 + [(150, 100)] * 50 + [(100, 200)]
    assert report.propose_canvases(sizes, count=3, **resize) == [(128, 160), (128, 224), (160, 128)]
    # The one (100, 200) image joins the other wide images, not the tall ones.
    assert report.propose_canvases(sizes, count=2, **resize) == [(128, 224), (160, 128)]
    assert report.propose_canvases(sizes, count=1, **resize) == [(160, 224)]
    rng = np.random.default_rng(0)
    sizes = [(int(height), int(width)) for height, width in rng.integers(300, 2000, (400, 2))]
    resize = {"min_size": 800, "max_size": 1333}
    for count in (1, 3, 6):
        proposed = report.propose_canvases(sizes, count=count, **resize)
        uses = report.bucket_use(sizes, canvases=proposed, **resize)
        assert len(proposed) <= count and sum(use.shrunk for use in uses) == 0
        assert all(side % 32 == 0 for canvas in proposed for side in canvas)
    default = report.bucket_use(sizes, canvases=[(800, 1344), (1344, 800), (1088, 1088)], **resize)
    better = report.bucket_use(sizes, canvases=report.propose_canvases(sizes, count=3, **resize), **resize)
    assert report.padding_share(better) < report.padding_share(default)


def rectangle(x0, y0, x1, y1):
    return {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}


def test_planted_mistakes_are_found(tmp_path):
    from detectax_eqx import report

    mask = np.zeros((100, 200), bool)
    mask[10:12, 10:12] = mask[48:50, 48:50] = True
    objects = [
        (1, 1, (10, 10, 50, 50), rectangle(10, 10, 50, 50)),  # valid
        (1, 1, (10, 10, 50, 51), {}),  # a duplicate
        (1, 2, (10, 10, 50, 50), {}),  # a duplicate with another class
        (1, 1, (60, 10, 61, 50), {}),  # one pixel wide
        (1, 1, (70, 10, 75, 90), {}),  # 5 × 80
        (1, 1, (0, 0, 200, 99), {}),
        (1, 1, (100, 10, 140, 50), rectangle(100, 10, 140, 20)),  # a quarter of the box
        (2, 2, (10, 10, 50, 50), {"segmentation": evaluate.encode_mask(mask)}),  # correct bounds, but 8 of 1600 pixels
        (2, 2, (10, 60, 50, 90), rectangle(11, 61, 49, 89)),  # rounded
        (2, 2, (100, 60, 101, 90), {"iscrowd": 1}),
    ]
    dataset = data.load_coco(*write_dataset(tmp_path, objects, sizes=((100, 200), (100, 200))))
    suspicions = {(one.kind, one.image, one.row) for one in report.find_suspicions(dataset)}
    assert suspicions == {
        ("same object twice", 0, 1),
        ("same box, two classes", 0, 2),
        ("tiny box", 0, 3),
        ("long and thin box", 0, 4),
        ("covers the whole image", 0, 5),
        ("box and segmentation disagree", 0, 6),
        ("nearly empty segmentation", 1, 0),
    }


def test_the_script(tmp_path):
    objects = [
        (1, 1, (10, 10, 50, 50), rectangle(10, 10, 50, 50)),
        (1, 1, (10, 10, 50, 50), rectangle(10, 10, 50, 50)),
        (2, 1, (5, 5, 6, 50), {}),
        (2, 1, (5, 5, 80, 80), {"iscrowd": 1, **rectangle(5, 5, 80, 80)}),
    ]
    annotations, images = write_dataset(tmp_path, objects, sizes=((100, 200), (100, 150), (150, 100)))
    text = run(
        "inspect_dataset.py", "--annotations", annotations, "--images", images, "--output", tmp_path / "out",
        "--min-size", "100", "--max-size", "200", "--canvases", "224", "224",
    )  # fmt: skip
    lines = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["images", "3"] in lines and ["objects", "3"] in lines and ["crowds", "1"] in lines
    assert ["images", "without", "an", "object", "1"] in lines
    assert ["cat", "3", "100.0", "%", "2"] in lines
    assert "1 have none" in text
    assert ["same", "object", "twice", "1"] in lines and ["tiny", "box", "1"] in lines
    assert "--canvases 160 224" in " ".join(text.split())
    page = (tmp_path / "out" / "dataset.html").read_text()
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert content["counts"] == {"same object twice": 1, "tiny box": 1}
    assert [entry["annotation"] for entry in content["suspicions"]] == [2, 3]
    assert content["suspicions"][0]["objects"][1]["box"] == [10, 10, 50, 50]
    text = run("inspect_dataset.py", "--annotations", annotations, "--images", images, "--anchor-sizes", "8", status=1)
    assert "needs 5 numbers" in text and "Traceback" not in text
