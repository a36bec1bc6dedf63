"""COCO evaluation: AP computed by hand, AP of pycocotools itself, and input that pycocotools does not check."""

import copy
import json
import os
from dataclasses import asdict, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectax_eqx import Detections, Images
from detectax_eqx.data import DatasetError
from detectax_eqx.evaluate import (
    encode_mask,
    evaluate_coco,
    format_metrics,
    format_per_class,
    read_results,
    to_coco_results,
    write_results,
)
from detectax_eqx.ops import paste_masks


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SIZE = 200


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def make_annotations(*boxes, images=2, categories=(1, 7)):
    """Annotations from tuples `(image_id, category_id, box, options)`."""
    return {
        "images": [{"id": i, "width": SIZE, "height": SIZE} for i in range(1, images + 1)],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": rectangle(*box),
                **(options[0] if options else {}),
            }
            for i, (image, category, box, *options) in enumerate(boxes, start=1)
        ],
    }


def found(image, category, box, score):
    mask = np.zeros((SIZE, SIZE), bool)
    x, y, w, h = (round(number) for number in box)
    mask[y : y + h, x : x + w] = True
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "score": score,
        "segmentation": encode_mask(mask),
    }


A, B = (10, 10, 50, 50), (100, 100, 40, 40)
TRUTH = make_annotations((1, 1, A), (2, 1, B))
CROWD = make_annotations((1, 1, A), (1, 1, B, {"iscrowd": 1}))
BY_HAND = {
    "perfect": (TRUTH, [found(1, 1, A, 0.9), found(2, 1, B, 0.8)], 1),
    "half are found": (TRUTH, [found(1, 1, A, 0.9)], 51 / 101),  # precision 1 at recalls 0, .01, … .50
    "none are found": (TRUTH, [found(1, 1, (150, 10, 9, 9), 0.9)], 0),
    "no detections": (TRUTH, [], 0),
    "a better score elsewhere": (make_annotations((1, 1, A)), [found(1, 1, B, 0.9), found(1, 1, A, 0.8)], 0.5),
    "twice": (TRUTH, [found(1, 1, A, 0.9), found(1, 1, A, 0.8), found(2, 1, B, 0.7)], (51 + 50 * 2 / 3) / 101),
    "IoU of .72": (make_annotations((1, 1, A)), [found(1, 1, (10, 10, 50, 36), 0.9)], 0.5),  # .50, .55, … .70
    "wrong class": (TRUTH, [found(1, 7, A, 0.9), found(2, 7, B, 0.8)], 0),
    "detections on a crowd are ignored": (CROWD, [found(1, 1, B, 0.9), found(1, 1, B, 0.8), found(1, 1, A, 0.7)], 1),
    "a crowd need not be found": (CROWD, [found(1, 1, A, 0.9)], 1),
}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("case", BY_HAND)
def test_known_by_hand(case, iou_type, capsys):
    annotations, results, expected = BY_HAND[case]
    before = copy.deepcopy((annotations, results))
    metrics = evaluate_coco(annotations, results, iou_type=iou_type)
    assert list(metrics.numbers) == NAMES
    assert metrics.numbers["AP"] == pytest.approx(expected, abs=1e-9)
    assert [(entry.category_id, entry.name) for entry in metrics.per_class] == [(1, "class 1"), (7, "class 7")]
    assert metrics.per_class[0].ap == pytest.approx(expected, abs=1e-9)
    assert (metrics.per_class[1].ap, metrics.per_class[1].ap50) == (-1, -1)
    assert metrics.numbers["APs"] == -1 and metrics.numbers["APl"] == -1
    assert (annotations, results) == before
    assert capsys.readouterr().out == ""


def random_case(seed):
    """Objects of three sizes and crowds in twelve images, with detections near them."""
    rng = np.random.default_rng(seed)
    boxes, results = [], []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 7)):
            side = float(rng.choice([20, 60, 120]))
            box = [*rng.uniform(0, SIZE - side, 2).round(1).tolist(), side, side * 0.75]
            category = int(rng.choice([3, 5, 90]))
            boxes.append((image, category, box, {"iscrowd": int(rng.random() < 0.15)}))
            for _ in range(rng.integers(0, 3)):
                moved = (np.array(box) + rng.normal(0, side / 15, 4)).clip(0.5, SIZE - 1).tolist()
                results.append(found(image, category, moved, float(rng.random())))
    return make_annotations(*boxes, images=12, categories=(3, 5, 44, 90)), results


