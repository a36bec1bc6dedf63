"""Weights of Detectron2 and Caffe2: .pkl files that are damaged, wrong or malicious."""

import codecs
import pickle
import struct

import numpy as np

from detectax_eqx import weights

from .. import pkl_files
from ..pkl_files import array, dtype, mapping, name, number, program, sequence, short
from . import Case, damage
from .weights import HARM, forms, without_side_effects


ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "norm.weight": np.full(4, 2, np.float32),
    "norm.bias": np.full(4, 3, np.float32),
}
MANY = 2**60
# The text of protocol 0 is in this encoding. Python imports it, which runs code, when it is first used.
codecs.lookup("raw-unicode-escape")
INSTRUCTIONS = np.frombuffer(b"()]}NIJKMULTaesutldbQRqhr\x85\x86\x87\x93.012", np.uint8)


def check(arrays):
    """Checks shapes and types of the arrays. A pickle has no checksum: a flipped bit may change a number or a name."""
    for values in arrays.values():
        assert type(values) is np.ndarray and values.nbytes <= 400
    return "harmless"


def check_equal(arrays):
    assert list(arrays) == list(ARRAYS)
    for key, values in ARRAYS.items():
        np.testing.assert_array_equal(arrays[key], values)
    return "harmless"


def make(content, folder):
    path = folder / "model_final.pkl"
    path.write_bytes(content)
    return lambda: without_side_effects(lambda: weights.read_pkl(path))


def case(what, content, check=None, words=()):
    return Case(f"pkl: {what}", lambda folder: make(content, folder), ("model_final.pkl", *words), check)


def of(body):
    """A file whose array `norm.bias` is made by other instructions."""
    arrays = {key: array(values) for key, values in ARRAYS.items()}
    return program(mapping({"model": mapping(arrays | {"norm.bias": body})}))


def cases():
    yield from damaged()
    yield from arrays()
    yield from programs()
    yield from harmful()


def damaged():
    files = {
        "Python 2": pkl_files.detectron2(ARRAYS),
        "Python 3": pickle.dumps({"model": ARRAYS, "__author__": "someone"}, 2),
    }
    for seed, (what, content) in enumerate(files.items()):
        for how, changed in damage(content, np.random.default_rng(seed), flips=60, cuts=10):
            yield case(f"{what}, {how}", changed, check)


