"""Checkpoints that are complete or not there at all, and that do not load if a single bit is wrong.

A checkpoint is a folder named after its step. `index.json` holds the metadata and every leaf's shape and dtype, under a
checksum; `arrays/` is one OCDBT store of zarr3 arrays, each under a checksum of its own. It is written under another
name, flushed to disk, and only then renamed.

Of several processes, the first one writes, after it gathered what it does not hold; all of them read.
"""

import json
import os
import re
import shutil
import zlib
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
# A folder that a checkpoint of the same step is about to replace counts until it is gone.
REPLACED = ".replaced"
NAME = re.compile(rf"(\d{{8,}})({re.escape(REPLACED)})?")
UNFINISHED = re.compile(r"\d{8,}\.tmp")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that does not fit what it is loaded into."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which a file is missing or has changed since it was written."""


class Restored(NamedTuple):
    """What `load_latest_checkpoint` found.

    - `path`: the checkpoint that was loaded. `tree` and `metadata`: what is in it.
    - `refused`: for each newer checkpoint that is damaged, the error that says so.
    """

    path: Path
    tree: PyTree
    metadata: dict[str, Any]
    refused: tuple[DamagedCheckpointError, ...]


class Snapshot(NamedTuple):
    """What is to be written, on the host and out of the reach of later steps."""

    step: int
    text: str
    arrays: dict[str, np.ndarray]


def save_checkpoint(
    folder: str | os.PathLike[str], tree: PyTree, *, step: int, metadata: dict[str, Any], keep: int = 2
) -> Path:
    """Writes the arrays of `tree` and `metadata` to `folder/<step>`, and returns that path.

    A process killed at any moment leaves the earlier checkpoints as they were. Once the new one is on disk, older ones
    beyond the `keep` newest are removed (later ones are left alone). One process at a time may write to a folder. A
    `CheckpointSaver` does the same while training goes on.

    - `tree`: arrays of JAX and NumPy, typed keys included, are saved under their path in the tree, whole, however they
      lie on devices. All other leaves (functions, Python numbers) are not: they are taken from the tree that a
      checkpoint is loaded into. Where there are several processes, each has to call this.
    - `metadata`: anything that JSON can hold: categories, name and options of the model.

    Raises a `ValueError` if `keep` is less than 1, `step` is negative, or two leaves have the same path, and a
    `CheckpointError` that says what to do if the checkpoint cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(folder, {"w": jnp.ones(3)}, step=7, metadata={"classes": ["cat"]})
    ...     tree, metadata = load_checkpoint(latest_checkpoint(folder), {"w": jnp.zeros(3)})
    >>> path.name, tree["w"].tolist(), metadata
    ('00000007', [1.0, 1.0, 1.0], {'classes': ['cat']})
    """
    return write_snapshot(Path(folder), take_snapshot(tree, step, metadata), keep)


def take_snapshot(tree: PyTree, step: int, metadata: dict[str, Any]) -> Snapshot:
    """A copy of what is to be saved, which a step that consumes `tree` does not touch."""
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
            value.copy_to_host_async()  # all under way before the first is waited for
    return Snapshot(step, text, {name: host_copy(value) for name, value in values.items()})