def run_pycocotools(annotations, results, iou_type):
    """Runs pycocotools as documented. Returns its statistics, and AP and AP50 per class from its arrays."""
    truth = COCO()
    truth.dataset = copy.deepcopy(annotations)
    truth.createIndex()
    results = copy.deepcopy(results)
    if iou_type == "segm":
        for result in results:
            del result["bbox"]  # otherwise the area of the box would be used
    evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = [(precision[:, :, k].mean(), precision[0, :, k].mean()) for k in range(precision.shape[2])]
    return evaluation.stats, per_class


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocotools(iou_type, seed, capsys, tmp_path):
    annotations, results = random_case(seed)
    stats, per_class = run_pycocotools(annotations, results, iou_type)
    table = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))
    metrics = evaluate_coco(path, results, iou_type=iou_type)
    np.testing.assert_allclose(list(metrics.numbers.values()), stats, atol=1e-12)
    assert 0.2 < stats[0] < 0.95 and len(set(stats.round(6))) > 8
    np.testing.assert_allclose([(entry.ap, entry.ap50) for entry in metrics.per_class], per_class, atol=1e-12)
    assert metrics.per_class[2].ap == -1  # category 44 has no object
    assert format_metrics(metrics).splitlines() == table
    json.dumps(asdict(metrics))


def test_tables():
    metrics = evaluate_coco(TRUTH, [found(1, 1, A, 0.9)])
    lines = format_per_class(metrics).splitlines()
    assert lines == [
        "category     AP   AP50    APs    APm    APl",
        "class 1   0.505  0.505      –  0.505      –",
        "class 7       –      –      –      –      –",
    ]
    assert " Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = –" in format_metrics(metrics)


def test_annotation_id_0_counts():
    annotations = copy.deepcopy(TRUTH)
    for i, annotation in enumerate(annotations["annotations"]):
        annotation["id"] = i
    results = BY_HAND["perfect"][1]
    assert run_pycocotools(annotations, results, "bbox")[0][0] < 0.9  # pycocotools treats annotation id 0 as unmatched
    assert evaluate_coco(annotations, results).numbers["AP"] == pytest.approx(1)


def test_annotation_ids_twice_are_refused():
    annotations = copy.deepcopy(TRUTH)
    for annotation in annotations["annotations"]:
        annotation["id"] = 5
    with pytest.raises(DatasetError, match="image 2, annotation 5: duplicate annotation id"):
        evaluate_coco(annotations, BY_HAND["perfect"][1])


