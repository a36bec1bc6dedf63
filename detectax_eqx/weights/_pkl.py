"""Reads the arrays of a Detectron2 or Caffe2 `.pkl` file without running anything in the file.

Such a file is a pickle of NumPy arrays, often written by Python 2. A restricted machine (`_pickle.py`) runs it, which
knows the few functions that rebuild an array and an element type. They only record their arguments. Arrays are made
from these records afterwards, as views of the file's bytes, once their sizes have been checked.
"""

import math
import os
import reprlib
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Shaped

from ._pickle import Mapping, Name, Reader, Skipped, checked_pairs, unpickle
from ._published import check_exists
from ._trees import WeightsError


MAX_AXES = 64  # limit of NumPy
# Element types of weights, without their byte order.
_CODES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"})
_ORDERS = frozenset("<>|=")
_LATIN_1 = frozenset({"latin1", "latin-1"})
# NumPy 2 renamed the package `numpy.core`.
_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_RECONSTRUCT, _SCALAR = (tuple(f"{core}.{name}" for core in _CORES) for name in ("_reconstruct", "scalar"))
_ARRAY, _DTYPE, _ENCODE, _ORDERED = "numpy.ndarray", "numpy.dtype", "_codecs.encode", "collections.OrderedDict"
_BYTES = "__builtin__.bytes"  # without arguments: how protocols before 3 store empty bytes
_ALLOWED = frozenset({*_RECONSTRUCT, *_SCALAR, _ARRAY, _DTYPE, _ENCODE, _ORDERED, _BYTES})
# Caffe2 stored the optimiser's state beside the weights.
_MOMENTUM = "_momentum"
_RESAVE = "Load it with the library that wrote it, and save a dictionary from names to NumPy arrays."


class _Dtype:
    """An element type as pickled: its code, and its byte order once that is known."""

    def __init__(self, code: str):
        self.code, self.order = code, "|"


class _Array:
    """An array as pickled: `(shape, element type, whether in Fortran order, bytes)`, or `None` before it is known."""

    def __init__(self, state: tuple[Any, ...] | None = None):
        self.state = state


