"""OKS of keypoints: by hand, against pycocotools, and input that pycocotools does not check."""

import copy
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectax_eqx import Detections, Images
from detectax_eqx.evaluate import evaluate_coco, format_metrics, format_per_class, read_results, to_coco_results
from detectax_eqx.zoo import published


PERSON = published("keypoint_rcnn_resnet50_fpn").categories[0]
NUMBERS = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]


def annotations_of(objects, keypoints):
    """One image with objects `(box, points, options)`."""
    return {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "thing", "keypoints": list(keypoints)}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "keypoints": points}
            | options
            for i, (box, points, options) in enumerate(objects, start=1)
        ],
    }


def result_of(points, score, image=1, category=1):
    return {"image_id": image, "category_id": category, "keypoints": points, "score": score}


BOX, PAIR = [10, 10, 100, 100], [20, 30, 2, 90, 80, 1]


def test_one_object_by_hand():
    """Two points, each off by a distance at which its part of OKS is exp(-1/8) = .882 or exp(-1/2) = .607."""
    truth = annotations_of([(BOX, PAIR, {})], "ab")
    sigma, side = 0.05, 100.0
    for factor, oks in ((0.5, np.exp(-1 / 8)), (1.0, np.exp(-1 / 2))):
        moved = [float(number) for number in PAIR]
        moved[0] += factor * 2 * sigma * side
        moved[4] -= factor * 2 * sigma * side
        numbers = evaluate_coco(truth, [result_of(moved, 0.9)], iou_type="keypoints").numbers
        thresholds = sum(oks >= threshold for threshold in np.linspace(0.5, 0.95, 10))
        assert numbers["AP"] == pytest.approx(thresholds / 10) and numbers["AP50"] == pytest.approx(1)
        assert (numbers["APm"], round(numbers["AP75"], 9)) == (-1, float(oks >= 0.75))
    # Points that are not labelled do not count, and other sigmas change the figure.
    hidden = annotations_of([(BOX, [*PAIR[:3], 0, 0, 0], {})], "ab")
    assert evaluate_coco(hidden, [result_of([20, 30, 1, 199, 1, 1], 0.9)], iou_type="keypoints").numbers["AP"] > 0.999
    moved = result_of([30, 30, 1, 80, 80, 1], 0.9)
    strict = evaluate_coco(truth, [moved], iou_type="keypoints", keypoint_sigmas=(0.01, 0.01))
    lenient = evaluate_coco(truth, [moved], iou_type="keypoints", keypoint_sigmas=(0.5, 0.5))
    assert (strict.numbers["AP"], round(lenient.numbers["AP"], 9)) == (0, 1)


