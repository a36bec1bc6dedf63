"""Checkpoints that are written atomically and verified by checksums.

A checkpoint is a folder named after its step. `index.json` holds the metadata and the shape and dtype of every leaf,
with a checksum; `arrays/` is one OCDBT store of zarr3 arrays, each with its own checksum. A checkpoint is written under
a temporary name, flushed to disk, and then renamed. A checkpoint with a single wrong bit is not loaded.

With several processes, the first one gathers the arrays and writes; all of them read.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from ._arrays import read_arrays, write_arrays
from ._sharding import host_copy


INDEX, ARRAYS = "index.json", "arrays"
# A checkpoint that is being replaced by another of the same step counts as a checkpoint until it is removed.
REPLACED = ".replaced"
NAME = re.compile(rf"(\d{{8,}})({re.escape(REPLACED)})?")
UNFINISHED = re.compile(r"\d{8,}\.tmp")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that does not match the tree it is loaded into."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with a file that is missing or has changed since it was written."""


class Restored(NamedTuple):
    """The result of `load_latest_checkpoint`.

    - `path`: the checkpoint that was loaded. `tree` and `metadata`: its contents.
    - `refused`: the error of each newer checkpoint that is damaged.
    """

    path: Path
    tree: PyTree
    metadata: dict[str, Any]
    refused: tuple[DamagedCheckpointError, ...]


class Snapshot(NamedTuple):
    """A copy on the host of everything to write, which later steps do not change."""

    step: int
    text: str
    arrays: dict[str, np.ndarray]


def save_checkpoint(
    folder: str | os.PathLike[str], tree: PyTree, *, step: int, metadata: dict[str, Any], keep: int = 2
) -> Path:
    """Writes the arrays of `tree` and `metadata` to `folder/<step>`, and returns that path.

    If the process is killed at any moment, earlier checkpoints are unchanged. Once the new checkpoint is on disk, only
    the `keep` newest up to `step` are kept; checkpoints of later steps are not removed. Only one process at a time may
    write to a folder. A `CheckpointSaver` does the same in the background.

    - `tree`: JAX and NumPy arrays, including typed keys, are saved whole under their path in the tree, however they are
      sharded. Other leaves (functions, Python numbers) are not saved: `load_checkpoint` takes them from its `like`.
      With several processes, each of them must call this function.
    - `metadata`: anything that JSON can hold, such as the categories and the name and options of the model.

    Raises a `ValueError` if `keep` is less than 1, `step` is negative, or two leaves have the same path, and a
    `CheckpointError` with a remedy if the checkpoint cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(folder, {"w": jnp.ones(3)}, step=7, metadata={"classes": ["cat"]})
    ...     tree, metadata = load_checkpoint(latest_checkpoint(folder), {"w": jnp.zeros(3)})
    >>> path.name, tree["w"].tolist(), metadata
    ('00000007', [1.0, 1.0, 1.0], {'classes': ['cat']})
    """
    return write_snapshot(Path(folder), take_snapshot(tree, step, metadata), keep)


def take_snapshot(tree: PyTree, step: int, metadata: dict[str, Any]) -> Snapshot:
    """Copies everything to save to the host, so that a step may then donate `tree`."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    leaves = _array_leaves(tree)
    content = {
        "format": 1,
        "step": step,
        "metadata": metadata,
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
    }
    text = json.dumps({"crc32": _checksum(content), "content": content}, indent=1)
    values = {name: jr.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
    for value in values.values():
        if isinstance(value, jax.Array) and value.is_fully_addressable:
            value.copy_to_host_async()  # start all transfers before waiting for the first
    return Snapshot(step, text, {name: host_copy(value) for name, value in values.items()})


def write_snapshot(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes a snapshot as a checkpoint. Processes other than the first do nothing."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    final = folder / f"{snapshot.step:08d}"
    if jax.process_index() > 0:
        return final
    temporary, replaced = final.with_name(f"{final.name}.tmp"), final.with_name(f"{final.name}{REPLACED}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_arrays(temporary / ARRAYS, snapshot.arrays)
        with (temporary / INDEX).open("w") as file:
            file.write(snapshot.text)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        _sync(folder)
        _remove_old(folder, snapshot.step, keep)
    except (OSError, ValueError) as error:  # tensorstore raises ValueErrors
        shutil.rmtree(temporary, ignore_errors=True)  # free its space, as the disk may be full
        raise CheckpointError(
            f"Cannot save checkpoint {final}: {_reason(error)}. Earlier checkpoints in {folder} are unchanged. "
            f"Free disk space or make the folder writable, then resume from the newest checkpoint."
        ) from error
    return final


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The path of the complete checkpoint with the highest step in `folder`.

    Returns `None` if there is none, or if the folder does not exist.

    >>> latest_checkpoint("no/such/folder") is None
    True
    """
    steps = {path: step for path, step in _checkpoints(Path(folder)).items() if (path / INDEX).is_file()}
    return max(steps, key=lambda path: (steps[path], path.suffix == "")) if steps else None


