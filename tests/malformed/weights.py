"""Weights: safetensors and .pth files that are damaged, wrong or malicious."""

import io
import json
import math
import pickle
import struct
import sys
import zipfile
from functools import cache

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from detectax_eqx import weights

from ..test_pth import dump, name, state_dict, tensor, write_legacy, write_zip
from . import Case, damage


@cache
def model():
    """A convolution and a norm under torchvision's names for them."""
    return {"conv": {"weight": jnp.ones((2, 3, 2, 2))}, "norm": {"weight": jnp.ones(4), "bias": jnp.zeros(4)}}


ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "norm.weight": np.full(4, 2, np.float32),
    "norm.bias": np.full(4, 3, np.float32),
}


def check(loaded):
    """Checks shapes and dtypes of the arrays; `check_equal` also checks their numbers, where a checksum covers them."""
    for key, leaf in weights.named_leaves(loaded).items():
        assert leaf.shape == ARRAYS[key].shape and leaf.dtype == jnp.float32
    return "harmless"


def check_equal(loaded):
    check(loaded)
    for key, leaf in weights.named_leaves(loaded).items():
        np.testing.assert_array_equal(leaf, ARRAYS[key])
    return "harmless"


def cases():
    yield from safetensors()
    yield from archives()
    yield from programs()


def safetensors():
    def make(content, folder):
        (folder / "model.safetensors").write_bytes(content)
        return lambda: weights.load_safetensors(model(), folder / "model.safetensors")

    def case(what, content, check=None):
        return Case(f"safetensors: {what}", lambda folder: make(content, folder), ("model.safetensors",), check)

    whole = save(ARRAYS)
    size = struct.unpack("<Q", whole[:8])[0]
    for what, content in damage(whole[: 8 + size], np.random.default_rng(0), flips=40, cuts=6):
        # The format has no checksum: with a flipped bit in its header, a file may still be valid.
        yield case(what, content + whole[8 + size :] if "flipped" in what else content, check)
    header = json.loads(whole[8 : 8 + size])
    changes = {
        "unknown dtype": {"dtype": "X7"},
        "no float": {"dtype": "I32"},
        "half": {"dtype": "F16"},
        "negative shape": {"shape": [-4]},
        "huge shape": {"shape": [2**40, 2**40]},
        "other shape": {"shape": [2, 2]},
        "no shape": {"shape": None},
        "offsets beyond the end": {"data_offsets": [0, 10**9]},
        "offsets the wrong way round": {"data_offsets": [16, 0]},
        "negative offsets": {"data_offsets": [-16, 0]},
        "offsets of another": {"data_offsets": header["conv.weight"]["data_offsets"]},
        "text for offsets": {"data_offsets": "all"},
    }
    for what, change in changes.items():
        changed = json.dumps(header | {"norm.bias": header["norm.bias"] | change}).encode()
        yield case(what, struct.pack("<Q", len(changed)) + changed + whole[8 + size :])
    for what, changed in {
        "list": b"[]",
        "text": b'"x"',
        "deep": b"[" * 50_000,
        "no": b"",
        "binary": b"\xff" * 64,
    }.items():
        yield case(f"a header that is {what}", struct.pack("<Q", len(changed)) + changed + whole[8 + size :])
    for what, length in {"2^63": 2**63, "2^40": 2**40, "one too long": size + 1}.items():
        yield case(f"a header of length {what}", struct.pack("<Q", length) + whole[8:])
    arrays = {
        "an array missing": {key: value for key, value in ARRAYS.items() if key != "norm.bias"},
        "one too many": ARRAYS | {"extra": np.zeros(3, np.float32)},
        "float64": ARRAYS | {"norm.bias": np.zeros(4)},
        "another name": {key.replace("norm", "bn"): value for key, value in ARRAYS.items()},
        "none": {},
    }
    for what, changed in arrays.items():
        yield case(what, save(changed))