def random_case(seed):
    """Persons of three sizes, some crowds and some without labelled points, with detections near them."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, 9):
        for _ in range(rng.integers(0, 6)):
            side = float(rng.choice([20, 60, 150]))
            box = [*rng.uniform(0, 200 - side, 2).round(1).tolist(), side, side * 0.75]
            places = rng.uniform(box[:2], np.add(box[:2], box[2:]), (17, 2)).round(1)
            visibility = rng.integers(0, 3, (17, 1)) * (rng.random() < 0.85)
            points = np.concatenate([places, visibility], axis=1).ravel().tolist()
            crowd = int(rng.random() < 0.1)
            annotations.append(
                {"image_id": image, "category_id": 1, "bbox": box, "area": side * side / 2, "iscrowd": crowd}
                | {"keypoints": points, "num_keypoints": int((visibility > 0).sum())}
            )
            for _ in range(rng.integers(0, 30 if image == 1 else 4)):
                moved = places + rng.normal(0, side * rng.uniform(0.01, 0.09), (17, 2))
                scored = np.concatenate([moved, rng.random((17, 1))], axis=1).ravel().tolist()
                results.append(result_of(scored, float(rng.random()), image))
    for id, annotation in enumerate(annotations, start=1):
        annotation["id"] = id
    images = [{"id": i, "width": 200, "height": 200} for i in range(1, 9)]
    person = {"id": 1, "name": "person", "keypoints": list(PERSON.keypoints)}
    return {"images": images, "annotations": annotations, "categories": [person]}, results


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_pycocotools(seed, capsys, tmp_path):
    annotations, results = random_case(seed)
    truth: Any = COCO()
    truth.dataset = copy.deepcopy(annotations)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    table = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))
    metrics = evaluate_coco(path, results, iou_type="keypoints")
    assert list(metrics.numbers) == NUMBERS and metrics.max_detections == 20
    np.testing.assert_allclose(list(metrics.numbers.values()), evaluation.stats, atol=1e-12)
    assert 0.1 < metrics.numbers["AP"] < 0.95 and len(set(evaluation.stats.round(6))) > 7
    assert format_metrics(metrics).splitlines() == table
    (person,) = metrics.per_class
    assert (person.ap, person.apm, person.apl) == tuple(metrics.numbers[name] for name in ("AP", "APm", "APl"))
    assert person.aps == -1 and "person" in format_per_class(metrics)
    json.dumps(asdict(metrics))
    fewer = evaluate_coco(path, results, iou_type="keypoints", max_detections=2)
    assert fewer.numbers["AR"] < metrics.numbers["AR"] and "maxDets=  2" in format_metrics(fewer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keypoints": None}, r"results\[0\] on image 1 has no keypoints of 6 numbers"),
        ({"keypoints": [1.0, 2.0, 3.0]}, "has no keypoints of 6 numbers"),
        ({"keypoints": [1.0, 2.0, 3.0, 4.0]}, "has the keypoints .* Make them one list of finite numbers"),
        ({"keypoints": [[1.0, 2.0, 3.0]] * 2}, "has the keypoints"),
        ({"keypoints": [np.nan] * 6}, "has the keypoints"),
        ({"keypoints": ["1"] * 6}, "has the keypoints"),
        ({"keypoints": [10**400] * 6}, "has the keypoints"),
        ({"keypoints": []}, "has the keypoints"),
        ({"image_id": 9}, "the annotations have no image 9"),
    ],
)
def test_bad_results_are_named(change, message):
    truth = annotations_of([(BOX, PAIR, {})], "ab")
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth, [result_of(PAIR, 0.5) | change], iou_type="keypoints")


def test_refusals():
    truth = annotations_of([(BOX, PAIR, {})], "ab")
    for sigmas in ((0.1,), (0.1, 0.0), (0.1, np.nan)):
        with pytest.raises(ValueError, match="keypoint_sigmas must be 2 positive numbers, one per point"):
            evaluate_coco(truth, [], iou_type="keypoints", keypoint_sigmas=sigmas)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate_coco(truth, [], iou_type="keypoints", max_detections=0)
    del truth["categories"][0]["keypoints"]
    with pytest.raises(ValueError, match=r"no category names keypoints\. Evaluate boxes instead"):
        evaluate_coco(truth, [], iou_type="keypoints")


def test_nothing_found_and_nothing_there():
    truth = annotations_of([(BOX, PAIR, {})], "ab")
    assert evaluate_coco(truth, [], iou_type="keypoints").numbers["AP"] == 0
    unlabelled = annotations_of([(BOX, [0] * 6, {})], "ab")
    numbers = evaluate_coco(unlabelled, [result_of(PAIR, 0.9)], iou_type="keypoints").numbers
    assert set(numbers.values()) == {-1}


def test_results_of_a_batch(tmp_path):
    """Keypoints are scaled to the original image, and their scores are not; the file can be read again."""
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(0, 50, (1, 2, 3, 3)).astype(np.float32)
    detections = Detections(
        np.array([[[1, 2, 30, 40]] * 2], np.float32),
        np.array([[0.9, 0.5]], np.float32),
        np.zeros((1, 2), np.int32),
        np.array([[True, False]]),
        keypoints=keypoints,
    )
    sizes, originals = np.array([[40, 60]], np.int32), np.array([[80, 240]], np.int32)
    index = np.zeros(1, np.int32)
    images = Images(np.zeros((1, 64, 64, 3), np.uint8), sizes, originals, index, index == 0, canvas=(64, 64))
    (result,) = to_coco_results(detections, images, image_ids=[5], category_ids=[1])
    points = np.reshape(result["keypoints"], (3, 3))
    np.testing.assert_allclose(points, keypoints[0, 0] * [4, 2, 1], rtol=1e-6)
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([result]))
    assert read_results(path) == [result]
    path.write_text(json.dumps([result | {"keypoints": "x"}]))
    with pytest.raises(ValueError, match=r"detections\.json: results\[0\] on image 5 has the keypoints 'x'"):
        read_results(path)
