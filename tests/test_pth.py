"""torch checkpoints read without torch: files that torch wrote, damaged files, and malicious ones."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectax_eqx.weights import WeightsError, read_pth


DATA = Path(__file__).parent / "data"
EXPECTED = np.load(DATA / "pth.npz")


def widened(array):
    return array.astype(np.float32) if array.dtype.name.startswith(("bfloat16", "float8")) else array


@pytest.mark.parametrize("name", ["zip", "zip_protocol4", "legacy"])
def test_reads_what_torch_wrote(name):
    arrays = read_pth(DATA / f"{name}.pth")
    assert list(arrays) == list(EXPECTED)
    for key, array in arrays.items():
        assert widened(array).dtype == EXPECTED[key].dtype and array.shape == EXPECTED[key].shape, key
        np.testing.assert_array_equal(widened(array), EXPECTED[key], err_msg=key)
    for dtype in ("bfloat16", "float8_e4m3fn", "uint16", "bool", "complex64"):
        assert arrays[f"dtype.{dtype}"].dtype.name == dtype
    assert np.shares_memory(arrays["view.transposed"], arrays["view.sliced"])
    assert not arrays["view.transposed"].flags.c_contiguous
    assert not np.shares_memory(arrays["view.transposed"], arrays["conv.weight"])


@pytest.mark.parametrize("name", ["model", "state_dict"])
def test_unwraps_a_training_checkpoint(name):
    arrays = read_pth(DATA / f"{name}.pth")
    assert list(arrays) == ["conv.weight", "conv.bias", "norm.weight"]
    np.testing.assert_array_equal(arrays["conv.weight"], EXPECTED["conv.weight"])


def test_the_options_beside_the_weights_are_skipped():
    """torchvision's training script keeps its `argparse.Namespace` there."""
    arrays = read_pth(DATA / "with_namespace.pth")
    assert list(arrays) == ["conv.weight", "conv.bias", "norm.weight"]
    np.testing.assert_array_equal(arrays["conv.weight"], EXPECTED["conv.weight"])


# Files written by hand, so that they can be malformed.


