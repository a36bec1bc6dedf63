"""Training, evaluation, analysis and report share one checked dataset as ground truth, and take results in any form."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from pycocotools import mask as rle

from detectax_eqx import data, evaluate
from detectax_eqx.data import DatasetError, decode_counts, encode_segmentation, load_annotations, parse_segmentation

from . import tiny_train
from .malformed import annotations as malformed
from .test_evaluate import A, B, found, make_annotations, random_case, rectangle, run_pycocotools
from .test_report import content_of


COCO_MINI = Path(__file__).parents[2] / "shared" / "data" / "coco-mini" / "annotations" / "instances_val2017.json"
KINDS = ("bbox", "segm")
_shared = tiny_train._shared  # makes the scripts importable


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Annotations and images of a few shapes; the objects, moved by up to two pixels, serve as detections."""
    folder = tmp_path_factory.mktemp("truth")
    annotations, images = data.write_shapes_dataset(folder, num_images=6, seed=3, image_size=(64, 96))
    content = json.loads(annotations.read_text())
    results = []
    for i, entry in enumerate(content["annotations"]):
        x, y, width, height = entry["bbox"]
        encoded = encode_segmentation(parse_segmentation(entry["segmentation"], (64, 96)), (64, 96))
        mask = np.roll(data.decode_rle(encoded).astype(bool), i % 3, axis=1)
        ids = {"image_id": entry["image_id"], "category_id": entry["category_id"]}
        mask = {"segmentation": evaluate.encode_mask(mask)}
        results.append(ids | mask | {"bbox": [x + i % 3, y, width, height], "score": 1 - i / 100})
    return content, images, results


def numbers_of(metrics):
    return {kind: (one.numbers, one.per_class) for kind, one in metrics.items()}


# By reason of repair: an annotation's box and segmentation, and those that it counts with afterwards, or `None`.
SQUARE, WHOLE = [[30, 30, 40, 30, 40, 42, 30, 42]], [90, 30, 6, 12]
REPAIRS = {
    "box of no area": ([30, 30, -10, 12], SQUARE, None),
    "box outside the image": ([130, 30, 10, 12], SQUARE, None),
    "box partly outside": ([90, 30, 40, 12], [[90, 30, 130, 30, 130, 42, 90, 42]], (WHOLE, rectangle(*WHOLE))),
    "piece with fewer than 3 points": ([30, 30, 10, 12], [*SQUARE, [1, 1, 2, 2]], ([30, 30, 10, 12], SQUARE)),
}


@pytest.mark.parametrize("kind", REPAIRS)
def test_what_was_repaired_counts_as_repaired_everywhere(shapes, kind, tmp_path):
    from detectax_eqx.report import write_report

    content, images, results = shapes
    box, segmentation, repaired = REPAIRS[kind]
    extra = {"id": 9001, "image_id": 1, "category_id": 1, "iscrowd": 0}
    changed = copy.deepcopy(content)
    changed["annotations"].append(extra | {"bbox": box, "segmentation": segmentation})
    right = copy.deepcopy(content)
    if repaired is not None:
        right["annotations"].append(extra | {"bbox": repaired[0], "segmentation": repaired[1]})
        mask = encode_segmentation(parse_segmentation(repaired[1], (64, 96)), (64, 96))
        results = [*results, {"image_id": 1, "category_id": 1, "bbox": repaired[0], "segmentation": mask, "score": 0.3}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps(changed))
    dataset = data.load_coco(path, images)
    assert dataset.report.counts == {kind: 1}
    metrics = _shared.score_results(results, dataset, tmp_path, kinds=KINDS)
    assert list(metrics) == [*KINDS] and 0.3 < metrics["bbox"].numbers["AP"] < 1
    expected = {iou_type: evaluate.evaluate_coco(right, results, iou_type=iou_type) for iou_type in KINDS}
    assert numbers_of(metrics) == numbers_of(expected)
    for truth in (path, changed):
        again = {iou_type: evaluate.evaluate_coco(truth, results, iou_type=iou_type) for iou_type in KINDS}
        assert numbers_of(again) == numbers_of(metrics)
    for iou_type in KINDS:
        rows = [evaluate.error_rows(evaluate.analyze_errors(t, results, iou_type=iou_type)) for t in (dataset, right)]
        assert rows[0] == rows[1] and rows[0]
    write_report(tmp_path / "report.html", dataset, results, metrics)