def load_checkpoint(
    path: str | os.PathLike[str], like: PyTree, *, partial: bool = False, rename: Callable[[str], str] = str
) -> tuple[PyTree, dict[str, Any]]:
    """Loads the tree that was saved at `path`, bit for bit, and its metadata.

    - `like`: a tree of the same structure, shapes and dtypes, built by the same code as the saved tree. Its arrays may
      be `jax.ShapeDtypeStruct`s (`eqx.filter_eval_shape`). Leaves that are not arrays are returned unchanged.
    - `partial`: `like` may lack leaves of the saved tree. For example, pass only the model of a `TrainState`, or `{}`
      to read only the metadata.
    - `rename`: maps the path of a saved leaf, such as `"model/head/weight"`, to its path in `like`.

    Arrays are sharded as those of `like` are, however they were sharded when saved; an array on a single device is
    loaded onto the default device. Where `like` has a NumPy array, a NumPy array is returned.

    Raises a `FileNotFoundError` if there is no checkpoint at `path`; a `ValueError` if `rename` gives two leaves the
    same path; a `CheckpointError` that names the checkpoint and the leaf if a leaf is missing, unexpected, or of
    another shape or dtype; and a `DamagedCheckpointError` if a leaf or the index is damaged.
    """
    path = Path(path)
    content = _read_index(path)
    saved_as = {rename(name): name for name in content["leaves"]}
    if len(saved_as) < len(content["leaves"]):
        raise ValueError(f"rename must give each leaf of checkpoint {path} a path of its own.")
    stored, wanted = {name: content["leaves"][saved] for name, saved in saved_as.items()}, _array_leaves(like)
    missing = [name for name in wanted if name not in stored]
    extra = [] if partial else [name for name in stored if name not in wanted]
    if missing or extra:
        raise CheckpointError(
            f"Checkpoint {path} does not fit: {_listing('it lacks', missing)}{_listing('the model lacks', extra)}"
            f"was it made with other options?"
        )
    for name, leaf in wanted.items():
        there, here = stored[name], _describe(leaf)
        if there != here:
            raise CheckpointError(
                f"Checkpoint {path} does not fit: leaf {name!r} is {there['dtype']}{there['shape']} there, but "
                f"{here['dtype']}{here['shape']} here; was it made with other options?"
            )
    try:
        arrays = read_arrays(path / ARRAYS, {saved_as[name]: _stored_form(leaf) for name, leaf in wanted.items()})
    except ValueError as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: {error}") from error
    restored = {name: _from_host(arrays[saved_as[name]], leaf) for name, leaf in wanted.items()}

    def restore(where: tuple, leaf: Any) -> Any:
        return restored[_name(where)] if _is_saved(leaf) else leaf

    return jax.tree_util.tree_map_with_path(restore, like), content["metadata"]


def load_latest_checkpoint(
    folder: str | os.PathLike[str], like: PyTree, *, partial: bool = False, rename: Callable[[str], str] = str
) -> Restored:
    """Loads the newest undamaged checkpoint in `folder`, and reports newer ones that are damaged.

    `like`, `partial` and `rename` are as for `load_checkpoint`.

    Raises a `FileNotFoundError` if there is no checkpoint, a `DamagedCheckpointError` if all of them are damaged, and a
    `CheckpointError` if the newest undamaged one does not match `like`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [save_checkpoint(folder, {"w": jnp.full(2, k)}, step=k, metadata={}) for k in (1, 2)]
    ...     (paths[1] / "index.json").unlink()
    ...     restored = load_latest_checkpoint(folder, {"w": jnp.zeros(2, jnp.int32)})
    >>> restored.path.name, restored.tree["w"].tolist(), len(restored.refused)
    ('00000001', [1, 1], 1)
    """
    steps = _checkpoints(Path(folder))
    if not steps:
        raise FileNotFoundError(f"There is no checkpoint in {folder}.")
    refused: list[DamagedCheckpointError] = []
    for path in sorted(steps, key=lambda path: (steps[path], path.suffix == ""), reverse=True):
        try:
            return Restored(path, *load_checkpoint(path, like, partial=partial, rename=rename), tuple(refused))
        except FileNotFoundError:
            refused.append(DamagedCheckpointError(f"Checkpoint {path} is damaged: {INDEX} is missing."))
        except DamagedCheckpointError as error:
            refused.append(error)
    lines = "\n".join(f"  {error}" for error in refused)
    raise DamagedCheckpointError(f"All checkpoints in {folder} are damaged. Use a backup or another folder.\n{lines}")


