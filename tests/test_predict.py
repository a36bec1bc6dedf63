"""predict.py with a tiny detector: unique picture names, no output read as input, names and sizes from the weights."""

import json
import sys
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import equinox as eqx
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data, models, nn, weights, zoo
from detectax_eqx.zoo import _predictor, _weights

from .tiny_detector import random_arrays
from .tiny_train import build, shrink
from .zoo_names import NAMES


sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import _images
import _shared
import export
import predict


NAME = "faster_rcnn_resnet18_fpn"
CATEGORIES = tuple(data.Category(k, name) for k, name in ((3, "cat"), (7, "dog")))


@pytest.fixture(scope="module")
def model():
    model = random_arrays(eqx.filter_eval_shape(build, NAME, 2, "group"))
    return replace(model, preprocessing=models.Preprocessing(models.ShortestEdge(64, 64)))


@pytest.fixture
def file(model, tmp_path, monkeypatch):
    """Weights of a tiny detector, trained at 64 pixels."""
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.safetensors"
    zoo.Predictor(model, CATEGORIES, ((64, 64),)).save_weights(path)
    return path


def options(file, output, *inputs, **others):
    detector = _shared.DetectorOptions(weights=file, model=NAME, norm="group")
    names = {field.name for field in fields(_shared.SelectionOptions)} & others.keys()
    chosen = {name: others.pop(name) for name in names}
    kept = _shared.SelectionOptions(**{"score_threshold": 0.0, "max_detections": 3} | chosen)
    return predict.Options(inputs, output, detector=detector, kept=kept, **others)


def loaded_from(file, **sizes):
    """The predictor that the scripts load from `--weights`."""
    return _shared.DetectorOptions(weights=file, model=NAME, norm="group", **sizes).load()


def write(path, value=90):
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (value, value, value)).save(path)
    return path


def pictures(output):
    return sorted(str(path.relative_to(output)) for path in output.rglob("*.png"))


def check_consistent(output, inputs):
    """One picture and one entry per image; results refer to entries."""
    images = json.loads((output / "images.json").read_text())
    results = json.loads((output / "detections.json").read_text())
    assert [image["id"] for image in images] == list(range(len(inputs)))
    assert Counter(image["file_name"] for image in images) == Counter(map(str, inputs))
    assert len({image["picture"] for image in images}) == len(images)
    assert all((output / image["picture"]).is_file() for image in images)
    assert {result["image_id"] for result in results} <= set(range(len(images)))
    assert {result["category_id"] for result in results} <= {3, 7}
    return images


def test_two_folders_with_one_name_give_two_pictures(file, tmp_path):
    a, b = write(tmp_path / "a" / "x.png", 30), write(tmp_path / "b" / "x.png", 200)
    output = tmp_path / "out"
    predict.main(options(file, output, a.parent, b.parent))
    images = check_consistent(output, [a, b])
    assert pictures(output) == ["a/x.png.png", "b/x.png.png"]
    for image, value in zip(images, (30, 200), strict=True):
        with Image.open(output / image["picture"]) as picture:
            assert (np.asarray(picture) == value).all(axis=-1).any()


def test_an_output_within_an_input_is_not_read_again(file, tmp_path):
    folder = tmp_path / "photos"
    image = write(folder / "deep" / "x.png")
    for output in (folder / "out", folder / "out", folder / "other"):
        predict.main(options(file, output, folder))
        assert pictures(output) == ["deep/x.png.png"]
        check_consistent(output, [image])
    assert [path for path, _ in _images.find_images([folder])] == [image]  # as export.py collects them
    assert pictures(folder / "out") == ["deep/x.png.png"]


def test_an_output_that_is_an_input_is_refused(file, tmp_path):
    folder = tmp_path / "photos"
    write(folder / "x.png")
    with pytest.raises(SystemExit, match=r"would put pictures among the images of .*photos"):
        predict.main(options(file, folder, folder))
    assert [path.name for path in folder.iterdir()] == ["x.png"]