def test_training_goes_on_with_a_repaired_validation_annotation(tmp_path):
    """Such a run used to fail after its first epoch, on a box of negative width that loading had dropped."""
    for name in ("train", "val"):
        data.write_shapes_dataset(tmp_path / name, num_images=4, seed=0, image_size=(64, 64))
    path = tmp_path / "val" / "annotations.json"
    clean = json.loads(path.read_text())
    extra = {"id": 9001, "image_id": 1, "category_id": 1, "bbox": [30, 30, -10, 12], "iscrowd": 0}
    path.write_text(json.dumps(clean | {"annotations": [*clean["annotations"], extra]}))
    output = train(tmp_path, tmp_path / "run", "--epochs", "1")
    assert "repaired: box of no area ×1" in output
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["bbox"]
    results = evaluate.read_results(tmp_path / "run" / "evaluation" / "detections.json")
    assert metrics["numbers"] == evaluate.evaluate_coco(clean, results).numbers


@pytest.mark.slow
def test_without_ground_truth_best_is_last(tmp_path):
    for name in ("train", "val"):
        data.write_shapes_dataset(tmp_path / name, num_images=4, seed=0, image_size=(64, 64))
    path = tmp_path / "val" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    output = train(tmp_path, tmp_path / "run", "--epochs", "2")
    output = re.sub(r"/pytest-\d+/", "/", output)  # paths are printed too
    assert "bbox_AP –, bbox_AP50 –" in output and "-1" not in output
    assert "best/ is the last checkpoint" in output
    steps = [sorted(step.name for step in (tmp_path / "run" / kind).iterdir())[-1] for kind in ("best", "last")]
    assert steps == ["00000004", "00000004"]


def train(shapes, output, *options):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"COLUMNS": "200"}
    command = tiny_train.command(shapes, output, "--warmup-steps", "1", *options)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def problems(call):
    """The kinds of problem that a call reports."""
    try:
        call()
    except DatasetError as error:
        return sorted(problem.kind for problem in error.problems) or str(error).partition(": ")[2]
    return None


def test_evaluation_refuses_what_loading_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that messages name the file and a dictionary alike
    path, refused = tmp_path / "annotations", 0
    for field in malformed.FIELDS:
        for what, value in malformed.VALUES.items():
            content = malformed.content()
            malformed.put(content, field, value)
            path.write_text(json.dumps(content))
            expected = problems(lambda: data.load_coco(path, tmp_path, check_images=False))
            if (field[-1] == "file_name" and what in ("missing", "null")) or (field, what) == (("images", 0), "object"):
                continue  # without reading images, no file name is needed
            for truth in (path.name, content):
                calls = [lambda t=truth: load_annotations(t), lambda t=truth: evaluate.evaluate_coco(t, [])]
                calls.append(lambda t=truth: evaluate.analyze_errors(t, []))
                for call in calls:
                    assert problems(call) == expected, (field, what)
            refused += expected is not None
    assert refused > 300


def test_odd_polygons_are_refused():
    annotations = make_annotations((1, 1, A, {"segmentation": [[5, 6, 25, 6, 25, 16, 5]]}))
    for iou_type in KINDS:
        with pytest.raises(DatasetError, match="image 1, annotation 1: polygon of odd length"):
            evaluate.evaluate_coco(annotations, [], iou_type=iou_type)


def test_polygons_that_never_end_are_refused():
    """pycocotools walks along the outline in steps of a fifth of a pixel."""
    annotations = make_annotations((1, 1, A, {"segmentation": [[0, 0, 9e8, 0, 9e8, 9e8]]}))
    with pytest.raises(DatasetError, match="annotation 1: wrong polygon: its outline is 27"):
        load_annotations(annotations)


def test_dictionaries_may_hold_arrays():
    annotations = make_annotations((1, 1, A), (2, 1, B))
    expected = evaluate.evaluate_coco(annotations, []).numbers
    for annotation in annotations["annotations"]:
        annotation |= {"bbox": np.array(annotation["bbox"]), "image_id": np.int64(annotation["image_id"])}
        mask = rle.encode(np.asfortranarray(np.ones((200, 200), np.uint8)))
        annotation["segmentation"] = mask  # its counts are bytes
    assert evaluate.evaluate_coco(annotations, []).numbers == expected
    with pytest.raises(DatasetError, match="JSON cannot hold: a set"):
        load_annotations(annotations | {"images": {1}})


