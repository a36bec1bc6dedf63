"""Reads the tensors of a PyTorch checkpoint without PyTorch, and without running anything in the file.

A checkpoint is a pickle, which is a program. Here, a restricted machine (`_pickle.py`) runs it. Beyond plain
containers, it allows only the few names below, which do no more than record their arguments. From these records,
tensors are made afterwards as views of the file's bytes, with all bounds checked. Objects of other classes, such as the
options of a training script, are never built.
"""

import math
import os
import reprlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, no_type_check

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from ._pickle import Mapping, Name, Reader, Skipped, checked_pairs, unpickle
from ._published import check_exists
from ._trees import WeightsError


_STORAGES = {
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
    "torch.ComplexFloatStorage": "<c8",
    "torch.ComplexDoubleStorage": "<c16",
    "torch.storage.UntypedStorage": "u1",
}
_DTYPES = {
    **{f"torch.{name}": f"<{code}" for name, code in (("float32", "f4"), ("float64", "f8"), ("float16", "f2"))},
    **{f"torch.{sign}int{8 * size}": f"<{sign[:1] or 'i'}{size}" for sign in ("", "u") for size in (1, 2, 4, 8)},
    "torch.bool": "?",
    "torch.complex64": "<c8",
    "torch.complex128": "<c16",
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
    "torch.float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "torch.float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
MAX_AXES = 64  # limit of NumPy
# Keys of training checkpoints that hold the weights. Averages come first: they are what is evaluated and published.
_AVERAGES = ("model_ema", "ema", "ema_model", "state_dict_ema")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_RESAVE = "Load it with torch and save it again with `torch.save(model.state_dict(), path)`."

# The format before zip archives: a sequence of pickles that starts with these numbers, then the bytes of the storages.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_pth(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the tensors of a `.pth` file by name, without torch and without running anything in the file.

    Supports the files of `torch.save`, in the current zip format and in the one before it (torch < 1.6), and all dtypes
    of NumPy and `ml_dtypes`, including bfloat16 and float8.

    - `entry`: the key of the state dict. By default, the file is a state dict, or a mapping written by a training
      script with a state dict under `"state_dict"`, `"model_state_dict"` or `"model"`. If there is also an average of
      the weights, under `"model_ema"`, `"ema"`, `"ema_model"` or `"state_dict_ema"`, the average is preferred. Other
      entries are ignored: optimiser states, and objects of any class, which are never built.

    The arrays are read-only views of the file's content with the strides of the tensors. Tensors that shared memory
    still share it.

    Raises a `FileNotFoundError` if there is no such file, with the URL if the name looks like that of a torchvision
    checkpoint. Raises a `WeightsError` that names the file if its state dict contains anything but tensors (the error
    gives the offending name, and nothing is run), if it is truncated, damaged or from a big-endian machine, or if a
    tensor extends beyond the content of the file.

    >>> arrays = read_pth("tests/data/zip.pth")
    >>> arrays["conv.weight"].shape, str(arrays["conv.weight"].dtype)
    ((2, 3, 2, 2), 'float32')
    """
    path = check_exists(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            state, read = _open_zip(file, size, entry) if is_zip else _open_legacy(file.read(), entry)
            cache = {}
            return {name: _array(name, tensor, read, cache, size) for name, tensor in state.items()}
        except Exception as error:
            # A damaged pickle or archive may raise any exception.
            reason = str(error) if isinstance(error, WeightsError) else f"it is damaged or truncated ({error!r})."
            raise WeightsError(f"Cannot read {path}: {reason}") from error


class _Storage(NamedTuple):
    """The location of the values of a tensor: the record `key`, which has `length` items."""

    key: str
    dtype: np.dtype
    length: int
    view: tuple[int, int] | None = None  # offset and length, in items, of a part that acts as a storage


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return _check_tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
    return _check_tensor(storage, offset, shape, strides, np.dtype(_DTYPES[dtype.name]))


def _check_tensor(storage, offset, shape, strides, dtype):
    if not isinstance(storage, _Storage):
        raise WeightsError("it has a tensor without a storage.")
    numbers = (offset, *shape, *strides)
    fits = len(shape) == len(strides) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not fits:
        raise WeightsError(f"it has a tensor with offset, shape and strides {reprlib.repr((offset, shape, strides))}.")
    return _Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def _rebuild_parameter(tensor, *_):
    return tensor


def _rebuild_size(items=()):
    return tuple(items)


def _mapping(items=()):
    return Mapping(checked_pairs(items))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "torch.Size": _rebuild_size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,  # torch < 0.4
}
_ALLOWED = frozenset((*_CALLS, *_STORAGES, *_DTYPES))


def _call(name: str, arguments: tuple) -> Any:
    if name not in _CALLS:
        raise WeightsError(f"it calls {name}, which a file of tensors may not call.")
    return _CALLS[name](*arguments)


def _unpickle(content: bytes, start: int = 0) -> tuple[Any, int, dict[str, int]]:
    """Returns the object pickled at `start`, the end of its pickle, and the item sizes of the storages it refers to."""
    item_sizes: dict[str, int] = {}

    @no_type_check
    def refer(pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise WeightsError(f"it refers to {reprlib.repr(pid)}, which is not a tensor storage.")
        kind, key, length = pid[1], pid[2], pid[4]
        if type(kind) is not Name or kind.name not in _STORAGES or type(key) is not str or type(length) is not int:
            raise WeightsError(f"it has an invalid storage {reprlib.repr(pid)}.")
        dtype = np.dtype(_STORAGES[kind.name])
        if item_sizes.setdefault(key, dtype.itemsize) != dtype.itemsize:
            raise WeightsError(f"its storage {key!r} has two dtypes.")
        view = None if len(pid) == 5 or pid[5] is None else (int(pid[5][1]), int(pid[5][2]))
        return _Storage(key, dtype, length, view)

    # The state of a mapping holds the versions of its modules; that of a tensor, in the oldest files, `requires_grad`.
    root, end = unpickle(content, start, Reader(_ALLOWED, _call, refer, (Mapping, _Tensor)))
    return root, end, item_sizes


Storages = Callable[[_Storage], bytes | memoryview]


def _open_zip(file: BinaryIO, size: int, entry: str | None) -> tuple[dict[str, _Tensor], Storages]:
    archive = zipfile.ZipFile(file)
    names = set(archive.namelist())
    if len(names) < len(archive.infolist()):
        raise WeightsError("its archive has two entries with the same name, which torch.save does not write.")
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise WeightsError("it is a zip archive, but not one that torch.save wrote.")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise WeightsError(f"it is a TorchScript program. {_RESAVE}")
    # Entries must be uncompressed and together no larger than the file, so that nothing unpacks to a larger size.
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    if not stored or sum(entry.file_size for entry in archive.infolist()) > size:
        raise WeightsError("its archive has compressed or overlapping entries, which torch.save does not write.")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise WeightsError(f"it was written on a big-endian machine. {_RESAVE}")

    @no_type_check
    def read(storage: _Storage) -> bytes:
        if f"{root}data/{storage.key}" not in names:
            raise WeightsError(f"its storage {storage.key!r} is missing.")
        return archive.read(f"{root}data/{storage.key}")

    return _state_dict(_unpickle(archive.read(f"{root}data.pkl"))[0], entry), read


def _open_legacy(content: bytes, entry: str | None) -> tuple[dict[str, _Tensor], Storages]:
    if content[257:262] == b"ustar":
        raise WeightsError(f"it is in the tar format of torch 0.1. {_RESAVE}")
    if not content.startswith(b"\x80"):
        raise WeightsError("it is not a file that torch.save wrote (neither a zip archive nor a pickle).")
    magic, position, _ = _unpickle(content)
    if magic != _LEGACY_MAGIC:
        raise WeightsError("it is a pickle, but not one that torch.save wrote.")
    version, position, _ = _unpickle(content, position)
    system, position, _ = _unpickle(content, position)
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise WeightsError(f"its format is version {reprlib.repr(version)}, not {_LEGACY_VERSION}.")
    if system.get("little_endian") is not True:
        raise WeightsError(f"it was written on a big-endian machine. {_RESAVE}")
    root, position, item_sizes = _unpickle(content, position)
    state = _state_dict(root, entry)
    keys, position, _ = _unpickle(content, position)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise WeightsError("its list of storages is damaged.")
    view, records = memoryview(content), {}
    for key in keys:
        (length,) = struct.unpack_from("<q", content, position)
        start, position = position + 8, position + 8 + length * item_sizes[key]
        if length < 0 or position > len(content):
            raise WeightsError(f"its storage {key!r} ends after the file does: it is truncated or damaged.")
        records[key] = view[start:position]

    @no_type_check
    def read(storage: _Storage) -> memoryview:
        if storage.key not in records:
            raise WeightsError(f"its storage {storage.key!r} is missing.")
        return records[storage.key]

    return state, read


def _state_dict(root: Any, entry: str | None) -> dict[str, _Tensor]:
    """Finds the state dict in the content of a file; see `read_pth`."""
    if isinstance(root, Skipped):
        raise WeightsError(f"it holds an object of {root.name}, not a state dict. Nothing was run. {_RESAVE}")
    if not isinstance(root, dict):
        raise WeightsError(f"it holds a {type(root).__name__}, not a state dict.")
    mappings = [key for key, value in root.items() if isinstance(key, str) and isinstance(value, dict)]
    if entry is not None:
        if entry not in mappings:
            raise WeightsError(f"it has no state dict under {entry!r}, but mappings under {reprlib.repr(mappings)}.")
        keys = [entry]
    else:
        averages = [key for key in _AVERAGES if key in mappings and _tensors(root[key])]
        keys = averages or [key for key in _WRAPPERS if key in mappings]
    if len(keys) > 1:
        raise WeightsError(
            f"it has a state dict under {keys[0]!r} and another under {keys[1]!r}. "
            f"Read one of them with `read_pth(path, entry={keys[0]!r})`."
        )
    state = root[keys[0]] if keys else root
    state = _tensors(state) or state
    for name, value in state.items():
        if isinstance(value, Skipped):
            raise WeightsError(
                f"it refers to {value.name}, at its entry {reprlib.repr(name)}. Only tensors are read. Nothing was run."
            )
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            kind = value.name if isinstance(value, Name) else type(value).__name__
            raise WeightsError(f"its entry {reprlib.repr(name)} is a {kind}, not a tensor.")
    return state


def _tensors(state: Any) -> dict[str, _Tensor] | None:
    """Returns `state` if it is a state dict, the one under `"module"` as in some averages, or `None`."""
    for candidate in (state, state.get("module")):
        if isinstance(candidate, dict) and any(isinstance(value, _Tensor) for value in candidate.values()):
            return candidate
    return None


def _array(name: str, tensor: _Tensor, read: Storages, cache: dict[str, np.ndarray], limit: int) -> np.ndarray:
    """Makes the tensor as a view of its storage."""
    storage, dtype = tensor.storage, tensor.dtype
    if storage.key not in cache:
        cache[storage.key] = np.frombuffer(read(storage), np.uint8)
    content = cache[storage.key]
    if len(content) != storage.length * storage.dtype.itemsize:
        raise WeightsError(
            f"the storage of {name} has {len(content)} bytes where {storage.length} items of {storage.dtype} "
            "are expected: it is truncated or damaged."
        )
    start, length = (0, storage.length) if storage.view is None else storage.view
    if start < 0 or length < 0 or start + length > storage.length:
        raise WeightsError(f"the storage of {name} is a view beyond its {storage.length} items.")
    content = content[start * storage.dtype.itemsize : (start + length) * storage.dtype.itemsize]
    available = len(content) // dtype.itemsize
    elements = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    if (elements and last >= available) or tensor.offset > available:
        raise WeightsError(
            f"{name} with shape {tensor.shape}, strides {tensor.strides} and offset {tensor.offset} reaches beyond "
            f"the {available} items of its storage."
        )
    # Strides of 0 make a large tensor from one number. No genuine file has more elements than bytes.
    if elements > limit:
        raise WeightsError(f"{name} with shape {tensor.shape} has more elements than the file has bytes.")
    if not elements:
        return np.empty(tensor.shape, dtype)
    strides = tuple(
        step * dtype.itemsize if size > 1 else 0 for size, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    return np.ndarray(tensor.shape, dtype, content, tensor.offset * dtype.itemsize, strides)