def pth(arrays):
    """What torch.save writes for arrays: the program and the storages."""
    entries, storages = {}, {}
    for number, (key, array) in enumerate(arrays.items()):
        kind = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage", "u1": "ByteStorage"}
        strides = tuple(step // array.itemsize for step in array.strides)
        entries[key] = tensor(
            key=str(number), kind=("torch", kind[array.dtype.str[1:]]), length=array.size, shape=array.shape,
            strides=strides,
        )  # fmt: skip
        storages[str(number)] = array.tobytes()
    return state_dict(**entries), storages


class Backbone(eqx.Module):
    """A model whose parameter names are also its names in torchvision."""

    conv: dict
    norm: dict


# Events by which a pickle could do harm, as Python's audit hooks name them.
HARMFUL = ("exec", "compile", "code.", "ctypes.", "os.", "pickle.", "pty.", "shutil.", "socket.", "subprocess.", "webb")
ran: list[str] | None = None


def watch(event, arguments):
    if ran is not None and event.startswith(HARMFUL) and not of_type_checker(event, arguments):
        ran.append(event)


def of_type_checker(event, arguments):
    """Whether beartype is compiling the checks of one of our functions, which it does at the first call."""
    # compile(source, filename) and exec(code)
    name = {"compile": lambda: arguments[1], "exec": lambda: arguments[0].co_filename}.get(event, str)()
    return str(name).startswith("<@beartype(detectax_eqx.")


sys.addaudithook(watch)


def without_side_effects(call):
    """Returns the result of `call`. Fails if it raises one of the events above."""
    global ran
    ran = []
    try:
        return call()
    finally:
        events, ran = ran, None
        assert not events, f"it ran {events}"


def read(path):
    """Reads a file, fails if that has side effects, and loads its content."""
    without_side_effects(lambda: weights.read_pth(path))
    loaded = weights.load_torchvision(Backbone(**model()), path)
    return {"conv": loaded.conv, "norm": loaded.norm}


def make_zip(program, storages, folder, **records):
    write_zip(folder / "weights.pth", program, storages=storages, **records)
    return lambda: read(folder / "weights.pth")


def make_file(content, folder):
    (folder / "weights.pth").write_bytes(content)
    return lambda: read(folder / "weights.pth")


def case(what, make, check=None, words=()):
    return Case(f"pth: {what}", make, ("weights.pth", *words), check)


def archives():
    program, storages = pth(ARRAYS)
    stream = io.BytesIO()
    write_zip(stream, program, storages=storages)
    for what, content in damage(stream.getvalue(), np.random.default_rng(1), flips=60, cuts=8):
        yield case(what, lambda folder, c=content: make_file(c, folder), check_equal)
    wrong = {
        "an array missing": {key: value for key, value in ARRAYS.items() if key != "norm.bias"},
        "one too many": ARRAYS | {"extra.weight": np.zeros(3, np.float32)},
        "another shape": ARRAYS | {"norm.bias": np.zeros(5, np.float32)},
        "integers": ARRAYS | {"norm.bias": np.zeros(4, np.int64)},
        "bytes": ARRAYS | {"norm.bias": np.zeros(4, np.uint8)},
        "NaN": ARRAYS | {"norm.bias": np.array([0, math.nan, 0, 0], np.float32)},
        "infinity": ARRAYS | {"norm.bias": np.array([0, math.inf, 0, 0], np.float32)},
        "beyond float32": ARRAYS | {"norm.bias": np.array([0, 1e300, 0, 0])},
        "nothing": {},
    }
    for what, arrays in wrong.items():
        yield case(what, lambda folder, a=arrays: make_zip(*pth(a), folder))
    # Elements without bytes: a stride of 0 repeats one number four times, or a billion times.
    for what, shape in {"a small": (4,), "a large": (10**9,), "an endless": (2**62, 2)}.items():
        many = state_dict(**{key: tensor(shape=shape, strides=(0,) * len(shape)) for key in ARRAYS})
        yield case(f"{what} tensor of one number", lambda folder, m=many: make_zip(m, None, folder))
    zips = {
        "a path that leads out": {"../../evil": b"x"},
        "an absolute path": {"/etc/evil": b"x"},
        "a second program": {"data.pkl ": b"x"},
    }
    for what, records in zips.items():
        yield case(what, lambda folder, r=records: make_zip(program, storages, folder, **r), check_equal)
    yield case("deflated zeros", lambda folder: bomb(folder, zipfile.ZIP_DEFLATED))
    yield case("two entries of one name", twice)


def bomb(folder, compression):
    with zipfile.ZipFile(folder / "weights.pth", "w", compression) as archive:
        archive.writestr("archive/data.pkl", state_dict(w=tensor(length=50_000_000, shape=(50_000_000,))))
        archive.writestr("archive/data/0", bytes(200_000_000))
    return lambda: read(folder / "weights.pth")


def twice(folder):
    program, storages = pth(ARRAYS)
    make_zip(program, storages, folder)
    content = (folder / "weights.pth").read_bytes()
    # Gives the second storage the name of the first.
    (folder / "weights.pth").write_bytes(content.replace(b"archive/data/1", b"archive/data/0"))
    return lambda: read(folder / "weights.pth")


HARM = (
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "subprocess.check_output", "builtins.eval",
    "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open", "__builtin__.compile", "sys.exit",
    "importlib.import_module", "runpy.run_path", "shutil.rmtree", "socket.socket", "ctypes.CDLL", "pty.spawn",
    "webbrowser.open", "code.interact", "torch.load", "torch.hub.load", "torch.jit.load",
    "numpy.load", "numpy.core.multiarray._reconstruct", "operator.attrgetter", "functools.partial", "types.CodeType",
    "collections.OrderedDict.__init__", "torch.Size.__class__", "detectax_eqx.weights.read_pth", "pickle.loads",
)  # fmt: skip


def forms(full):
    """A call of a name, through every instruction that can make one."""
    module, attribute = full.rsplit(".", 1)
    argument = b"(" + dump("touch harmed") + b"t"
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute))
    return {
        "GLOBAL REDUCE": name(module, attribute) + argument + b"R",
        "STACK_GLOBAL REDUCE": text + b"\x93" + argument + b"R",
        "STACK_GLOBAL of memo": text + b"q\x01" + b"0" + b"h\x01" * 2 + b"\x93" + argument + b"R",
        "INST": b"(" + dump("touch harmed") + f"i{module}\n{attribute}\n".encode(),
        "OBJ": b"(" + name(module, attribute) + dump("touch harmed") + b"o",
        "NEWOBJ": name(module, attribute) + argument + b"\x81",
        "NEWOBJ_EX": name(module, attribute) + argument + b"}\x92",
        "BUILD": name(module, attribute) + b"}" + dump("a") + dump("b") + b"sb",
        "persistent id": b"(" + dump("storage") + name(module, attribute) + dump("0") + dump("cpu") + dump(4) + b"tQ",
    }