def test_boxes_count_as_written_where_rounding_takes_them_out():
    annotations, results = random_case(0)
    for i, annotation in enumerate(annotations["annotations"]):
        annotation["bbox"][0] = [-0.0071, 200.0033 - annotation["bbox"][2], 1 / 3][i % 3]
        results[i % len(results)] |= {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        results[i % len(results)]["bbox"] = [annotation["bbox"][0] + 1.7, *annotation["bbox"][1:]]
    assert load_annotations(annotations).report.counts == {}
    stats, _ = run_pycocotools(annotations, results, "bbox")
    assert list(evaluate.evaluate_coco(annotations, results).numbers.values()) == stats.tolist()


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"{COCO_MINI} is not there")
@pytest.mark.parametrize("iou_type", KINDS)
def test_real_annotations_give_pycocotools_numbers_to_the_last_bit(iou_type):
    content, rng = json.loads(COCO_MINI.read_text()), np.random.default_rng(0)
    dataset = load_annotations(COCO_MINI)
    results = []
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        for k, segmentation in enumerate(objects.segmentations):
            mask = data.decode_rle(encode_segmentation(segmentation, (image.height, image.width))).astype(bool)
            moved = evaluate.encode_mask(np.roll(mask, rng.integers(-4, 5, 2), axis=(0, 1)))
            box = (objects.boxes_xywh[k] + rng.normal(0, 4, 4)).clip(0).tolist()
            ids = {"image_id": image.id, "category_id": dataset.category_ids[objects.labels[k]]}
            score = round(float(rng.random()), 2)  # ties
            results.append(ids | {"bbox": box, "segmentation": moved, "score": score})
    stats, _ = run_pycocotools(content, results, iou_type)
    metrics = evaluate.evaluate_coco(dataset, results, iou_type=iou_type)
    assert list(metrics.numbers.values()) == stats.tolist() and 0.3 < stats[0] < 0.9


@pytest.mark.parametrize("ids", [(2**53, 2**53 + 1), (2**63 - 1, 2**63 - 2), (-(2**63), 2**63 - 1), (0, -1)])
def test_large_ids_are_told_apart(ids):
    first, second = ids
    annotations = make_annotations((first, first, A), (second, second, B), images=0, categories=ids)
    annotations["images"] = [{"id": id, "width": 200, "height": 200} for id in ids]
    results = [found(first, first, A, 0.9), found(second, second, B, 0.8)]
    metrics = evaluate.evaluate_coco(annotations, results, image_ids=ids)
    assert metrics.numbers["AP"] == pytest.approx(1) and {entry.category_id for entry in metrics.per_class} == {*ids}
    analysis = evaluate.analyze_errors(annotations, results)
    assert sorted(analysis.detections.image_ids.tolist()) == sorted(ids) and analysis.ap == pytest.approx(1)
    alone = evaluate.evaluate_coco(annotations, results, image_ids=[second]).per_class
    assert {entry.category_id: entry.ap for entry in alone} == {first: -1, second: pytest.approx(1)}


def test_ids_beyond_64_bits_are_refused():
    for part, field in (("images", "id"), ("annotations", "id"), ("categories", "id")):
        annotations = make_annotations((1, 1, A))
        annotations[part][0][field] = 2**63
        with pytest.raises(DatasetError, match=f"id too large: .*{2**63}"):
            evaluate.evaluate_coco(annotations, [])
    with pytest.raises(ValueError, match=f"the annotations have no image {2**63}"):
        evaluate.evaluate_coco(make_annotations((1, 1, A)), [found(2**63, 1, A, 0.9)])


# Run lengths.

SIZE = 40, 60
RUNS = [
    ([10, 2391], "add up to 2401, not to 40·60"),
    ([10, 2389], "add up to 2399, not to 40·60"),
    ([2410, -10], "not all ≥ 0|negative run length, -10"),
    ([2**40], f"add up to {2**40}|too large|nor a list of integers"),
]


def compressed(counts):
    """COCO's compressed text for run lengths, whatever their sum."""
    text = ""
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        while True:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(bits + (32 if more else 0) + 48)
            if not more:
                break
    return text


