"""Error analysis: cases with costs computed by hand, and the AP of pycocotools to the last bit."""

import numpy as np
import pytest

from detectax_eqx.evaluate import (
    ERROR_KINDS,
    IGNORED,
    RIGHT,
    analyze_errors,
    calibration,
    class_rows,
    confusion_matrix,
    error_rows,
    evaluate_coco,
    format_errors,
)

from .test_evaluate import found, make_annotations, random_case


A, B, C = (10, 10, 50, 50), (100, 100, 40, 40), (120, 10, 40, 40)
A_LOW = (10, 10, 50, 20)  # IoU .4 with A
A_LOWER = (10, 10, 50, 16)  # IoU .32 with A
NOWHERE = (10, 150, 20, 20)
ONE = make_annotations((1, 1, A))
TWO = make_annotations((1, 1, A), (1, 1, B))
BOTH_CLASSES = make_annotations((1, 1, A), (1, 7, B))
HALF = 51 / 101  # precision 1 up to recall .5
# (annotations, results, AP, nonzero costs). If two classes have objects, AP is their mean.
BY_HAND = {
    "perfect": (TWO, [found(1, 1, A, 0.9), found(1, 1, B, 0.8)], 1, {}),
    "nothing found": (TWO, [], 0, {"missed": 1}),
    "one of two found": (TWO, [found(1, 1, A, 0.9)], HALF, {"missed": 1 - HALF}),
    "wrong class": (
        BOTH_CLASSES,
        [found(1, 1, A, 0.9), found(1, 1, B, 0.8)],
        0.5,
        {"classification": 0.5},
    ),
    # Of two detections that could be corrected, the one with the higher score is, and the other is removed.
    "wrong class twice": (ONE, [found(1, 7, A, 0.9), found(1, 7, A, 0.8)], 0, {"classification": 1}),
    "the better one is corrected": (
        ONE,
        [found(1, 7, A, 0.9), found(1, 1, NOWHERE, 0.85), found(1, 7, A, 0.8)],
        0,
        {"classification": 1},
    ),
    "an object is not found twice by mending": (
        TWO,
        [found(1, 1, A, 0.9), found(1, 7, A, 0.8)],
        HALF,
        {"missed": 1 - HALF},
    ),
    # The object is already found, so fixing the error can only remove the detection.
    "wrong class of what was found": (
        make_annotations((1, 1, A), (2, 7, B)),
        [found(1, 1, A, 0.9), found(1, 7, A, 0.8), found(2, 7, B, 0.7)],
        (1 + 0.5) / 2,
        {"classification": 0.25},
    ),
    "badly placed": (ONE, [found(1, 1, A_LOW, 0.9)], 0, {"localization": 1}),
    "badly placed twice": (ONE, [found(1, 1, A_LOW, 0.9), found(1, 1, A_LOWER, 0.95)], 0, {"localization": 1}),
    "badly placed, then well": (ONE, [found(1, 1, A_LOW, 0.9), found(1, 1, A, 0.8)], 0.5, {"localization": 0.5}),
    # The object is missed, because no error that could be corrected refers to it.
    "badly placed and of the wrong class": (ONE, [found(1, 7, A_LOW, 0.9)], 0, {"missed": 1}),
    "badly placed, wrong, and in the way": (
        make_annotations((1, 1, A), (2, 7, B)),
        [found(1, 1, A, 0.9), found(1, 7, A_LOW, 0.8), found(2, 7, B, 0.7)],
        0.75,
        {"both": 0.25},
    ),
    "found twice": (
        TWO,
        [found(1, 1, A, 0.9), found(1, 1, A, 0.8), found(1, 1, B, 0.7)],
        (51 + 50 * 2 / 3) / 101,
        {"duplicate": 1 - (51 + 50 * 2 / 3) / 101},
    ),
    "background": (ONE, [found(1, 1, NOWHERE, 0.9), found(1, 1, A, 0.8)], 0.5, {"background": 0.5}),
    "background on another image": (ONE, [found(2, 1, A, 0.9), found(1, 1, A, 0.8)], 0.5, {"background": 0.5}),
    # Without the missed object, no object is left but a false detection is: AP stays 0.
    "missed, and background": (ONE, [found(1, 1, NOWHERE, 0.9)], 0, {}),
    "on a crowd": (
        make_annotations((1, 1, A), (1, 1, B, {"iscrowd": 1})),
        [found(1, 1, B, 0.9), found(1, 1, B, 0.8), found(1, 1, A, 0.7)],
        1,
        {},
    ),
    "a crowd is not missed": (make_annotations((1, 1, A), (1, 1, B, {"iscrowd": 1})), [found(1, 1, A, 0.9)], 1, {}),
    # Precision is 1/2 at recalls up to .5. It is 1 there without the background, and 1/2 everywhere without the miss.
    "background, and missed": (
        TWO,
        [found(1, 1, NOWHERE, 0.9), found(1, 1, A, 0.8)],
        HALF / 2,
        {"background": HALF / 2, "missed": 0.5 - HALF / 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("case", BY_HAND)
def test_known_by_hand(case, iou_type):
    annotations, results, ap, costs = BY_HAND[case]
    analysis = analyze_errors(annotations, results, iou_type=iou_type)
    assert analysis.ap == pytest.approx(ap, abs=1e-9)
    assert list(analysis.costs) == list(ERROR_KINDS)
    assert analysis.costs == pytest.approx({kind: costs.get(kind, 0) for kind in ERROR_KINDS}, abs=1e-9)
    assert analysis.ap == evaluate_coco(annotations, results, iou_type=iou_type).numbers["AP50"]


def test_all_false_and_all_not_found():
    analysis = analyze_errors(*BY_HAND["background, and missed"][:2])
    assert analysis.false_positive_cost == pytest.approx(HALF / 2, abs=1e-9)
    assert analysis.false_negative_cost == pytest.approx(0.5 - HALF / 2, abs=1e-9)
    # The object of a classification error does not count as missed, but it is still not found.
    analysis = analyze_errors(ONE, [found(1, 7, A, 0.9)])
    assert analysis.costs["missed"] == 0 and analysis.false_negative_cost == 1


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_starts_from_the_ap_of_pycocotools(seed, iou_type):
    annotations, results = random_case(seed)
    results = [result | {"score": round(result["score"], 1)} for result in results]  # ties
    for image_ids in (None, [2, 3, 5, 7, 11]):
        analysis = analyze_errors(annotations, results, iou_type=iou_type, image_ids=image_ids)
        metrics = evaluate_coco(annotations, results, iou_type=iou_type, image_ids=image_ids)
        assert analysis.ap == metrics.numbers["AP50"]
        assert analysis.class_ap.tolist() == [entry.ap50 for entry in metrics.per_class]
        assert 0.1 < analysis.ap < 1
    analysis = analyze_errors(annotations, results, iou_type=iou_type, foreground_iou=0.75)
    assert analysis.ap == evaluate_coco(annotations, results, iou_type=iou_type).numbers["AP75"]


def naive_verdicts(annotations, results, foreground, background):
    """The kinds of errors from their definitions, with plain loops, for boxes without crowds."""

    def iou(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(0, w) * max(0, h)
        return shared / (a[2] * a[3] + b[2] * b[3] - shared)

    objects, verdicts = annotations["annotations"], {}
    taken, mendable = set(), set()
    for i in sorted(range(len(results)), key=lambda i: -results[i]["score"]):
        result = results[i]
        here = [(k, iou(result["bbox"], o["bbox"])) for k, o in enumerate(objects)
                if o["image_id"] == result["image_id"]]  # fmt: skip
        own = [(k, v) for k, v in here if objects[k]["category_id"] == result["category_id"]]
        other = [(k, v) for k, v in here if objects[k]["category_id"] != result["category_id"]]
        free = [(v, k) for k, v in own if v >= foreground and k not in taken]
        best_own = max(own, key=lambda kv: kv[1], default=(None, 0))
        best_other = max(other, key=lambda kv: kv[1], default=(None, 0))
        if free:
            verdicts[i] = "right"
            taken.add(max(free)[1])
        elif background <= best_own[1] < foreground:
            verdicts[i] = "localization"
            mendable.add(best_own[0])
        elif best_other[1] >= foreground:
            verdicts[i] = "classification"
            mendable.add(best_other[0])
        elif best_own[1] >= foreground:
            verdicts[i] = "duplicate"
        elif max(best_own[1], best_other[1]) < background:
            verdicts[i] = "background"
        else:
            verdicts[i] = "both"
    missed = set(range(len(objects))) - taken - mendable
    return verdicts, {objects[k]["id"] for k in missed}


def muddled_case(seed):
    """Many detections, shifted and of random classes, without crowds."""
    annotations, results = random_case(seed)
    rng = np.random.default_rng(seed + 100)
    for annotation in annotations["annotations"]:
        annotation["iscrowd"] = 0
    for result in [*results]:
        x, y, w, h = result["bbox"]
        box = [x + rng.normal(0, w / 3), y + rng.normal(0, h / 3), w, h]
        category = int(rng.choice([3, 5, 44, 90]))
        if rng.random() < 0.2:
            box = [*rng.uniform(0, 190, 2), 10, 10]
        results.append({**result, "bbox": box, "category_id": category, "score": float(rng.random())})
    return annotations, results


@pytest.mark.parametrize("seed", range(3))
def test_verdicts_are_those_of_the_definitions(seed):
    annotations, results = muddled_case(seed)
    verdicts, missed = naive_verdicts(annotations, results, 0.5, 0.1)
    rows = error_rows(analyze_errors(annotations, results))
    assert {row["result"]: row["verdict"] for row in rows if row["verdict"] != "missed"} == verdicts
    assert {row["annotation"] for row in rows if row["verdict"] == "missed"} == missed
    assert {*verdicts.values(), "missed"} == {"right", *ERROR_KINDS}


def test_thresholds_decide():
    placed = [found(1, 1, A_LOW, 0.9)]  # IoU .4
    assert analyze_errors(ONE, placed, foreground_iou=0.4).ap == pytest.approx(1)
    assert analyze_errors(ONE, placed, background_iou=0.4).costs["localization"] == pytest.approx(1)
    assert analyze_errors(ONE, placed, background_iou=0.41).costs["localization"] == 0
    for background, foreground in ((0.5, 0.5), (0, 0.5), (0.1, 1.1)):
        with pytest.raises(ValueError, match="background_iou must be above 0 and below foreground_iou"):
            analyze_errors(ONE, placed, background_iou=background, foreground_iou=foreground)


def test_only_the_best_detections_of_a_class_count():
    results = [found(1, 1, NOWHERE, 0.9), found(1, 1, NOWHERE, 0.8), found(1, 1, A, 0.7), found(1, 7, B, 0.1)]
    analysis = analyze_errors(ONE, results, max_detections=2)
    assert sorted(analysis.detections.results) == [0, 1, 3]
    assert analysis.ap == 0 and analyze_errors(ONE, results, max_detections=3).ap == pytest.approx(1 / 3)


def test_details_of_each_verdict():
    annotations = make_annotations((1, 1, A), (1, 7, B), (2, 1, C), (2, 1, B, {"iscrowd": 1}))
    results = [
        found(1, 1, A, 0.9),
        found(1, 7, A_LOW, 0.8),
        found(1, 1, B, 0.7),
        found(2, 1, B, 0.6),
        found(2, 1, NOWHERE, 0.5),
    ]
    analysis = analyze_errors(annotations, results)
    table = analysis.detections
    order = np.argsort(table.results)
    kind = ERROR_KINDS.index
    assert table.verdicts[order].tolist() == [RIGHT, kind("both"), kind("classification"), IGNORED, kind("background")]
    about = [analysis.objects.annotation_ids[row] if row >= 0 else None for row in table.objects[order]]
    assert about == [1, 1, 2, None, None]
    np.testing.assert_allclose(table.ious[order], [1, 0.4, 1, 0, 0], atol=1e-9)
    assert analysis.objects.missed.sum() == 1 and analysis.objects.found.sum() == 1
    rows = error_rows(analysis)
    assert [row["verdict"] for row in rows].count("ignored") == 1
    assert rows[-1] == {
        "image_id": 2, "category": "class 1", "verdict": "missed", "score": None, "iou": None, "object": "class 1",
        "result": None, "annotation": 3,
    }  # fmt: skip
    by_class = class_rows(analysis)
    assert [(row["category"], row["objects"], row["detections"]) for row in by_class] == [
        ("class 1", 2, 3),
        ("class 7", 1, 1),
    ]
    assert by_class[1]["ap"] == 0
    lines = format_errors(analysis).splitlines()
    assert lines[0] == f"AP at IoU 0.50: {100 * analysis.ap:.1f}"
    assert [line.split()[:2] for line in lines[2:8]] == [
        ["classification", "1"], ["localization", "0"], ["both", "1"], ["duplicate", "0"], ["background", "1"],
        ["missed", "1"],
    ]  # fmt: skip


def test_costs_of_classes_average_to_the_cost():
    annotations, results = muddled_case(0)
    analysis = analyze_errors(annotations, results)
    counted = analysis.class_ap >= 0
    assert counted.sum() == 3
    np.testing.assert_allclose(analysis.class_costs[counted].mean(axis=0), list(analysis.costs.values()), atol=1e-12)
    assert (analysis.class_costs[~counted] == 0).all()
    assert min(analysis.costs.values()) >= 0 and max(analysis.costs.values()) > 0.05


def test_confusion():
    annotations = make_annotations((1, 1, A), (1, 7, B), (2, 1, C), (2, 7, A))
    results = [
        found(1, 1, A, 0.9),  # right
        found(1, 7, A, 0.8),  # of another class; the object is already found
        found(1, 1, B, 0.7),  # class 7 called class 1
        found(1, 1, B, 0.65),  # again; the object is already claimed
        found(2, 7, NOWHERE, 0.6),
        found(2, 1, C, 0.4),  # right, with a low score
    ]
    analysis = analyze_errors(annotations, results)
    assert confusion_matrix(analysis).tolist() == [[1, 0, 1], [1, 0, 1], [1, 2, 0]]
    assert confusion_matrix(analysis, score_threshold=0.4).tolist() == [[2, 0, 0], [1, 0, 1], [1, 2, 0]]
    assert confusion_matrix(analysis, score_threshold=1).tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_calibration_by_hand():
    annotations = make_annotations((1, 1, A), (1, 1, B), (1, 1, C, {"iscrowd": 1}))
    results = [
        found(1, 1, A, 1.0),
        found(1, 1, B, 0.95),
        found(1, 1, NOWHERE, 0.92),
        found(1, 1, C, 0.91),  # on a crowd
        found(2, 1, A, 0.15),
    ]
    result = calibration(analyze_errors(annotations, results), num_bins=10)
    assert result.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 3]
    assert result.scores[[1, 9]] == pytest.approx([0.15, (1 + 0.95 + 0.92) / 3])
    assert result.precision[[1, 9]] == pytest.approx([0, 2 / 3])
    assert result.error == pytest.approx((0.15 + 3 * ((1 + 0.95 + 0.92) / 3 - 2 / 3)) / 4)
    empty = calibration(analyze_errors(annotations, []))
    assert empty.error == 0 and empty.counts.sum() == 0