def programs():
    """Malicious pickles: none may run anything, take long, or use an unreasonable amount of memory."""
    whole, storages = pth(ARRAYS)
    inner = whole[2:-1]
    for full in HARM:
        for form, program in forms(full).items():
            yield case(f"{full} by {form}", lambda folder, p=program: make_zip(state_dict(w=p), None, folder))
            beside = state_dict(model=inner, extra=program)
            yield case(
                f"{full} by {form}, beside the weights",
                lambda folder, b=beside: make_zip(b, storages, folder),
                check_equal,
            )
    order = name("collections", "OrderedDict")
    bent = {
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "a persistent id of text": b"Pos.system\n",
        "a state for a dictionary": b"}}" + dump("__class__") + name("torch", "Size") + b"sb",
        "a state for a mapping of names": order + b")R}" + dump("__setstate__") + name("torch", "Size") + b"sb",
        "a state for a list": b"]}" + dump("a") + dump(1) + b"sb",
        "a mapping from a mapping": order + order + b")R\x85R",
        "a mapping of lists": order + b"]](" + dump([1, 2]) + b"eae\x85R",
        "a size of a number": name("torch", "Size") + dump((5,)) + b"R",
        "a rebuild of nothing": name("torch._utils", "_rebuild_tensor_v2") + b")R",
        "a rebuild of names": name("torch._utils", "_rebuild_tensor_v2") + name("torch", "Size") * 4 + b"tR",
        "a memo entry of 2^31": b"]r\xff\xff\xff\x7f",
        "a memo entry that is not there": b"hx",
        "a text of 2^60 bytes": b"\x8d" + struct.pack("<Q", 2**60),
        "bytes of 2^60": b"\x8e" + struct.pack("<Q", 2**60),
        "a bytearray of 2^60": b"\x96" + struct.pack("<Q", 2**60),
        "a buffer": b"\x97",
        "a frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 2**60),
        "a number of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n",
        "a number of 800,000 bits": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000,
        "a number of negative length": b"\x8b" + struct.pack("<i", -1),
        "a storage of 800,000 bits": tensor(length=1 << 800_000),
        "a shape of 800,000 bits": tensor(shape=(1 << 800_000,)),
        "100,000 axes of 2^60": tensor(shape=(2**60,) * 100_000, strides=(0,) * 100_000),
        "a tuple as key, 300,000 deep": b"}" + b")" + b"\x85" * 300_000 + dump(1) + b"s",
        "a tuple as key, with 2^60 parts": b"}" + b")" + b"2\x86" * 60 + dump(1) + b"s",
        "a name of a tuple with 2^60 parts": b")" + b"2\x86" * 60 + dump("x") + b"\x93",
        "a list in itself": b"]q\x01h\x01a",
        "numbers of one hash": b"}(" + b"".join(dump(k * (2**61 - 1)) + b"N" for k in range(20_000)) + b"u",
        "fractions of one hash": b"}("
        + b"".join(b"G" + struct.pack(">d", k * 2.0**61) + b"N" for k in range(20_000))
        + b"u",
        "no mark": b"t",
        "a mark too many": b"((",
        "nothing to pop": b"0" * 50,
        "nothing on the stack": b".",
        "an unknown instruction": b"\xff",
    }
    for what, program in bent.items():
        for write in (write_zip, write_legacy):
            yield case(
                f"{what}, {write.__name__}",
                lambda folder, p=program, w=write: (
                    w(folder / "weights.pth", state_dict(w=p)),
                    lambda: read(folder / "weights.pth"),
                )[1],
            )
    yield case("5,000,000 empty lists", lambda folder: make_zip(b"\x80\x02(" + b"]" * 5_000_000 + b"t.", None, folder))
    yield case(
        "10,000,000 empty sets", lambda folder: make_zip(b"\x80\x04(" + b"\x8f" * 10_000_000 + b"t.", None, folder)
    )
    # Random instructions in any order: whatever they do, the result is arrays or a `WeightsError`.
    for seed in range(100):
        rng = np.random.default_rng(seed)
        program = bytearray(whole)
        for position in rng.integers(2, len(program), rng.integers(1, 12)).tolist():
            program[position] = int(
                rng.choice(np.frombuffer(b"()]}NIJKMULaesutldbQRqhr\x85\x86\x87\x93.012", np.uint8))
            )
        yield case(
            f"instructions changed, seed {seed}", lambda folder, p=bytes(program): make_zip(p, storages, folder), check
        )
    for protocol in range(6):
        content = pickle.dumps({"a": [1, (2, None)], "b": "text"}, protocol=protocol)
        yield case(
            f"a pickle of protocol {protocol} that torch did not write", lambda folder, c=content: make_file(c, folder)
        )
