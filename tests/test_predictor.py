"""`zoo.Predictor` finds what `detect` finds, for any kind and number of images, and can be saved and loaded."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import data, evaluate, models, zoo
from detectax_eqx.data import BadImageError

from . import tiny_train


NAME = "mask_rcnn_resnet18_fpn"
CATEGORIES = (data.Category(3, "cat"), data.Category(7, "dog"))
SELECTION = models.TwoStageSelection(score_threshold=0.0, max_detections=5)


@pytest.fixture(scope="module")
def predictor():
    """A tiny Mask R-CNN on canvases of two shapes."""
    model = tiny_train.build(NAME, 2, "group")
    preprocessing = models.Preprocessing(models.ShortestEdge(64, 96))
    model = replace(model, preprocessing=preprocessing, selection=SELECTION)
    return zoo.Predictor(model, CATEGORIES, ((64, 96), (96, 64)), zoo.Architecture(NAME, "group"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 70), (64, 80), (70, 50), (40, 40))]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    paths = [folder / name for name in ("a.png", "b.png", "more/c.png", "more/d.png")]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    (folder / "notes.txt").write_text("no image")
    return paths


def same(one, other, atol=1e-4):
    a, b = one.detections, other.detections
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
    np.testing.assert_allclose(a.scores, b.scores, atol=atol)
    np.testing.assert_allclose(a.masks, b.masks, atol=1e-3)


def test_it_finds_what_detect_finds(predictor, images):
    canvas, image = (64, 96), images[0]
    other = predictor(images[1]).detections.scores
    assert np.abs(predictor(image).detections.scores - other).max() > 1e-3  # the result depends on the image
    prediction = predictor(image)
    wanted = eqx.filter_jit(models.detect)(predictor.model, jnp.asarray(image), canvas=canvas)
    count = int(wanted.valid.sum())
    assert len(prediction) == count > 0 and prediction.size == (50, 70)
    np.testing.assert_allclose(prediction.detections.boxes, wanted.boxes[:count], atol=1e-2)
    np.testing.assert_allclose(prediction.detections.scores, wanted.scores[:count], atol=1e-4)
    assert prediction.names == [("cat", "dog")[label] for label in wanted.labels[:count]]
    assert len(predictor(image, max_detections=2)) == 2 and len(predictor(image, score_threshold=1.0)) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_lists_are_batches_and_keep_their_order(predictor, images, batch_size):
    alone = [predictor(image) for image in images]
    for one, other in zip(predictor(images, batch_size=batch_size), alone, strict=True):
        assert one.size == other.size
        same(one, other)


def test_one_batch_a_bucket(predictor, images, monkeypatch):
    """Images of one program go through it together; the size of the last batch is a power of two."""
    shapes = []
    detect_batch = models.detect_batch
    monkeypatch.setattr(
        zoo._predictor,
        "detect_batch",
        lambda m, x, **o: shapes.append((len(x.pixels), x.canvas)) or detect_batch(m, x, **o),
    )
    predictor([images[0], images[2], images[1], images[0]], batch_size=8)
    assert sorted(shapes) == [(1, (96, 64)), (4, (64, 96))]


def test_every_kind_of_image(predictor, images, files):
    wanted = predictor(images[0])
    for given in (str(files[0]), files[0], Image.fromarray(images[0]), jnp.asarray(images[0])):
        same(predictor(given), wanted)
    folder = predictor(files[0].parent)
    assert [prediction.source for prediction in folder] == list(map(str, files))
    for prediction, image in zip(folder, images, strict=True):
        same(prediction, predictor(image))
        np.testing.assert_array_equal(prediction.image, image)
    mixed = predictor([files[1].parent / "more", images[0]])
    assert [prediction.source for prediction in mixed] == [str(files[2]), str(files[3]), None]
    # A photo from a phone: stored sideways, shown upright.
    exif = Image.Exif()
    exif[0x0112] = 6
    file = files[0].parent / "sideways.jpg"
    Image.fromarray(images[0]).save(file, exif=exif, quality=95)
    with Image.open(file) as sideways:
        assert predictor(file).size == predictor(sideways).size == (70, 50)
    file.unlink()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x / 255, TypeError, r"\(image \* 255\)\.round\(\)\.astype\(np\.uint8\)"),
        (lambda x: x.astype(np.int64), TypeError, r"has dtype int64, but pixels are uint8, 0\.\.255"),
        (lambda x: x.transpose(2, 0, 1), ValueError, r"Channels seem to come first: use image\.transpose\(1, 2, 0\)"),
        (lambda x: x[..., 0], ValueError, r"grayscale: use np\.repeat\(image\[\.\.\., None\], 3, axis=2\)"),
        (lambda x: x[..., :1], ValueError, r"Repeat the gray channel"),
        (lambda x: np.concatenate([x, x[..., :1]], axis=2), ValueError, r"Drop alpha: image\[\.\.\., :3\]"),
        (lambda x: x[None], ValueError, r"a batch: pass list\(images\)"),
        (lambda x: x[0, 0], ValueError, r"has shape \(3,\), but images are \(h, w, 3\)"),
        (lambda x: 7, TypeError, r"got builtins\.int|parameter 'images' has a wrong type"),
        (lambda x: "nowhere.jpg", BadImageError, r"nowhere\.jpg: no such image file"),
    ],
)
def test_what_is_no_image_is_told_apart(predictor, images, change, error, words):
    for given in (change(images[0]), [images[1], change(images[0])]):
        with pytest.raises(error, match=words):
            predictor(given)


def test_predictions_in_other_forms(predictor, images, files, monkeypatch):
    prediction = predictor(files[0])
    assert prediction.draw(score_threshold=0.0).size == (70, 50)
    rows = prediction.rows()
    assert len(rows) == len(prediction) and set(rows[0]) == {"name", "category_id", "score", "x0", "y0", "x1", "y1"}
    assert rows[0]["category_id"] == {"cat": 3, "dog": 7}[rows[0]["name"]]
    results = prediction.to_coco(image_id=42)
    assert json.loads(json.dumps(results)) == results and {one["image_id"] for one in results} == {42}
    for row, result in zip(rows, results, strict=True):
        x, y, width, height = result["bbox"]
        np.testing.assert_allclose((x, y, x + width, y + height), [row[k] for k in ("x0", "y0", "x1", "y1")], atol=1e-4)
        assert result["segmentation"]["size"] == [50, 70]
    masks = prediction.masks()
    assert masks is not None and masks.shape == (len(prediction), 50, 70) and masks.dtype == bool
    encoded = [one["segmentation"] for one in results]
    decoded = [data.decode_rle({**one, "counts": one["counts"].encode()}) for one in encoded]
    assert np.mean(np.stack(decoded).astype(bool) != masks) < 1e-3
    nothing = predictor(images[0], score_threshold=1.0)
    assert (nothing.rows(), nothing.to_coco(), len(nothing.masks())) == ([], [], 0)
    assert "nothing" in repr(nothing) and "a.png, 50×70" in repr(prediction)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        prediction.to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    theirs = prediction.to_supervision()
    np.testing.assert_array_equal(theirs.mask, masks)
    assert theirs.data["class_name"].tolist() == prediction.names and theirs.xyxy.shape == (len(prediction), 4)


def test_a_saved_predictor_is_the_same(predictor, images, tmp_path, monkeypatch):
    tiny_train.shrink(monkeypatch)
    predictor.save(tmp_path / "mine")
    loaded = zoo.Predictor.load(tmp_path / "mine")
    assert (loaded.categories, loaded.canvases, loaded.architecture) == (
        predictor.categories,
        predictor.canvases,
        predictor.architecture,
    )
    assert loaded.model.preprocessing == predictor.model.preprocessing
    same(loaded(images[0], selection=SELECTION), predictor(images[0]))
    with pytest.raises(FileNotFoundError, match=r"has no predictor\.safetensors"):
        zoo.Predictor.load(tmp_path)
    with pytest.raises(ValueError, match="has no architecture"):
        replace(predictor, architecture=None).save(tmp_path / "own")
    predictor.save_weights(tmp_path / "predictor.safetensors")
    with pytest.raises(ValueError, match=r"is not what Predictor\.save writes"):
        zoo.Predictor.load(tmp_path)


def test_batch_size_must_be_positive(predictor, images):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        predictor(images[0], batch_size=0)


def test_detection_over_a_dataset(predictor, files, images, tmp_path):
    """The same results as one by one; a model whose classes are not the dataset's is rejected."""
    entries = [
        {"id": 10 + i, "file_name": str(path.relative_to(files[0].parent)), "height": x.shape[0], "width": x.shape[1]}
        for i, (path, x) in enumerate(zip(files, images, strict=True))
    ]
    content = {"images": entries, "annotations": [], "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset, done = data.load_coco(tmp_path / "a.json", files[0].parent), []
    options = {"canvases": predictor.canvases, "on_images": done.append}
    results = evaluate.detect_dataset(predictor.model, dataset, **options)
    assert sum(done) == 4
    for i, path in enumerate(files):
        own = [one for one in results if one["image_id"] == 10 + i]
        for one, other in zip(own, predictor(path).to_coco(image_id=10 + i), strict=True):
            assert one["category_id"] == other["category_id"]
            np.testing.assert_allclose(one["bbox"], other["bbox"], atol=1e-2)
    with pytest.raises(ValueError, match="category_ids must have 2 ids, one per class, got 1"):
        evaluate.detect_dataset(predictor.model, dataset, category_ids=[3])