def remove_unfinished(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Removes the remains of unfinished saves from `folder`, and returns their paths. Checkpoints are not removed.

    A checkpoint that was renamed to be replaced, but whose replacement was never finished, gets its name back. Call
    this while nothing else writes to the folder, for example within `lock_folder`. Processes other than the first do
    nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(folder, {"w": jnp.ones(3)}, step=7, metadata={})
    ...     (path.parent / "00000009.tmp").mkdir()
    ...     removed = remove_unfinished(folder)
    ...     [path.name for path in removed], latest_checkpoint(folder).name
    (['00000009.tmp'], '00000007')
    """
    folder, removed = Path(folder), []
    if jax.process_index() > 0 or not folder.is_dir():
        return ()
    for path in sorted(folder.iterdir()):
        if path.suffix == REPLACED and NAME.fullmatch(path.name):
            if not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
                continue
            # Rename it first, so that a partly removed checkpoint does not look complete.
            shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        elif UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
        else:
            continue
        removed.append(path)
    return tuple(removed)


def _checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder and their steps. Each was complete when it got its name."""
    if not folder.is_dir():
        return {}
    matches = [(path, NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return {path: int(match[1]) for path, match in matches if match and path.is_dir()}


def _remove_old(folder: Path, step: int, keep: int) -> None:
    steps = _checkpoints(folder)
    kept_steps = sorted({other for other in steps.values() if other <= step}, reverse=True)[:keep]
    for path, other in steps.items():
        if path.suffix or (other < step and other not in kept_steps):
            # Rename it first, so that a partly removed checkpoint does not look complete.
            shutil.rmtree(path.rename(path.with_name(f"{other:08d}.tmp")))
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """The operating system's description of an error, extracted from tensorstore's message if necessary."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync(folder: Path) -> None:
    """Flushes the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "root"


def _is_saved(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | jax.ShapeDtypeStruct)


def _array_leaves(tree: PyTree) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_saved(leaf):
            if (name := _name(path)) in leaves:
                raise ValueError(f"Two leaves of the tree have the path {name!r}; rename a key.")
            leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """`jr.key_impl` that also takes a `ShapeDtypeStruct`."""
    impls = []
    jax.eval_shape(lambda key: impls.append(jr.key_impl(key)), leaf)
    return impls[0]


def _describe(leaf: Any) -> dict[str, Any]:
    """The properties in which a saved leaf and the one it is loaded into must agree."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf in the file, where typed keys are stored as their key data."""
    shape = jax.eval_shape(jr.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype)


def _from_host(array: np.ndarray, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return array
    sharding = leaf.sharding
    if sharding is not None and len(sharding.device_set) == 1:
        sharding = None
    if _is_key(leaf):
        keys = jr.wrap_key_data(jnp.array(array), impl=_key_impl(leaf))
        return keys if sharding is None else jax.device_put(keys, sharding)
    if sharding is None:
        return jnp.array(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}: it has no {INDEX}.")
    try:
        index = json.loads((path / INDEX).read_text())
        if index["crc32"] != _checksum(index["content"]):
            raise ValueError("Its checksum does not match.")
        content = index["content"]
        if not isinstance(content["metadata"], dict) or not all(
            {*leaf} == {"shape", "dtype"} for leaf in content["leaves"].values()
        ):
            raise ValueError("It was not written by save_checkpoint.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: {INDEX} cannot be read. {error}") from error
    return content


def _checksum(content: Any) -> int:
    """The CRC-32 of the values, independent of the layout of the file.

    The values are converted to JSON and back first, as that changes some of them (tuples, keys of dictionaries).
    """
    return zlib.crc32(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; "