def test_other_limits_of_detections():
    metrics = evaluate_coco(TRUTH, BY_HAND["perfect"][1], max_detections=300)
    assert metrics.numbers["AP"] == pytest.approx(1) and metrics.numbers["AR300"] == pytest.approx(1)
    assert "maxDets=300 ] = 1.000" in format_metrics(metrics)
    crowded = [found(1, 1, B, 0.9)] * 11 + [found(1, 1, A, 0.5)]
    assert evaluate_coco(make_annotations((1, 1, A)), crowded, max_detections=11).numbers["AP"] == 0
    assert evaluate_coco(make_annotations((1, 1, A)), crowded, max_detections=12).numbers["AP"] > 0
    with pytest.raises(ValueError, match="above 10, got 10"):
        evaluate_coco(TRUTH, [], max_detections=10)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_missing_crowd_flag_and_area_are_filled_in(iou_type):
    annotations = copy.deepcopy(TRUTH)
    for annotation in annotations["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    metrics = evaluate_coco(annotations, BY_HAND["perfect"][1], iou_type=iou_type)
    assert metrics.numbers["AP"] == metrics.numbers["APm"] == pytest.approx(1)


def test_area_of_a_detected_mask_is_the_masks():
    """Unmatched detections whose area is outside a range are not false positives in that range."""
    line = found(1, 1, (100, 100, 3, 100), 0.9) | {"bbox": [0, 0, 150, 150]}
    results = [line, found(1, 1, A, 0.8)]
    metrics = evaluate_coco(make_annotations((1, 1, A)), results, iou_type="segm")
    assert metrics.numbers["APm"] == pytest.approx(1) and metrics.numbers["AP"] == pytest.approx(0.5)


def test_some_images_only():
    results = [found(1, 1, A, 0.9)]
    assert evaluate_coco(TRUTH, results, image_ids=[1]).numbers["AP"] == pytest.approx(1)
    assert evaluate_coco(TRUTH, results, image_ids=[2]).numbers["AP"] == 0
    with pytest.raises(ValueError, match=r"image_ids has \[3\]"):
        evaluate_coco(TRUTH, results, image_ids=[1, 3])


def changed(**values):
    return [found(1, 1, A, 0.9), found(2, 1, B, 0.9) | values]


BAD_RESULTS: dict[str, Any] = {
    "score": ("bbox", changed(score=float("nan")), "image 2 has a score of nan"),
    "no score": ("bbox", changed(score=None), "image 2 has a score of None"),
    "box": ("bbox", changed(bbox=[0, float("inf"), 1, 1]), r"image 2 has the bbox \[0, inf, 1, 1\]"),
    "size": ("bbox", changed(bbox=[5, 5, -1, 1]), "image 2 .* not negative"),
    "no box": ("bbox", changed(bbox=None), "image 2 has no bbox"),
    "short box": ("bbox", changed(bbox=[1, 2, 3]), "image 2 has no bbox of four"),
    "image": ("bbox", changed(image_id=9), "no image 9"),
    "no image": ("bbox", changed(image_id=None), r"results\[1\] on image None has the image_id None"),
    "category": ("bbox", changed(category_id=3), "image 2 has category 3"),
    "no mask": ("segm", changed(segmentation=None), "image 2 has no segmentation"),
    "mask size": ("segm", changed(segmentation=encode_mask(np.ones((4, 5), bool))), r"size \[4, 5\].* is \[200, 200\]"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_named(case):
    iou_type, results, message = BAD_RESULTS[case]
    with pytest.raises(ValueError, match=message):
        evaluate_coco(TRUTH, results, iou_type=iou_type)


def with_annotation(**values):
    return make_annotations((1, 1, A), (2, 1, B, values))


BAD_ANNOTATIONS = {
    "box": ("bbox", with_annotation(bbox=[0, 0, float("nan"), 1]), "image 2, annotation 2: wrong box: .*nan"),
    "area": ("bbox", with_annotation(area=float("nan")), "image 2, annotation 2: wrong area: .*nan"),
    "image": ("bbox", with_annotation(image_id=7), "image 7, annotation 2: unknown image"),
    "category": ("bbox", with_annotation(category_id=2), "image 2, annotation 2: unknown category: .* 2,"),
    "no mask": ("segm", with_annotation(segmentation=[]), "annotation 2 of image 2 has no segmentation"),
    "odd polygon": ("segm", with_annotation(segmentation=[[]]), "image 2, annotation 2: polygon with fewer"),
    "no images": ("bbox", TRUTH | {"images": []}, '"images" is empty'),
    "no categories": ("bbox", TRUTH | {"categories": []}, '"categories" is empty'),
    "no size": ("segm", TRUTH | {"images": [{"id": 1}, {"id": 2}]}, 'image 1: missing key: there is no "width"'),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotations_are_named(case):
    iou_type, annotations, message = BAD_ANNOTATIONS[case]
    with pytest.raises(ValueError, match=message):
        evaluate_coco(annotations, BY_HAND["perfect"][1], iou_type=iou_type)


def test_uncompressed_run_lengths_of_a_crowd():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[100:140, 100:140] = True
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    crowd = {"iscrowd": 1, "segmentation": {"size": [SIZE, SIZE], "counts": counts}}
    annotations = make_annotations((1, 1, A), (1, 1, B, crowd))
    metrics = evaluate_coco(annotations, BY_HAND["detections on a crowd are ignored"][1], iou_type="segm")
    assert metrics.numbers["AP"] == pytest.approx(1)


# Converting a detector's output to results.

CANVAS = (64, 96)


def make_images(sizes, originals=None):
    b = len(sizes)
    sizes = np.array(sizes, np.int32)
    return Images(
        np.zeros((b, *CANVAS, 3), np.uint8),
        sizes,
        original_sizes=sizes if originals is None else np.array(originals, np.int32),
        indices=np.arange(b, dtype=np.int32)[::-1].copy(),
        valid=np.ones(b, bool),
        canvas=CANVAS,
    )


def make_detections(seed=0, b=2, n=5, masks=True):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-5, 40, (b, n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 50, (b, n, 2))], -1).astype(np.float32)
    return Detections(
        boxes=boxes,
        scores=np.sort(rng.random((b, n), np.float32))[:, ::-1].copy(),
        labels=rng.integers(0, 2, (b, n), dtype=np.int32),
        valid=rng.random((b, n)) < 0.7,
        masks=rng.random((b, n, 7, 7), np.float32) if masks else None,
    )


IDS: dict[str, Any] = {"image_ids": [139, 285], "category_ids": [1, 17]}


def test_results_of_a_batch():
    detections, images = make_detections(), make_images([(60, 90), (50, 70)])
    assert detections.masks is not None
    results = to_coco_results(detections, images, **IDS)
    rows = np.argwhere(detections.valid)
    assert len(results) == len(rows) > 4
    for result, (i, row) in zip(results, rows, strict=True):
        x0, y0, x1, y1 = detections.boxes[i, row]
        assert result["image_id"] == IDS["image_ids"][1 - i]  # the batch has the dataset's images in reverse order
        assert result["category_id"] == IDS["category_ids"][detections.labels[i, row]]
        assert result["score"] == pytest.approx(detections.scores[i, row])
        np.testing.assert_allclose(result["bbox"], [x0, y0, x1 - x0, y1 - y0], rtol=1e-5, atol=1e-5)
        h, w = images.sizes[i].tolist()
        pasted = paste_masks(
            jnp.asarray(detections.masks[i, row])[None], jnp.asarray(detections.boxes[i, row])[None], image_size=(h, w)
        )
        assert result["segmentation"] == encode_mask(np.asarray(pasted[0]) > 0.5)
    assert sum(rle.area(result["segmentation"]) for result in results) > 500
    json.dumps(results, allow_nan=False)


def test_padding_gives_nothing():
    detections, images = make_detections(), make_images([(60, 90), (50, 70)])
    all_results = to_coco_results(detections, images, **IDS)
    images = replace(images, valid=np.array([True, False]))
    assert to_coco_results(detections, images, **IDS) == all_results[: detections.valid[0].sum()]
    nothing = replace(detections, valid=np.zeros_like(detections.valid))
    assert to_coco_results(nothing, images, **IDS) == []
    # Invalid rows may hold anything.
    boxes = np.where(detections.valid[..., None], detections.boxes, np.nan).astype(np.float32)
    labels = np.where(detections.valid, detections.labels, -1).astype(np.int32)
    assert to_coco_results(replace(detections, boxes=boxes, labels=labels), images, **IDS)


def test_many_masks_are_pasted_in_chunks():
    detections, images = make_detections(n=20), make_images([(60, 90), (50, 70)])
    detections = replace(detections, valid=np.ones_like(detections.valid))
    results = to_coco_results(detections, images, **IDS)
    for i, row in ((0, 3), (0, 17), (1, 2), (1, 19)):
        valid = np.zeros_like(detections.valid)
        valid[i, row] = True
        assert to_coco_results(replace(detections, valid=valid), images, **IDS) == [results[i * 20 + row]]


@pytest.mark.parametrize("masks", [True, False])
def test_originals_that_were_shrunk(masks):
    """Boxes and masks are in the frame of the original image, as if it had not been shrunk."""
    detections = make_detections(masks=masks)
    shrunk = make_images([(60, 90), (50, 70)], originals=[(60, 90), (100, 280)])
    scale = np.array([[1, 1, 1, 1], [4, 2, 4, 2]], np.float32)
    whole = make_images([(60, 90), (100, 280)])
    expected = to_coco_results(replace(detections, boxes=detections.boxes * scale[:, None]), whole, **IDS)
    results = to_coco_results(detections, shrunk, **IDS)
    assert results == expected
    assert ("segmentation" in results[-1]) == masks
    if masks:
        assert results[0]["segmentation"]["size"] == [60, 90] and results[-1]["segmentation"]["size"] == [100, 280]


def test_detections_of_the_truth_itself_are_perfect():
    boxes = np.array([[[10, 10, 40, 30], [50, 5, 90, 55]]], np.float32)
    ones = np.ones((1, 2), np.float32)
    detections = Detections(boxes, ones, np.array([[0, 1]], np.int32), ones > 0, np.ones((1, 2, 28, 28), np.float32))
    annotations = make_annotations((1, 1, (10, 10, 30, 20)), (1, 7, (50, 5, 40, 50)), images=1)
    annotations["images"][0] |= {"height": 60, "width": 90}
    results = to_coco_results(detections, make_images([(60, 90)]), image_ids=[1], category_ids=[1, 7])
    assert evaluate_coco(annotations, results).numbers["AP"] == pytest.approx(1)
    # Pasted masks extend one pixel further, as in torchvision.
    assert evaluate_coco(annotations, results, iou_type="segm").numbers["AP75"] == pytest.approx(1)


def test_maps_must_cover_labels_and_images():
    detections, images = make_detections(masks=False), make_images([(60, 90), (50, 70)])
    with pytest.raises(ValueError, match="Label 1 has no category id: category_ids has 1"):
        to_coco_results(detections, images, image_ids=[1, 2], category_ids=[5])
    with pytest.raises(ValueError, match="Image 1 of the dataset has no image id: image_ids has 1"):
        to_coco_results(detections, images, image_ids=[1], category_ids=[5, 6])
    with pytest.raises(ValueError, match="one batch axis"):
        to_coco_results(make_detections(b=3), images, **IDS)


def test_results_file(tmp_path, monkeypatch):
    path = tmp_path / "detections.json"
    results = [found(1, 1, A, 0.9)]
    write_results(results, path)
    assert read_results(path) == results and os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results([{"score": float("nan")}], path)
    assert read_results(path) == results and os.listdir(tmp_path) == [path.name]
    for content in ("{}", "[1]", "[{"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"detections\.json is not"):
            read_results(path)