def test_class_names_in_any_script(file, model, tmp_path):
    """One warning covers all pictures; names that no font has still differ. An invalid font is rejected at once."""
    image, outputs = write(tmp_path / "x.png"), []
    for number, names in enumerate((("猫狗", "кот"), ("鸟鱼", "кот"))):
        categories = tuple(data.Category(k, name) for k, name in zip((3, 7), names, strict=True))
        zoo.Predictor(model, categories, ((64, 64),)).save_weights(file)
        outputs.append(tmp_path / str(number) / "x.png.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predict.main(options(file, outputs[-1].parent, image))
    assert outputs[0].read_bytes() != outputs[1].read_bytes()
    for path in (tmp_path / "none.ttf", image):
        with pytest.raises(SystemExit, match=rf"--font .*{path.name} cannot be used"):
            predict.main(options(file, tmp_path / "out", image, font=path))


def test_images_of_export_leave_pictures_out(tmp_path, monkeypatch):
    """export.py calibrates on images, and not on the pictures of detections among them."""
    write(tmp_path / "photos" / "x.png", 30)
    write(tmp_path / "photos" / "out" / "x.png.png", 200)
    for name in ("detections.json", "images.json"):
        (tmp_path / "photos" / "out" / name).write_text("[]")
    seen = []
    monkeypatch.setattr(export.export, "save_onnx", lambda *_, images, **__: seen.extend(images))
    detector = zoo.Predictor(mock.Mock(spec=models.FasterRCNN), CATEGORIES)
    shape = export.export.Shape(1, (64, 64), (64, 64))
    export.save_onnx(detector, export.Options(tmp_path / "x.onnx", images=tmp_path / "photos"), shape, None)
    assert [int(np.median(image)) for image in seen] == [30]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["a/x.png", "b/x.png"], ["x.png.png", "x-2.png.png"]),
        (["x.png", "x.png", "./x.png"], ["x.png.png"]),
        (["a/x.png", "a"], ["x.png.png"]),
        (["a_x.png", "a"], ["a_x.png.png", "x.png.png"]),
        (["x.png", "X.PNG", "x.jpg"], ["x.png.png", "X-2.PNG.png", "x.jpg.png"]),
        (["é.png", "e\u0301.png"], ["é.png.png", "e\u0301-2.png.png"]),
        (["a/x.png", "b/x.png", "x-2.png"], ["x.png.png", "x-2.png.png", "x-2-2.png.png"]),
        (["p/a", "q/a"], ["a/x.png.png", "a-2/x.png.png"]),
        (["x.png", "folder"], ["x.png.png", "x.png.png-2/y.png.png"]),
        (["json"], ["detections.json-2/y.png.png"]),
    ],
)
def test_names_are_unique(inputs, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = "a/x.png b/x.png x.png X.PNG x.jpg x-2.png é.png e\u0301.png a_x.png p/a/x.png q/a/x.png"
    for name in [*files.split(), "folder/x.png.png/y.png", "json/detections.json/y.png"]:
        write(tmp_path / name)
    targets = predict.targets_of(tuple(map(Path, inputs)), Path("out"))
    names = [str(target.relative_to("out")) for _, target in targets]
    assert names == expected


def test_no_image_is_overwritten(tmp_path, monkeypatch):
    """Not even if pictures go beside the images: `x.png.png` may itself be an image."""
    monkeypatch.chdir(tmp_path)
    inputs = write(Path("x.png")), write(Path("x.png.png"))
    targets = [target for _, target in predict.targets_of(inputs, Path())]
    assert len(set(targets)) == 2 and not set(targets) & set(inputs)
    assert predict.targets_of((Path("x.png"),), Path("x.png"))  # rejected later, by mkdir


def test_many_equal_names_are_quick(tmp_path):
    images = [(tmp_path / str(k) / "x.png", Path("x.png")) for k in range(3000)]
    assert len(set(_images.unique_targets(images, tmp_path / "out"))) == 3000


def test_sizes_and_classes_travel_with_safetensors(file, model, tmp_path, capsys):
    detector = loaded_from(file)
    assert (detector.categories, detector.model.preprocessing.resize) == (CATEGORIES, models.ShortestEdge(64, 64))
    assert detector.canvases == ((64, 64),) and eqx.tree_equal(detector.model, model)
    other = loaded_from(file, min_size=96)
    assert (other.model.preprocessing.resize, other.categories) == (models.ShortestEdge(96, 64), CATEGORIES)
    assert other.canvases == ((96, 96),)
    # A file without them can still be read, with a warning.
    weights.save_safetensors(model, file)
    with pytest.warns(UserWarning, match="does not say at which sizes"):
        plain = loaded_from(file)
    resize = plain.model.preprocessing.resize
    assert isinstance(resize, models.ShortestEdge)
    assert resize.min_size == 800
    # Files from before the resize could be chosen store two numbers.
    about = {"categories": None, "min_size": 64, "max_size": 96, "canvases": [[64, 96]]}
    weights.save_safetensors(model, file, metadata={"detector": json.dumps(about)})
    before = loaded_from(file)
    assert before.model.preprocessing.resize == models.ShortestEdge(64, 96) and before.canvases == ((64, 96),)
    for about in ("[]", "no JSON", json.dumps({"categories": [], "min_size": 1, "max_size": 1, "canvases": []})):
        weights.save_safetensors(model, file, metadata={"detector": about})
        with pytest.raises(ValueError, match=r"tiny\.safetensors: its metadata 'detector'"):
            loaded_from(file)


def test_weights_of_a_wrapper_in_the_scripts(file, model, tmp_path):
    """`module.` before every name, for detectors and for backbones given to `--init`."""
    arrays = {f"module.{name}": array for name, array in weights.to_torchvision(model).items()}
    weights.save_safetensors(arrays, tmp_path / "wrapped.safetensors")
    with pytest.warns(UserWarning, match="does not say at which sizes"):
        loaded = zoo.Predictor.from_weights(NAME, tmp_path / "wrapped.safetensors", norm="group").model
    assert eqx.tree_equal(replace(loaded, preprocessing=model.preprocessing), model)
    body = {f"module.{name}": array * 2 for name, array in weights.to_torchvision(model.backbone.body).items()}
    weights.save_safetensors(body, tmp_path / "body.safetensors")
    parts = zoo.Architecture(NAME, "group")
    started, notes = zoo.initialize(model, parts, tmp_path / "body.safetensors")
    assert notes == ()
    assert isinstance(started.backbone, nn.BackboneWithFPN) and isinstance(started.backbone.body, nn.ResNet)
    np.testing.assert_array_equal(started.backbone.body.conv1.weight, model.backbone.body.conv1.weight * 2)
    with pytest.raises(
        weights.WeightsError, match=r"body\.safetensors seems to be a ResNet-18 of width 8 with GroupNorm: "
    ):
        zoo.Predictor.from_weights(NAME, tmp_path / "body.safetensors", norm="group")


def test_a_checkpoint_becomes_safetensors(model, file, tmp_path, monkeypatch):
    predictor = zoo.Predictor(model, CATEGORIES, ((64, 64),))
    monkeypatch.setattr(zoo.Predictor, "from_checkpoint", lambda path: predictor)
    export.main(export.Options(tmp_path / "mine.safetensors", detector=_shared.DetectorOptions(checkpoint=tmp_path)))
    assert loaded_from(tmp_path / "mine.safetensors").categories == CATEGORIES


def test_the_selection_reaches_the_detector(file, model, tmp_path, monkeypatch, capsys):
    """Any of its fields can be set from the command line; an invalid one is reported in one line."""
    seen = []
    detect_batch = models.detect_batch
    monkeypatch.setattr(
        _predictor, "detect_batch", lambda *a, **o: seen.append(o["selection"]) or detect_batch(*a, **o)
    )
    image = write(tmp_path / "x.png")
    selection = {"post_nms_top_n": 7.0, "rpn_nms_threshold": 0.6}
    predict.main(options(file, tmp_path / "out", image, nms_threshold=0.4, selection=selection))
    given = {"score_threshold": 0.0, "max_detections": 3, "nms_threshold": 0.4}
    assert seen == [models.TwoStageSelection(post_nms_top_n=7, rpn_nms_threshold=0.6, **given)]
    assert type(seen[0].post_nms_top_n) is int
    for wrong, words in (
        ({"top_n": 7.0}, "--selection: TwoStageSelection has no top_n; its fields are score_threshold, nms_"),
        ({"nms_threshold": 1.5}, "--selection nms_threshold is 1.5: it must be in 0..1"),
        ({"max_detections": 0.5}, "--selection max_detections is 0.5: it must be a positive whole number"),
        ({"post_nms_top_n": 7.5}, "--selection post_nms_top_n is 7.5: it must be a positive whole number"),
        ({"box_min_size": float("nan")}, "--selection box_min_size is nan: it must be at least 0"),
    ):
        with pytest.raises(SystemExit) as error:
            predict.main(options(file, tmp_path / "out", image, selection=wrong))
        assert words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_sizes_of_a_square_resize(model, tmp_path, monkeypatch):
    """It is saved and loaded; `--min-size` and `--max-size` do not apply to it."""
    shrink(monkeypatch)
    square = replace(model, preprocessing=models.Preprocessing(models.Square(64), std=(2.0, 3.0, 4.0)))
    path = tmp_path / "square.safetensors"
    zoo.Predictor(square, CATEGORIES, ((64, 64),)).save_weights(path)
    loaded = loaded_from(path)
    assert loaded.model.preprocessing == square.preprocessing
    assert loaded.model.preprocessing.limits == {"min_size": 64, "max_size": 64}
    with pytest.raises(SystemExit, match=r"--min-size and --max-size: .*Square\(size=64\)"):
        loaded_from(path, min_size=96)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_counted_by_shapes(name, tmp_path):
    """For any detector by name, whatever its layers are called."""
    parts = zoo.Architecture(name)
    source = _weights.source_of(parts, "weights.pth")
    arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in source.shapes(parts.shapes(7)).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_weights, "source_of", lambda *_: source._replace(read=lambda *_: arrays))
        assert _weights.count_classes(parts, tmp_path / "weights.pth") == 7