@pytest.mark.parametrize("counts, message", RUNS)
@pytest.mark.parametrize("form", [list, compressed, lambda counts: compressed(counts).encode()])
def test_run_lengths_must_add_up(counts, message, form, tmp_path):
    """pycocotools loops forever on some of these."""
    truth = make_annotations((1, 1, A), images=1)
    truth["images"][0] |= {"height": SIZE[0], "width": SIZE[1]}
    mask = {"size": [*SIZE], "counts": form(counts)}
    bad = truth["annotations"][0] | {"segmentation": mask}
    results = [{"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [*A], "segmentation": mask}]
    for iou_type in KINDS:
        for function in (evaluate.evaluate_coco, evaluate.analyze_errors):
            with pytest.raises(ValueError, match=rf"results\[0\] on image 1 has a malformed .*({message})"):
                function(truth, results, iou_type=iou_type)
            with pytest.raises(DatasetError, match=f"image 1, annotation 1: malformed .*({message})"):
                function(truth | {"annotations": [bad]}, [], iou_type=iou_type)
    if not isinstance(mask["counts"], bytes):
        evaluate.write_results(results, tmp_path / "detections.json")
        with pytest.raises(ValueError, match=rf"detections.json: results\[0\] on image 1 has a .*({message})"):
            evaluate.read_results(tmp_path / "detections.json")


def test_many_texts_are_decoded_as_each_alone():
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 40, 2)) < rng.choice([0, 0.1, 0.5, 1]) for _ in range(200)]
    texts = [evaluate.encode_mask(mask)["counts"].encode() for mask in masks]
    runs, counts = decode_counts(texts)
    parts = np.split(runs, np.cumsum(counts)[:-1])
    for part, text, mask in zip(parts, texts, masks, strict=True):
        np.testing.assert_array_equal(part, decode_counts([text])[0])
        values = np.repeat(np.arange(len(part)) % 2 == 1, part)
        np.testing.assert_array_equal(values, mask.T.reshape(-1))
    assert [part.size for part in decode_counts([])] == [0, 0]


def test_forms_of_a_segmentation():
    mask = np.zeros((6, 9), bool)
    mask[1:4, 2:7] = True
    encoded = evaluate.encode_mask(mask)
    forms = [encoded, encoded | {"counts": encoded["counts"].encode()}, [[2, 1, 7, 1, 7, 4, 2, 4]]]
    forms += [encoded | {"counts": decode_counts([encoded["counts"].encode()])[0].tolist()}]
    forms += [(np.array([2, 1, 7, 1, 7, 4, 2, 4]),), [[2, 1, 7, 1, 7, 4, 2, 4], [1, 1, 2, 2]]]
    for form in forms:
        np.testing.assert_array_equal(
            data.decode_rle(encode_segmentation(parse_segmentation(form, (6, 9)), (6, 9))), mask
        )
    assert parse_segmentation(None, (6, 9)) is None and parse_segmentation([], (6, 9)) is None
    with pytest.raises(ValueError, match=r'malformed run-length encoding: its "size" is \[6, 9\]'):
        parse_segmentation(encoded, (9, 6))
    with pytest.raises(ValueError, match="box only"):
        encode_segmentation(None, (6, 9))


def test_results_may_hold_numpy_numbers_and_arrays():
    plain = [found(1, 1, A, 0.5), found(2, 1, B, 0.25)]
    results = [
        entry
        | {"image_id": np.int64(entry["image_id"]), "category_id": float(entry["category_id"])}
        | {"score": np.float32(entry["score"]), "bbox": np.array(entry["bbox"], np.float32)}
        for entry in plain
    ]
    truth = make_annotations((1, 1, A), (2, 1, B))
    for iou_type in KINDS:
        numbers = [evaluate.evaluate_coco(truth, each, iou_type=iou_type).numbers for each in (plain, results)]
        assert numbers[0] == numbers[1] and numbers[0]["AP"] == 1


# Scripts.


def run_evaluate(folder, *options):
    """evaluate.py on `truth.json` and `detections.json` of a folder, in this process."""
    import evaluate as script

    words = ["--annotations", folder / "truth.json", "--images", folder / "images", "--output", folder / "out"]
    words += ["--detections", folder / "detections.json", *options]
    with mock.patch.object(sys, "argv", ["evaluate.py", *map(str, words)]):
        _shared.run(script.main, script.Options, None)