def write_snapshot(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes a checkpoint of what `take_snapshot` copied. Processes other than the first do nothing."""
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
    except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, its part of the space
        raise CheckpointError(
            f"Cannot save checkpoint {final}: {_reason(error)}. Earlier checkpoints in {folder} are as they were. "
            f"Make room there or see to it that it can be written to, and go on from the newest of them."
        ) from error
    return final


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or `None` if there is none, or no such folder.

    >>> latest_checkpoint("no/such/folder") is None
    True
    """
    steps = {path: step for path, step in _checkpoints(Path(folder)).items() if (path / INDEX).is_file()}
    return max(steps, key=lambda path: (steps[path], path.suffix == "")) if steps else None


def load_checkpoint(
    path: str | os.PathLike[str], like: PyTree, *, partial: bool = False
) -> tuple[PyTree, dict[str, Any]]:
    """The tree that was saved at `path`, bit for bit, and its metadata.

    - `like`: a tree of the same structure, shapes and dtypes, from the same code that built the saved one. Its arrays
      may be `jax.ShapeDtypeStruct`s (`eqx.filter_eval_shape`). Leaves that are not arrays are returned as they are.

    - `partial`: `like` may lack leaves of the saved tree: only the model of a `TrainState`, say, or nothing (`{}`) to
      read the metadata alone.

    Arrays come back laid out on devices as those of `like` are, whatever they were saved from: on one device, the
    default one. Where `like` has a NumPy array, as one.

    Raises a `FileNotFoundError` if there is no checkpoint at `path`, a `CheckpointError` that names checkpoint and leaf
    if a leaf is missing, left over, or of another shape or dtype, and a `DamagedCheckpointError` if one is damaged.
    """
    path = Path(path)
    content = _read_index(path)
    stored, wanted = content["leaves"], _array_leaves(like)
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
        arrays = read_arrays(path / ARRAYS, {name: _stored_form(leaf) for name, leaf in wanted.items()})
    except ValueError as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: {error}") from error
    restored = {name: _from_host(arrays[name], leaf) for name, leaf in wanted.items()}

    def restore(where: tuple, leaf: Any) -> Any:
        return restored[_name(where)] if _is_saved(leaf) else leaf

    return jax.tree_util.tree_map_with_path(restore, like), content["metadata"]


def load_latest_checkpoint(folder: str | os.PathLike[str], like: PyTree, *, partial: bool = False) -> Restored:
    """Loads the newest checkpoint in `folder` that is whole, and says which newer ones are not.

    `like` and `partial` are `load_checkpoint`'s.

    Raises a `FileNotFoundError` if there is no checkpoint, a `DamagedCheckpointError` if none of them is whole, and a
    `CheckpointError` if the newest that is does not fit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [save_checkpoint(folder, {"w": jnp.full(2, k)}, step=k, metadata={}) for k in (1, 2)]
    ...     (paths[1] / "index.json").unlink()
    ...     restored = load_latest_checkpoint(folder, {"w": jnp.zeros(2, jnp.int32)})
    >>> restored.path.name, restored.tree["w"].tolist(), len(restored.refused)
    ('00000001', [1, 1], 1)
    """
    found = _checkpoints(Path(folder))
    if not found:
        raise FileNotFoundError(f"There is no checkpoint in {folder}.")
    refused: list[DamagedCheckpointError] = []
    for path in sorted(found, key=lambda path: (found[path], path.suffix == ""), reverse=True):
        try:
            return Restored(path, *load_checkpoint(path, like, partial=partial), tuple(refused))
        except FileNotFoundError:
            refused.append(DamagedCheckpointError(f"Checkpoint {path} is damaged: {INDEX} is missing."))
        except DamagedCheckpointError as error:
            refused.append(error)
    lines = "\n".join(f"  {error}" for error in refused)
    raise DamagedCheckpointError(f"No checkpoint in {folder} is whole; use a copy, or start again elsewhere.\n{lines}")


def remove_unfinished(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Removes what a save left in `folder` as its process was killed, and returns the paths. Checkpoints stay.

    A checkpoint that was moved away, and whose successor never got its name, gets its own back. Call it while nothing
    else writes to the folder, as within `lock_folder`. Processes other than the first do nothing.

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
            # Under another name first: half of a checkpoint must not look like one.
            shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        elif UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
        else:
            continue
        removed.append(path)
    return tuple(removed)


def _checkpoints(folder: Path) -> dict[Path, int]:
    """Checkpoints and their steps. Each was whole when it got its name."""
    if not folder.is_dir():
        return {}
    matches = [(path, NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return {path: int(match[1]) for path, match in matches if match and path.is_dir()}


def _remove_old(folder: Path, step: int, keep: int) -> None:
    found = _checkpoints(folder)
    kept = sorted({other for other in found.values() if other <= step}, reverse=True)[:keep]
    for path, other in found.items():
        if path.suffix or (other < step and other not in kept):
            # Under the name of an unfinished one first: half of a checkpoint must not look like one.
            shutil.rmtree(path.rename(path.with_name(f"{other:08d}.tmp")))
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """The operating system's words for what went wrong, out of tensorstore's message if need be."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
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
    """`jr.key_impl`, of a `ShapeDtypeStruct` too."""
    found = []
    jax.eval_shape(lambda key: found.append(jr.key_impl(key)), leaf)
    return found[0]


def _describe(leaf: Any) -> dict[str, Any]:
    """What must agree between a leaf that was saved and the one it is loaded into."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf as it is written: keys are their data."""
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
            raise ValueError("Its checksum is wrong.")
        content = index["content"]
        if not isinstance(content["metadata"], dict) or not all(
            {*leaf} == {"shape", "dtype"} for leaf in content["leaves"].values()
        ):
            raise ValueError("It is not what save_checkpoint writes.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: {INDEX} cannot be read. {error}") from error
    return content


def _checksum(content: Any) -> int:
    """Of the values, whatever the layout of the file. Through JSON once, as some values change there (tuples, keys)."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; "