def read_pkl(path: str | os.PathLike) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the arrays of a `.pkl` file by name, without running anything in the file.

    Supports Detectron2's model zoo (a dictionary with the arrays under `"model"`), Caffe2's detectors (under `"blobs"`)
    and ImageNet backbones (the arrays themselves), written by Python 2 or 3 up to pickle protocol 4. Entries beside
    `"model"` and `"blobs"` are ignored. So are names that end with `_momentum`, the optimiser state of Caffe2.

    The arrays are read-only views of the file's content.

    Raises a `FileNotFoundError` if there is no such file. Raises a `WeightsError` that names the file if an entry is
    anything but an array of numbers (the error gives the entry, and nothing is run), or if the file is truncated or
    damaged.

    >>> arrays = read_pkl("tests/data/detectron2.pkl")
    >>> arrays["backbone.fpn_lateral2.weight"].shape, str(arrays["backbone.fpn_lateral2.weight"].dtype)
    ((2, 3, 1, 1), 'float32')
    """
    path = check_exists(path)
    try:
        content = path.read_bytes()
        if content[:4] == b"PK\x03\x04":
            raise WeightsError("it is a zip archive, not a pickle. If torch.save wrote it, rename it to .pth.")
        if content[:2] == b"\x80\x05":
            raise WeightsError("it is a pickle of protocol 5. Save it again with `protocol=4`.")
        root, _ = unpickle(content, 0, Reader(_ALLOWED, _call, _refer, (Mapping,), _build, "latin-1"))
        return {name: _array(name, array) for name, array in _state_dict(root).items()}
    except Exception as error:
        # A damaged pickle may raise any exception.
        reason = str(error) if isinstance(error, WeightsError) else f"it is damaged or truncated ({error!r:.300})."
        raise WeightsError(f"Cannot read {path}: {reason}") from error


@no_type_check
def _call(name: str, arguments: tuple) -> Any:
    if name in _RECONSTRUCT and len(arguments) == 3 and arguments[0] == Name(_ARRAY):
        return _Array()  # the other arguments belong to an empty array; `_build` replaces it
    if name in _SCALAR and len(arguments) == 2:
        return _Array(((), arguments[0], False, arguments[1]))
    if name == _DTYPE and arguments and type(arguments[0]) is str:
        return _Dtype(arguments[0])
    if name == _ENCODE and len(arguments) == 2 and type(arguments[0]) is str and arguments[1] in _LATIN_1:
        return arguments[0].encode("latin-1")
    if name == _BYTES and not arguments:
        return b""
    if name == _ORDERED:
        return Mapping(checked_pairs(*(arguments or ((),))))
    raise WeightsError(f"it calls {name} with {reprlib.repr(arguments)}, which rebuilds no array.")


def _refer(pid: Any) -> Any:
    raise WeightsError(f"it refers to {reprlib.repr(pid)} outside of the file.")


@no_type_check
def _build(target: Any, state: Any) -> bool:
    """Records the pickled state of an array, `(version, shape, dtype, fortran, bytes)`, or of an element type."""
    if type(target) is _Array:
        if target.state is not None or type(state) is not tuple or len(state) != 5:
            raise WeightsError(f"it has an array with the state {reprlib.repr(state)}.")
        target.state = state[1:]
        return True
    if type(target) is _Dtype:
        if type(state) is not tuple or len(state) < 2 or state[1] not in _ORDERS:
            raise WeightsError(f"it has an element type with the state {reprlib.repr(state)}.")
        target.order = state[1]
        return True
    return False


def _state_dict(root: Any) -> dict[str, _Array]:
    """Finds the arrays in the content of a file; see `read_pkl`."""
    if isinstance(root, Skipped):
        raise WeightsError(f"it holds an object of {root.name}, not arrays. Nothing was run. {_RESAVE}")
    if not isinstance(root, dict):
        raise WeightsError(f"it holds a {type(root).__name__}, not a dictionary of arrays. {_RESAVE}")
    key = next((key for key in ("model", "blobs") if isinstance(root.get(key), dict)), None)
    state = root if key is None else root[key]
    if not state:
        raise WeightsError("it has no arrays.")
    arrays = {}
    for name, value in state.items():
        if isinstance(value, Skipped):
            raise WeightsError(
                f"it refers to {value.name}, at its entry {reprlib.repr(name)}. Only arrays are read. Nothing was run. "
                f"{_RESAVE}"
            )
        if not isinstance(name, str) or not isinstance(value, _Array):
            kind = value.name if isinstance(value, Name) else type(value).__name__.strip("_")
            raise WeightsError(f"its entry {reprlib.repr(name)} is a {kind}, not an array. {_RESAVE}")
        if not name.endswith(_MOMENTUM):
            arrays[name] = value
    return arrays


def _array(name: str, array: _Array) -> np.ndarray:
    """Makes the array as a view of its bytes."""
    if array.state is None:
        raise WeightsError(f"its array {name!r:.200} has no content: it is damaged.")
    shape, element, fortran, raw = array.state
    code, order = (element.code, element.order) if isinstance(element, _Dtype) else (None, None)
    if code not in _CODES or (order == "|") != (code in ("b1", "i1", "u1")):
        shown = reprlib.repr(code if code is not None else element)
        raise WeightsError(f"its array {name!r:.200} has elements of type {shown}, which are not numbers. {_RESAVE}")
    is_shape = type(shape) is tuple and len(shape) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not is_shape or fortran not in (0, 1):
        raise WeightsError(f"its array {name!r:.200} has the shape {reprlib.repr(shape)}: it is damaged.")
    content = raw.encode("latin-1") if type(raw) is str else raw
    dtype = np.dtype(f"{order}{code}")
    expected = math.prod(shape) * dtype.itemsize
    if type(content) is not bytes or len(content) != expected:
        kind = type(content).__name__.strip("_")
        size = f"{len(content):,} bytes" if type(content) is bytes else f"a {kind}"
        raise WeightsError(
            f"its array {name!r:.200} has {size} where {reprlib.repr(shape)} elements of {dtype} take "
            f"{reprlib.repr(expected)}: it is truncated or damaged."
        )
    return np.ndarray(shape, dtype, content, order="F" if fortran else "C")
