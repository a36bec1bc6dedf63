"""Writes pickles of arrays as Python 2 and NumPy 1 wrote them, by hand, so that any part can be replaced.

As a script, writes `tests/data/detectron2.pkl`.
"""

import struct
from pathlib import Path

import numpy as np


def short(text):
    """The instruction for a byte string of Python 2."""
    content = text.encode("latin-1") if isinstance(text, str) else text
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def number(value):
    return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else f"L{value}L\n".encode()


def name(full):
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def sequence(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def dtype(code="f4", order="<", function="numpy.dtype"):
    state = b"(" + number(3) + short(order) + b"NNN" + number(-1) * 2 + number(0) + b"t"
    return name(function) + b"(" + short(code) + number(0) + number(1) + b"tR" + state + b"b"


def array(values, **replaced):
    """The instructions for an array; `replaced` are other instructions for its parts."""
    parts = {
        "function": name("numpy.core.multiarray._reconstruct"),
        "kind": name("numpy.ndarray"),
        "empty": b"(" + number(0) + b"t",
        "code": short("b"),
        "version": number(1),
        "shape": sequence(values.shape),
        "dtype": dtype(values.dtype.str[1:], values.dtype.str[0]),
        "fortran": b"\x88" if values.flags.f_contiguous and values.ndim > 1 else b"\x89",
        "content": short(values.tobytes(order="A")),
        "end": b"b",
    } | replaced
    rebuild = parts["function"] + b"(" + parts["kind"] + parts["empty"] + parts["code"] + b"tR"
    state = b"(" + b"".join(parts[key] for key in ("version", "shape", "dtype", "fortran", "content")) + b"t"
    return rebuild + state + parts["end"]


def mapping(entries):
    """The instructions for a dictionary, from names to instructions."""
    return b"}(" + b"".join(short(key) + value for key, value in entries.items()) + b"u"


def program(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + b"."


def detectron2(arrays, **others):
    """A file of Detectron2's model zoo."""
    model = mapping({key: array(values) for key, values in arrays.items()})
    return program(mapping({"model": model, "__author__": short("Detectron2 Model Zoo")} | others))


if __name__ == "__main__":
    weights = {
        "backbone.fpn_lateral2.weight": np.arange(6, dtype="<f4").reshape(2, 3, 1, 1),
        "backbone.fpn_lateral2.bias": np.array([-1, 2], "<f4"),
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": np.array(300, "<i8"),
    }
    (Path(__file__).parent / "data" / "detectron2.pkl").write_bytes(detectron2(weights))