@pytest.fixture
def crowded(tmp_path):
    """200 objects in one image, all of them detected."""
    annotations, images = data.write_shapes_dataset(tmp_path, num_images=1, image_size=(200, 400))
    content = json.loads(annotations.read_text())
    boxes = [[20.0 * (i % 20), 20.0 * (i // 20), 18.0, 18.0] for i in range(200)]
    ids = {"image_id": 1, "category_id": 1}
    content["annotations"] = [ids | {"id": i, "bbox": box} for i, box in enumerate(boxes, start=1)]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    results = [ids | {"bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    evaluate.write_results(results, tmp_path / "detections.json")
    return tmp_path, data.load_coco(tmp_path / "truth.json", images), results


def test_max_detections_reaches_scoring_and_report(crowded, capsys):
    folder, _, _ = crowded
    run_evaluate(folder)
    assert "maxDets=100 ] = 0.505" in capsys.readouterr().out
    run_evaluate(folder, "--max-detections", "300", "--report")
    lines = capsys.readouterr().out.splitlines()
    assert " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=300 ] = 1.000" in lines
    content = content_of(folder / "out" / "report.html")
    (view,) = content["views"]
    assert view["numbers"]["AR300"] == 1 and view["ap"] == pytest.approx(1) and view["counts"] == [0] * 8
    assert "300 detections" in content["meanings"]["AR300"]
    with pytest.raises(SystemExit, match="max_detections must be above 10, got 5"):
        run_evaluate(folder, "--max-detections", "5")


@pytest.mark.parametrize("limit, key, ap", [(300, "AR300", 1), (100, "AR100", 51 / 101), (5, "AR100", 3 / 101)])
def test_max_detections_reaches_both_halves(crowded, monkeypatch, tmp_path, limit, key, ap):
    _, dataset, results = crowded
    monkeypatch.setattr(_shared, "detect_dataset", lambda _, __, *, max_detections: results[:max_detections])
    detector = mock.Mock(model=mock.Mock(needs={"boxes"}))
    metrics = _shared.evaluate_on(detector, dataset, tmp_path / "out", max_detections=limit)
    assert key in metrics["bbox"].numbers and metrics["bbox"].numbers["AP"] == pytest.approx(ap)


def test_options_of_a_detector_are_refused_without_one(crowded):
    folder, _, _ = crowded
    with pytest.raises(SystemExit, match="--min-size, --score-threshold: with --detections no detector is run"):
        run_evaluate(folder, "--score-threshold", "0.5", "--min-size", "100")


def test_no_ground_truth_prints_dashes(crowded, capsys):
    folder, _, results = crowded
    content = json.loads((folder / "truth.json").read_text())
    (folder / "truth.json").write_text(json.dumps(content | {"annotations": []}))
    run_evaluate(folder, "--report")
    text = capsys.readouterr().out
    text = re.sub(r"/pytest-\d+/", "/", text)  # paths are printed too
    assert text.count("] = –") == 12 and "-1" not in text and "-100" not in text
    empty = load_annotations(folder / "truth.json")
    lines = evaluate.format_errors(evaluate.analyze_errors(empty, results)).splitlines()
    assert lines[0] == "AP at IoU 0.50: –" and all(line.endswith("–") for line in lines[2:])
    assert evaluate.evaluate_coco(empty, results).numbers["AP"] == -1  # it stays a number in JSON


@pytest.mark.parametrize("form", ["polygons", "run lengths", "text", "masks alone"])
def test_reports_take_every_form_of_mask(shapes, form, tmp_path, capsys):
    content, images, results = shapes
    results = copy.deepcopy(results)
    for i, result in enumerate(results):
        result["category_id"] = 3 if i % 3 == 0 else result["category_id"]  # errors to show
        if form == "polygons":
            x, y, width, height = result["bbox"]
            result["segmentation"] = rectangle(x, y, width, height)
        elif form == "run lengths":
            counts = decode_counts([result["segmentation"]["counts"].encode()])[0].tolist()
            result["segmentation"] = {"size": [64, 96], "counts": counts}
        elif form == "masks alone":
            del result["bbox"]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(images)
    evaluate.write_results(results, tmp_path / "detections.json")
    run_evaluate(tmp_path, "--report")
    found = content_of(tmp_path / "out" / "report.html")
    assert [view["name"] for view in found["views"]] == (["masks"] if form == "masks alone" else ["boxes", "masks"])
    shown = [detection for image in found["images"] for detection in image["detections"]]
    assert shown and all(detection["mask"] and len(detection["box"]) == 4 for detection in shown)