def test_precision(file, tmp_path):
    """The network in bfloat16 gives scores near those of float32."""
    model = replace(build(NAME, 2, "group"), preprocessing=models.Preprocessing(models.ShortestEdge(64, 64)))
    zoo.Predictor(model, CATEGORIES, ((64, 64),)).save_weights(file)
    image = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(image)
    detections = []
    for precision in ("float32", "bfloat16"):
        predict.main(options(file, tmp_path / precision, image, precision=precision))
        detections.append(json.loads((tmp_path / precision / "detections.json").read_text()))
    scores = [[one["score"] for one in results] for results in detections]
    assert len(scores[0]) == len(scores[1]) == 3 and detections[0] != detections[1]
    np.testing.assert_allclose(scores[0], scores[1], atol=0.05)


def test_published_weights_need_no_file(monkeypatch, capsys):
    """`--model` alone is enough; contradictory options are reported in one line."""
    monkeypatch.setattr(zoo.Predictor, "pretrained", lambda name: f"published {name}")
    monkeypatch.setattr(_shared, "with_sizes", lambda predictor, *sizes: predictor)
    assert _shared.DetectorOptions(model=NAME).load() == f"published {NAME}"
    for given, words in (
        ({}, "Give either --checkpoint or --model"),
        ({"weights": Path("x.pth")}, "--weights needs --model"),
        ({"checkpoint": Path("runs"), "model": NAME}, "not both"),
    ):
        with pytest.raises(SystemExit, match=words):
            _shared.DetectorOptions(**given).load()  # pyright: ignore[reportArgumentType]
