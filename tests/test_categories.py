"""Classes are compared by id and name wherever a model is used with a file, or one file with another."""

import json
from unittest import mock

import pytest

from detectax_eqx import models, zoo
from detectax_eqx.data import Category, DatasetError, check_categories, read_categories

from . import tiny_train
from .malformed.options import detector_weights, make, shapes


def _categories(**names):
    return [Category(int(id[1:]), name) for id, name in names.items()]


MODEL = _categories(_1="cat", _3="dog", _4="bird")
# (categories of a file, whether all ids are required, part of the error message or None if there is no error)
CASES = [
    (MODEL, True, None),
    (MODEL[::-1], True, None),
    (_categories(_1="bird", _3="cat", _4="dog"), True, 'id 1 is "bird" in val.json and "cat" in the model'),
    (_categories(_1="cat", _3="dog", _4="Bird"), False, 'id 4 is "Bird" in val.json and "bird" in the model'),
    (MODEL[:2], True, r'id 4 \("bird"\) is only in the model'),
    (MODEL[:2], False, None),
    ([*MODEL, Category(9, "cow")], True, r'id 9 \("cow"\) is only in val.json'),
    ([*MODEL, Category(9, "cow")], False, None),
    (_categories(_1="cat", _5="dog"), False, '"dog" is id 5 in val.json and id 3 in the model'),
    (_categories(_7="cow", _8="hen"), False, r'id 7 \("cow"\) is only in val.json'),
    (_categories(_0="cat", _1="dog", _2="bird"), False, 'id 1 is "dog" in val.json and "cat" in the model'),
]


@pytest.mark.parametrize("found, same_ids, message", CASES)
def test_ids_and_names(found, same_ids, message):
    options = {"found_in": "val.json", "known_in": "the model", "same_ids": same_ids}
    if message is None:
        check_categories(found, MODEL, **options)
    else:
        with pytest.raises(DatasetError, match="val.json and the model disagree on categories: .*" + message):
            check_categories(found, MODEL, **options)
    ids = {category.id for category in found}, {category.id for category in MODEL}
    if ids[0] == ids[1] or (not same_ids and ids[0] & ids[1]):
        check_categories(found, MODEL, allow_renamed=True, **options)
    else:
        with pytest.raises(DatasetError, match="is only in"):
            check_categories(found, MODEL, allow_renamed=True, **options)


def test_a_long_list_has_an_end():
    found = [Category(id, f"x{id}") for id in range(80)]
    known = [Category(id, f"y{id}") for id in range(80)]
    with pytest.raises(
        DatasetError, match=r'id 2 is "x2" in a and "y2" in b, and 77 more\. .*--allow-renamed'
    ) as caught:
        check_categories(found, known, found_in="a", known_in="b")
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """The annotations of the shapes dataset, with the category names rotated by one."""
    content = json.loads(shapes()[0].read_text())
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], names[1:] + names[:1], strict=True):
        category["name"] = name
    path = tmp_path_factory.mktemp("renamed") / "renamed.json"
    path.write_text(json.dumps(content))
    assert [category.id for category in read_categories(path)] == [
        category.id for category in read_categories(shapes()[0])
    ]
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a run after one step that changed nothing and therefore needed no compilation."""
    folder = tmp_path_factory.mktemp("trained")
    with tiny_train.no_training():
        make("train", {}, folder)()
    return folder / "out"


def _refused(script, options, folder, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        make(script, options, folder)()
    text = str(caught.value)
    assert "\n" not in text and "--allow-renamed" in text, text
    assert 'id 1 is "square" in' in text and "renamed.json" in text, text
    return text


@pytest.mark.timeout(600)
def test_every_script_compares_them(renamed, trained, tmp_path, capsys):
    text = _refused("train", {"val-annotations": renamed, "val-images": shapes()[1]}, tmp_path, capsys)
    assert f'"circle" in {shapes()[0]}' in text
    resuming = {"output": trained, "resume": "flag", "train-annotations": renamed, "steps": 2}
    text = _refused("train", resuming, tmp_path, capsys)
    assert f'"circle" in {trained / "last"}' in text
    for script in ("evaluate", "predict"):
        options = {"checkpoint": trained, "annotations": renamed}
        assert '"circle" in the model' in _refused(script, options, tmp_path, capsys)


def test_labels_of_a_detector_without_names():
    """Labels map to categories by order if the numbers of classes agree, and by id otherwise."""
    detector = zoo.Predictor(mock.Mock(spec=models.FasterRCNN, num_classes=3))
    assert detector.category_ids(_categories(_1="cat", _3="dog", _4="bird")) == (1, 3, 4)
    assert detector.category_ids(_categories(_1="cat", _3="dog")) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"3 classes, but a\.json has 2 categories with ids up to 7"):
        detector.category_ids(_categories(_1="cat", _7="dog"), file="a.json")


def test_a_detector_compares_its_categories():
    detector = zoo.Predictor(mock.Mock(spec=models.FasterRCNN, num_classes=3), tuple(MODEL))
    assert detector.category_ids() == detector.category_ids(MODEL[:2]) == (1, 3, 4)
    moved = _categories(_1="bird", _3="cat", _4="dog")
    with pytest.raises(DatasetError, match=r"a\.json and the model disagree"):
        detector.category_ids(moved, file="a.json")
    assert detector.category_ids(moved, file="a.json", allow_renamed=True) == (1, 3, 4)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_option_allows_other_names(renamed, trained, tmp_path, capsys):
    allowed = {"checkpoint": trained, "annotations": renamed, "allow-renamed": "flag"}
    make("evaluate", allowed, tmp_path)()
    assert "square" in capsys.readouterr().out
    make("predict", allowed, tmp_path)()
    resuming = {"output": trained, "resume": "flag", "train-annotations": renamed, "steps": 2, "allow-renamed": "flag"}
    make("train", resuming, tmp_path)()
    # The model has the new names from here on.
    make("evaluate", allowed | {"allow-renamed": None}, tmp_path)()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_weights_without_names_say_what_their_labels_are_taken_for(tmp_path, capsys):
    make("evaluate", detector_weights(), tmp_path)()
    text = " ".join(capsys.readouterr().out.split())
    assert "The weights name no classes; their 4 labels are taken for the ids 1 to 7 of" in text
    assert '1 "circle", 3 "square", 4 "triangle"' in text