def dump(value):
    """The pickle instructions that build a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def tensor(
    *, key="0", kind=("torch", "FloatStorage"), length=4, offset=0, shape=(4,), strides=(1,), view=b"", call=None
):
    storage = b"((" + dump("storage") + name(*kind) + dump(key) + dump("cpu") + dump(length) + view + b"tQ"
    rebuild = call or name("torch._utils", "_rebuild_tensor_v2")
    empty = name("collections", "OrderedDict") + b")R"
    return rebuild + storage + dump(offset) + dump(shape) + dump(strides) + dump(False) + empty + b"tR"


def mapping(**entries):
    """The pickle instructions that build a dictionary of values that other instructions build."""
    return b"}(" + b"".join(dump(key) + value for key, value in entries.items()) + b"u"


def state_dict(**entries):
    body = b"".join(dump(key) + value for key, value in entries.items())
    return b"\x80\x02" + name("collections", "OrderedDict") + b")R(" + body + b"u."


def write_zip(path, program, *, storages=None, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in ({"0": np.arange(4, dtype="<f4").tobytes()} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", content)
        for key, content in records.items():
            archive.writestr(f"archive/{key}", content)
    return path


def write_legacy(path, program, *, lengths=(("0", 4),), system=None, version=1001, content=None):
    content = np.arange(4, dtype="<f4").tobytes() if content is None else content
    system = {"little_endian": True, "protocol_version": 1001} if system is None else system
    head = (0x1950A86A20F9469CFC6C, version, system)
    stream = b"".join(pickle.dumps(value, protocol=2) for value in head) + program
    stream += pickle.dumps([key for key, _ in lengths], protocol=2)
    stream += b"".join(struct.pack("<q", length) + content for _, length in lengths)
    path.write_bytes(stream)
    return path


WRITERS = [write_zip, write_legacy]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


@pytest.mark.parametrize("write", WRITERS)
def test_reads_files_written_by_hand(write, path):
    arrays = read_pth(write(path, state_dict(a=tensor(), b=tensor(offset=1, shape=(2, 1), strides=(2, 7)))))
    np.testing.assert_array_equal(arrays["a"], np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(arrays["b"], np.array([[1], [3]], np.float32))


def test_reads_the_oldest_parameters_and_storage_views(path):
    parameter = name("torch.nn.parameter", "Parameter") + b"(" + tensor(call=name("torch._utils", "_rebuild_tensor"))
    parameter += b"tR(" + dump(True) + dump(False) + name("collections", "OrderedDict") + b")Rtb"
    part = tensor(view=dump(("view", 1, 2)), shape=(2,))
    arrays = read_pth(write_legacy(path, state_dict(a=parameter, b=part)))
    assert arrays["a"].tolist() == [0, 1, 2, 3] and arrays["b"].tolist() == [1, 2]
    with pytest.raises(WeightsError, match="view beyond its 4 items"):
        read_pth(write_legacy(path, state_dict(b=tensor(view=dump(("view", 3, 2)), shape=(1,)))))
    with pytest.raises(WeightsError, match=r"b with shape .* reaches beyond the 2 items"):
        read_pth(write_legacy(path, state_dict(b=tensor(view=dump(("view", 1, 2)), shape=(3,)))))


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


MARK = "import os; os.environ['DETECTAX_HARMED'] = '1'"
HOSTILE = {
    "posix.system|nt.system": dump(Runs(os.system, "touch harmed")),
    "os.system": name("os", "system") + b"(" + dump("touch harmed") + b"tR",
    "__builtin__.eval": dump(Runs(builtins.eval, "__import__('os').environ.__setitem__('DETECTAX_HARMED', '1')")),
    "__builtin__.exec": dump(Runs(builtins.exec, MARK)),
    "__builtin__.getattr": dump(Runs(getattr, "x", "upper")),
    "__builtin__.__import__": dump(Runs(__import__, "antigravity")),
    "subprocess.Popen": name("subprocess", "Popen") + b"(" + dump(["touch", "harmed"]) + b"tR",
    "torch.hub.load": name("torch.hub", "load") + b"(" + dump("someone/repo") + b"tR",
    "torch.load": name("torch", "load") + b"(" + dump("other.pth") + b"tR",
    "torch._utils._rebuild_sparse_tensor": name("torch._utils", "_rebuild_sparse_tensor") + b")R",
    "torch.FloatStorage.__reduce__": name("torch", "FloatStorage.__reduce__") + b")R",
    "collections.OrderedDict.fromkeys": name("collections", "OrderedDict.fromkeys") + b")R",
    "os.system by stack": b"\x8c\x02os\x8c\x06system\x93(" + dump("touch harmed") + b"tR",
    "os.system by instance": b"(" + dump("touch harmed") + b"ios\nsystem\n",
    "numpy._core.multiarray._reconstruct|numpy.core": dump(np.zeros(2)),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_runs_nothing(case, write, path, monkeypatch):
    """The name is recorded, nothing is called, and what stands in for a tensor is rejected by its name."""
    monkeypatch.chdir(path.parent)
    for function in (os.system, subprocess.Popen):
        monkeypatch.setattr(f"{function.__module__}.{function.__name__}", lambda *_: pytest.fail("it ran"))
    wanted = "|".join(part.replace(".", r"\.") for part in case.split(" ")[0].split("|"))
    with pytest.raises(WeightsError, match=rf"file\.pth: it refers to ({wanted})"):
        read_pth(write(path, state_dict(w=HOSTILE[case])))
    assert sorted(os.listdir(path.parent)) == ["file.pth"] and "DETECTAX_HARMED" not in os.environ


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_runs_nothing_beside_the_weights(case, write, path, monkeypatch):
    """Here too only the name is recorded, whatever the program then does with it."""
    monkeypatch.chdir(path.parent)
    for function in (os.system, subprocess.Popen):
        monkeypatch.setattr(f"{function.__module__}.{function.__name__}", lambda *_: pytest.fail("it ran"))
    state = b"}" + dump("__setstate__") + name("os", "system") + b"sb"
    program = state_dict(model=mapping(w=tensor()), extra=HOSTILE[case] + state)
    assert read_pth(write(path, program))["w"].tolist() == [0, 1, 2, 3]
    assert sorted(os.listdir(path.parent)) == ["file.pth"] and "DETECTAX_HARMED" not in os.environ


NAMESPACE = name("argparse", "Namespace") + b")\x81}" + dump("lr") + dump(0.1) + b"sb"
# What training scripts store beside the weights: torchvision's, Lightning, mmengine.
BESIDE = {
    "args": NAMESPACE,
    "optimizer": mapping(state=b"}(" + dump(0) + mapping(momentum_buffer=tensor()) + b"u", param_groups=b"]"),
    "lr_scheduler": mapping(milestones=name("collections", "Counter") + b"}(" + dump(16) + dump(1) + b"u\x85R"),
    "path": name("pathlib", "PosixPath") + b"(" + dump("runs") + b"tR",
    "score": name("numpy.core.multiarray", "scalar")
    + b"("
    + name("numpy", "dtype")
    + b"("
    + dump("f8")
    + b"tR"
    + name("_codecs", "encode")
    + b"("
    + dump("x")
    + b"tRtR",
    "config": name("omegaconf", "DictConfig") + b")\x81" + b"(" + dump("a") + dump(1) + b"u",
    "history": name("mmengine", "HistoryBuffer") + b")\x81" + b"(" + dump(1) + dump(2) + b"e",
    "epoch": dump(26),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_reads_the_weights_of_a_training_script(key, write, path):
    arrays = read_pth(write(path, state_dict(**{key: state_dict(w=tensor())[2:-1]}, **BESIDE)))
    assert list(arrays) == ["w"] and arrays["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("key", ["model_ema", "ema", "ema_model", "state_dict_ema"])
def test_an_average_beside_the_weights_is_preferred(key, write, path):
    """As torchvision's script stores it (`module.` and `n_averaged`), and as D-FINE's does, under `module`."""
    average = {"n_averaged": tensor(shape=(), strides=()), "module.w": tensor(offset=1, shape=(2,))}
    flat = mapping(**average)
    nested = mapping(module=flat, updates=dump(7))
    for content in (flat, nested):
        file = write(path, state_dict(model=mapping(w=tensor()), **{key: content}))
        assert read_pth(file)["module.w"].tolist() == [1, 2]
        assert read_pth(file, entry="model")["w"].tolist() == [0, 1, 2, 3]
    without = state_dict(model=mapping(w=tensor()), **{key: name("x", "EMA") + b")\x81"})
    assert list(read_pth(write(path, without))) == ["w"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_whole_model_is_refused_by_its_class(write, path):
    program = b"\x80\x02" + name("torchvision.models.resnet", "ResNet") + b")\x81}b."
    with pytest.raises(WeightsError, match=r"an object of torchvision\.models\.resnet\.ResNet, not .*state_dict\(\)"):
        read_pth(write(path, program))


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", "resnet50-0676ba61.pth"])
def test_a_missing_published_file_names_its_url(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{name}.* https://download\.pytorch\.org/models/{name}$"):
        read_pth(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*mine\.pth\.$"):
        read_pth(tmp_path / "mine.pth")


BENT = {
    "a storage is no function": name("torch", "FloatStorage") + b")R",
    "a dtype is no function": name("torch", "float32") + b")R",
    "state of a name": name("torch._utils", "_rebuild_tensor_v2") + b"}" + dump("name") + dump("os.system") + b"sb",
    "slots of a name": name("torch", "Size") + b"N}" + dump("name") + dump("os.system") + b"s\x86b",
    "no class to make": name("collections", "OrderedDict") + b")\x81",
    "memo out of proportion": b"]r\xff\xff\xff\x7f",
    "registered extension": b"\x82\x01",
    "string out of proportion": b"\x8d" + struct.pack("<Q", 2**60),
    "persistent id of text": b"Pos.system\n",
    "other persistent id": b"(" + dump("module") + dump("os") + b"tQ",
    "storage of another kind": b"("
    + dump("storage")
    + name("torch", "Size")
    + dump("0")
    + dump("cpu")
    + dump(4)
    + b"tQ",
    "tensor without storage": name("torch._utils", "_rebuild_tensor_v2") + dump((1, 0, (1,), (1,), False, None)) + b"R",
    "entry that is no tensor": dump([1, 2]),
    "name as entry": name("torch", "float32"),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", BENT)
def test_refuses_bent_pickles(case, write, path):
    with pytest.raises(WeightsError, match=r"Cannot read .*file\.pth: "):
        read_pth(write(path, state_dict(w=BENT[case])))


WRONG_TENSORS = {
    "more items than there are": ({"shape": (5,)}, r"w with shape \(5,\).* reaches beyond the 4 items"),
    "stride too far": ({"shape": (2,), "strides": (4,)}, "reaches beyond"),
    "offset too far": ({"shape": (1,), "offset": 4}, "reaches beyond"),
    "empty beyond the end": ({"shape": (0,), "offset": 5}, "reaches beyond"),
    "huge offset": ({"offset": 2**62}, "reaches beyond"),
    "overflow": ({"shape": (2**40, 2**40), "strides": (2**40, 1)}, "reaches beyond"),
    "expanded beyond measure": ({"shape": (2**40,), "strides": (0,)}, "more elements than the file has bytes"),
    "expanded beyond int64": ({"shape": (2**40, 2**40), "strides": (0, 0)}, "more elements"),
    "negative offset": ({"offset": -1}, "a tensor with offset"),
    "negative size": ({"shape": (-4,)}, "a tensor with offset"),
    "negative stride": ({"strides": (-1,)}, "a tensor with offset"),
    "ranks differ": ({"strides": (1, 1)}, "a tensor with offset"),
    "fractions": ({"shape": (1.5,)}, "a tensor with offset"),
    "too many axes": ({"shape": (1,) * 70, "strides": (1,) * 70}, "Cannot read"),
    "storage of huge length": ({"length": 2**60}, "Cannot read"),
    "storage of negative length": ({"length": -4}, "Cannot read"),
    "storage that is not there": ({"key": "1"}, "storage '1' is missing|Cannot read"),
    "key that leads elsewhere": ({"key": "../data.pkl"}, "missing|Cannot read"),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_checks_every_bound(case, write, path):
    options, message = WRONG_TENSORS[case]
    with pytest.raises(WeightsError, match=message):
        read_pth(write(path, state_dict(w=tensor(**options))))


@pytest.mark.parametrize("write", WRITERS)
def test_refuses_a_storage_with_two_dtypes(write, path):
    with pytest.raises(WeightsError, match="storage '0' has two dtypes"):
        read_pth(write(path, state_dict(a=tensor(), b=tensor(kind=("torch", "DoubleStorage"), length=2))))


def test_refuses_archives_that_torch_does_not_write(path):
    program = state_dict(w=tensor())
    with pytest.raises(WeightsError, match=r"16 bytes where 4 items|8 bytes where 4 items"):
        read_pth(write_zip(path, program, storages={"0": bytes(8)}))
    with pytest.raises(WeightsError, match="storage '0' is missing"):
        read_pth(write_zip(path, program, storages={}))
    with pytest.raises(WeightsError, match="compressed"):
        read_pth(write_zip(path, program, storages={"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(WeightsError, match="big-endian"):
        read_pth(write_zip(path, program, byteorder=b"big"))
    script: dict[str, Any] = {"constants.pkl": b""}
    with pytest.raises(WeightsError, match="TorchScript"):
        read_pth(write_zip(path, program, **script))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(WeightsError, match=r"not one that torch\.save wrote"):
        read_pth(path)


def test_refuses_legacy_files_that_it_cannot_read(path):
    program = state_dict(w=tensor())
    with pytest.raises(WeightsError, match="big-endian"):
        read_pth(write_legacy(path, program, system={"little_endian": False}))
    with pytest.raises(WeightsError, match="version 1000"):
        read_pth(write_legacy(path, program, version=1000))
    for length in (2**62, -1):
        with pytest.raises(WeightsError, match="ends after the file does"):
            read_pth(write_legacy(path, program, lengths=(("0", length),)))
    with pytest.raises(WeightsError, match="damaged"):
        read_pth(write_legacy(path, program, lengths=(("other", 4),)))
    path.write_bytes(b"0" * 257 + b"ustar  " + b"0" * 300)
    with pytest.raises(WeightsError, match="tar format"):
        read_pth(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=r"not one that torch\.save wrote"):
        read_pth(path)
    for content in (b"", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"not a file that torch\.save wrote"):
            read_pth(path)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_truncated_files_name_themselves(name, path):
    content = (DATA / f"{name}.pth").read_bytes()
    for end in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError, match=r"Cannot read .*file\.pth"):
            read_pth(path)


def test_a_flipped_bit_of_an_archive_is_noticed(path):
    content = (DATA / "zip.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = content.index(archive.read("zip/data/0"))
    path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    with pytest.raises(WeightsError, match=r"file\.pth: it is damaged .*CRC"):
        read_pth(path)


def test_flipped_bytes_never_escape_as_other_errors(path):
    """Whatever is damaged, the result is arrays or a `WeightsError`."""
    rng = np.random.default_rng(0)
    for name in ("zip", "legacy"):
        content = np.frombuffer((DATA / f"{name}.pth").read_bytes(), np.uint8)
        for _ in range(150):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            try:
                assert all(isinstance(array, np.ndarray) for array in read_pth(path).values())
            except WeightsError as error:
                assert "file.pth" in str(error)


def test_two_state_dicts_are_ambiguous_and_other_objects_none(path):
    inner = state_dict(w=tensor())[2:-1]
    write_zip(path, state_dict(model=inner, state_dict=inner))
    with pytest.raises(WeightsError, match=r"another under 'model'.*entry='state_dict'"):
        read_pth(path)
    assert list(read_pth(path, entry="model")) == ["w"]
    with pytest.raises(WeightsError, match=r"no state dict under 'ema', but mappings under \['model', 'state_dict'\]"):
        read_pth(path, entry="ema")
    with pytest.raises(WeightsError, match="holds a list"):
        read_pth(write_zip(path, pickle.dumps([1], protocol=2)))
    with pytest.raises(FileNotFoundError):
        read_pth(path.with_name("none.pth"))
