"""Pickles of arrays, as Detectron2 and Caffe2 published them, read without unpickling."""

import collections
import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from detectax_eqx.weights import WeightsError, read_pkl

from . import pkl_files


ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) - 7.5,
    "conv.bias": np.array([0.25, -3e38], np.float32),
    "transposed": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "steps": np.array(70_000, np.int64),
    "half": np.array([1.5, 300], np.float16),
    "bytes": np.arange(256, dtype=np.uint8),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "big_endian": np.arange(4, dtype=">f4"),
}


def write(folder, content):
    (folder / "model_final.pkl").write_bytes(content)
    return folder / "model_final.pkl"


def check(arrays, expected=ARRAYS):
    assert list(arrays) == list(expected)
    for key, array in expected.items():
        assert arrays[key].shape == array.shape and arrays[key].dtype == array.dtype, key
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
        assert not arrays[key].flags.writeable


def test_what_python_2_wrote(tmp_path):
    check(read_pkl(write(tmp_path, pkl_files.detectron2(ARRAYS))))


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("protocol", range(5))
def test_what_numpy_writes(tmp_path, protocol, kind):
    """Python 3 encodes bytes as text in protocols 0 to 2. Protocol 5 rebuilds arrays by another function."""
    content = {
        "model": kind(ARRAYS),
        "__author__": "someone",
        "iteration": np.int64(5),
        "optimizer": [1.0, {"a": (2,)}],
    }
    check(read_pkl(write(tmp_path, pickle.dumps(content, protocol))))


def test_the_name_that_numpy_1_has_for_the_same_function(tmp_path):
    content = pickle.dumps({"model": ARRAYS}, 2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in content
    check(read_pkl(write(tmp_path, content)))


@pytest.mark.parametrize("nested", [True, False])
def test_caffe2(tmp_path, nested):
    """A detector has its arrays under "blobs", a backbone at the top. The optimiser's state is not a weight."""
    arrays = {key: pkl_files.array(values) for key, values in ARRAYS.items()}
    arrays["conv_w_momentum"] = pkl_files.array(np.zeros(3, np.float32))
    body = pkl_files.mapping(arrays)
    if nested:
        body = pkl_files.mapping({"blobs": body, "cfg": pkl_files.short("MODEL: {}")})
    check(read_pkl(write(tmp_path, pkl_files.program(body))))


def test_scalars_of_numpy(tmp_path):
    content = pickle.dumps({"model": {"lr": np.float32(0.5), "step": np.int64(9)}}, 2)
    arrays = read_pkl(write(tmp_path, content))
    assert arrays["lr"] == np.float32(0.5) and arrays["step"] == 9 and arrays["step"].shape == ()


def test_committed_file():
    arrays = read_pkl(Path(__file__).parent / "data" / "detectron2.pkl")
    assert arrays["backbone.fpn_lateral2.bias"].tolist() == [-1, 2]
    assert arrays["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 300


def test_objects_of_other_classes_are_skipped_beside_the_weights(tmp_path):
    content = {"model": ARRAYS, "trainer": io.StringIO(), "when": __import__("datetime").date(2020, 1, 1)}
    check(read_pkl(write(tmp_path, pickle.dumps(content, 2))))


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": {"a": pickle.PickleError}}, "refers to pickle.PickleError, at its entry 'a'"),
        ({"model": {"a": [1.0]}}, "entry 'a' is a list"),
        ({"model": {"a": np.array(["text"])}}, "elements of type 'U4'"),
        ({"model": {"a": np.array([None])}}, "elements of type 'O8'"),
        ({"model": {}}, "no arrays"),
        ([ARRAYS], "holds a list"),
        (pickle.PickleError("x"), "an object of pickle.PickleError"),
    ],
)
def test_what_is_not_an_array(tmp_path, content, words):
    path = write(tmp_path, pickle.dumps(content, 2))
    with pytest.raises(WeightsError, match=words) as caught:
        read_pkl(path)
    assert str(path) in str(caught.value)


def test_protocol_5(tmp_path):
    with pytest.raises(WeightsError, match=r"protocol 5.*protocol=4"):
        read_pkl(write(tmp_path, pickle.dumps({"model": ARRAYS}, 5)))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pkl"):
        read_pkl(tmp_path / "nowhere.pkl")


def test_a_file_of_torch(tmp_path):
    content = (Path(__file__).parent / "data" / "zip.pth").read_bytes()
    with pytest.raises(WeightsError, match=r"rename it to \.pth"):
        read_pkl(write(tmp_path, content))