def arrays():
    """Arrays whose parts contradict each other, or are of other types."""
    four, encode = np.zeros(4, np.float32), name("_codecs.encode") + b"("
    parts = {
        "no state": {"end": b"0"},
        "two states": {"end": b"b(" + number(1) + sequence((4,)) + dtype() + b"\x89" + short(bytes(16)) + b"tb"},
        "another function": {"function": name("numpy.core.multiarray.fromstring")},
        "a matrix": {"kind": name("numpy.matrix")},
        "a kind that is text": {"kind": short("numpy.ndarray")},
        "no content": {"content": short(b"")},
        "content that is short": {"content": short(bytes(15))},
        "content that is long": {"content": short(bytes(17))},
        "content that is a number": {"content": number(16)},
        "content that is a list": {"content": b"](" + number(0) * 4 + b"e"},
        "content beyond Latin-1": {"content": b"X" + struct.pack("<I", 6) + "€€".encode()},
        "content in another encoding": {"content": encode + short("a") + short("zip") + b"tR"},
        "content encoded from a number": {"content": encode + number(1) + short("latin1") + b"tR"},
        "content of bytes from a number": {"content": name("__builtin__.bytes") + b"(" + number(16) + b"tR"},
        "content decoded": {"content": name("_codecs.decode") + b"(" + short("a") + short("latin1") + b"tR"},
        "a negative shape": {"shape": sequence((-4,))},
        "two negative sides": {"shape": sequence((-2, -2))},
        "a large shape": {"shape": sequence((10**9,))},
        "an endless shape": {"shape": sequence((MANY, MANY))},
        "an endless shape of nothing": {"shape": sequence((MANY, MANY, 0)), "content": short(b"")},
        "a shape of 800,000 bits": {"shape": b"(\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"t"},
        "100 axes": {"shape": sequence((1,) * 100)},
        "100,000 axes": {"shape": sequence((2,) * 100_000)},
        "a shape that is a list": {"shape": b"](" + number(4) + b"e"},
        "a shape that is a number": {"shape": number(4)},
        "a shape of text": {"shape": b"(" + short("4") + b"t"},
        "a shape of flags": {"shape": b"(\x88" * 1 + b"t"},
        "an order of text": {"fortran": short("C")},
        "an order of 2": {"fortran": number(2)},
        "objects": {"dtype": dtype("O8", "|")},
        "text": {"dtype": dtype("S4", "|")},
        "wide text": {"dtype": dtype("U1", "<")},
        "records": {"dtype": dtype("V4", "|")},
        "dates": {"dtype": dtype("M8", "<")},
        "a type of an expression": {"dtype": dtype("f4,f4", "<")},
        "a type of shape": {"dtype": dtype("(99999,)f4", "<")},
        "an unknown type": {"dtype": dtype("x9", "<")},
        "an empty type": {"dtype": dtype("", "<")},
        "an unknown byte order": {"dtype": dtype("f4", "?")},
        "a long byte order": {"dtype": dtype("f4", "<<<<")},
        "no byte order": {"dtype": dtype("f4", "|")},
        "a type by another function": {"dtype": dtype(function="numpy.core.numerictypes.sctype2char")},
        "a type that is a name": {"dtype": name("numpy.dtype")},
        "a type that is text": {"dtype": short("f4")},
        "a type without arguments": {"dtype": name("numpy.dtype") + b")R"},
        "a type of a type": {"dtype": name("numpy.dtype") + b"(" + dtype() + b"tR"},
        "a state that is short": {"version": b""},
        "a state that is long": {"version": number(1) * 2},
        "a state that is text": {"end": b"0" + short("state") + b"b"},
    }  # fmt: skip
    for what, replaced in parts.items():
        yield case(f"an array with {what}", of(array(four, **replaced)))
    whole = pkl_files.detectron2(ARRAYS)
    assert b"U\tnorm.bias" in whole
    itself = array(four, content=b"h\x07").replace(b"tR(", b"tRq\x07(", 1)
    yield case("an array whose content is itself", of(itself))
    yield case("the weights under another key", whole.replace(b"U\x05model", b"U\x05modle"), None, ("modle",))
    names = {
        "a number": number(3), "nothing": b"N", "a tuple": b"(" + short("a") + b"t", "a list": b"]",
        "an array": array(four), "bytes": b"C\x01a", "a class": name("os.system"),
    }  # fmt: skip
    for what, key in names.items():
        yield case(f"a name that is {what}", program(b"}(" + short("model") + b"}(" + key + array(four) + b"uu"))
    values = {
        "a number": number(3), "nothing": b"N", "text": short("a"), "a list": b"]", "a tuple": b")", "a mapping": b"}",
        "a class": name("os.system"), "the class of arrays": name("numpy.ndarray"), "an element type": dtype(),
        "a fraction": b"G" + struct.pack(">d", 0.5), "a flag": b"\x88",
    }  # fmt: skip
    for what, value in values.items():
        yield case(f"an entry that is {what}", of(value), None, ("norm.bias",))
        if value != b"}":
            yield case(f"a file that is {what}", program(value))
    for what, body in {
        "no arrays": b"}",
        "no weights": mapping({"model": b"}"}),
        "no blobs": mapping({"blobs": b"}"}),
    }.items():
        yield case(what, program(body), None, ("no arrays",))
    yield case(
        "the same name twice", program(mapping({"a": array(four)}) + b"(" + short("a") + array(four) + b"u"), check
    )


def programs():
    """Pickles that would take long, much memory, or have instructions that no file of arrays has."""
    scalar = name("numpy.core.multiarray.scalar")
    bent = {
        "a persistent id": b"U\x01aQ",
        "a persistent id of text": b"Pos.system\n",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "a bytearray": b"\x96" + struct.pack("<Q", 4) + b"abcd",
        "a buffer": b"\x97",
        "a set": b"\x8f",
        "text of 2^60 bytes": b"\x8d" + struct.pack("<Q", MANY),
        "bytes of 2^60": b"\x8e" + struct.pack("<Q", MANY),
        "a string of 2^31 bytes": b"T" + struct.pack("<i", 2**31 - 1),
        "a string of negative length": b"T" + struct.pack("<i", -1),
        "a frame of 2^60 bytes": b"\x95" + struct.pack("<Q", MANY),
        "a number of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n",
        "a number of 800,000 bits": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000,
        "a tuple as key, 300,000 deep": b"}" + b")" + b"\x85" * 300_000 + number(1) + b"s",
        "a tuple as key, with 2^60 parts": b"}" + b")" + b"2\x86" * 60 + number(1) + b"s",
        "a list in itself": b"]q\x01h\x01a",
        "numbers of one hash": b"}(" + b"".join(f"L{k * (2**61 - 1)}L\n".encode() + b"N" for k in range(20_000)) + b"u",
        "a memo entry of 2^31": b"]r\xff\xff\xff\x7f",
        "a memo entry that is not there": b"hx",
        "a mapping of lists": name("collections.OrderedDict") + b"](" + b"](" + number(1) * 2 + b"eae\x85R",
        "a mapping of one number": name("collections.OrderedDict") + sequence((5,)) + b"R",
        "a mapping of two": name("collections.OrderedDict") + b"]]\x86R",
        "a scalar of nothing": scalar + b")R",
        "a scalar of text": scalar + b"(" + dtype() + short("abc") + b"tR",
        "a scalar of objects": name("numpy.core.multiarray.scalar")
        + b"("
        + dtype("O8", "|")
        + short("abcdefgh")
        + b"tR",
        "a state for a scalar": scalar + b"(" + dtype() + short("abcd") + b"tR)b",
        "a state for a list": b"]}b",
        "a state for bytes": b"C\x01a}b",
        "no mark": b"t",
        "a mark too many": b"((",
        "nothing to pop": b"0" * 50,
        "nothing on the stack": b"...",
        "an unknown instruction": b"\xff",
    }
    for what, body in bent.items():
        yield case(what, of(body))
        yield case(f"{what}, as the whole file", program(body), check)
    yield case("5,000,000 empty lists", b"\x80\x02(" + b"]" * 5_000_000 + b"t.")
    yield case("5,000,000 strings", b"\x80\x02(" + b"U\x00" * 5_000_000 + b"t.")
    twice = array(np.zeros(1000, np.float32)) + b"q\x01"
    entries = b"".join(short(f"a{i}") + b"h\x01" for i in range(20_000))
    yield case("one array under 20,000 names", b"\x80\x02}" + twice + b"0(" + entries + b"u.", shared)
    for protocol in range(6):
        yield case(f"protocol {protocol} without arrays", pickle.dumps({"a": [1, (2, None)], "b": "text"}, protocol))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        changed = bytearray(pkl_files.detectron2(ARRAYS))
        for position in rng.integers(2, len(changed), rng.integers(1, 12)).tolist():
            changed[position] = int(
                rng.choice(np.frombuffer(b"()]}NIJKMULTaesutldbQRqhr\x85\x86\x87\x93.012", np.uint8))
            )
        yield case(f"instructions changed, seed {seed}", bytes(changed), check)


def shared(arrays):
    assert len(arrays) == 20_000 and arrays["a7"].nbytes == 4000
    return "harmless"


def harmful():
    """Calls of names that could do harm, in the weights and beside them. None of them is made."""
    for full in HARM:
        for form, body in forms(full).items():
            yield case(f"{full} by {form}", of(body))
            weights_and = mapping(
                {"model": mapping({key: array(values) for key, values in ARRAYS.items()}), "extra": body}
            )
            if full != "numpy.core.multiarray._reconstruct":
                yield case(f"{full} by {form}, beside the weights", program(weights_and), check_equal)
