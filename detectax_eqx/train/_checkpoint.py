"""Checkpoints that are complete or not there at all, and that do not load if a single bit is wrong.

A checkpoint is a folder named after its step. `index.json` holds the metadata and every leaf's shape and dtype, under a
checksum; `arrays/` is one OCDBT store of zarr3 arrays, each under a checksum of its own. It is written under another
name, flushed to disk, and only then renamed.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree


INDEX, ARRAYS = "index.json", "arrays"
# A folder that a checkpoint of the same step is about to replace counts until it is gone.
NAME = re.compile(r"(\d{8,})(\.replaced)?")
UNFINISHED = re.compile(r"\d{8,}\.tmp")


def save_checkpoint(
    folder: str | os.PathLike[str], tree: PyTree, *, step: int, metadata: dict[str, Any], keep: int = 2
) -> Path:
    """Writes the arrays of `tree` and `metadata` to `folder/<step>`, and returns that path.

    A process killed at any moment leaves the earlier checkpoints as they were. Once the new one is on disk, older ones
    beyond the `keep` newest are removed (later ones are left alone). One process at a time may write to a folder.

    - `tree`: arrays of JAX and NumPy, typed keys included, are saved under their path in the tree. All other leaves
      (functions, Python numbers) are not: they are taken from the tree that a checkpoint is loaded into.
    - `metadata`: anything that JSON can hold: categories, name and options of the model.

    Raises a `ValueError` if `keep` is less than 1, `step` is negative, or two leaves have the same path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(folder, {"w": jnp.ones(3)}, step=7, metadata={"classes": ["cat"]})
    ...     tree, metadata = load_checkpoint(latest_checkpoint(folder), {"w": jnp.zeros(3)})
    >>> path.name, tree["w"].tolist(), metadata
    ('00000007', [1.0, 1.0, 1.0], {'classes': ['cat']})
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    leaves = _array_leaves(tree)
    content = {
        "format": 1,
        "step": step,
        "metadata": metadata,
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
    }
    index = json.dumps({"crc32": _checksum(content), "content": content}, indent=1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{step:08d}"
    temporary, replaced = final.with_name(f"{final.name}.tmp"), final.with_name(f"{final.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _write_arrays(temporary, {name: _to_host(leaf) for name, leaf in leaves.items()})
    with (temporary / INDEX).open("w") as file:
        file.write(index)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _sync(folder)
    _remove_old(folder, step, keep)
    return final


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or `None` if there is none, or no such folder.

    >>> latest_checkpoint("no/such/folder") is None
    True
    """
    found = _checkpoints(Path(folder))
    return max(found, key=lambda path: (found[path], path.suffix == "")) if found else None


def load_checkpoint(
    path: str | os.PathLike[str], like: PyTree, *, partial: bool = False
) -> tuple[PyTree, dict[str, Any]]:
    """The tree that was saved at `path`, bit for bit, and its metadata.

    - `like`: a tree of the same structure, shapes and dtypes, from the same code that built the saved one. Its arrays
      may be `jax.ShapeDtypeStruct`s (`eqx.filter_eval_shape`). Leaves that are not arrays are returned as they are.

    - `partial`: `like` may lack leaves of the saved tree: only the model of a `TrainState`, say, or nothing (`{}`) to
      read the metadata alone.

    Arrays come back on the default device; where `like` has a NumPy array, as one.

    Raises a `FileNotFoundError` if there is no checkpoint at `path`, and a `ValueError` that names checkpoint and leaf
    if a leaf is missing, left over, of another shape or dtype, or damaged.
    """
    path = Path(path)
    content = _read_index(path)
    stored, wanted = content["leaves"], _array_leaves(like)
    missing = [name for name in wanted if name not in stored]
    extra = [] if partial else [name for name in stored if name not in wanted]
    if missing or extra:
        raise ValueError(
            f"Checkpoint {path} does not fit: {_listing('it lacks', missing)}{_listing('the model lacks', extra)}"
            f"was it made with other options?"
        )
    for name, leaf in wanted.items():
        there, here = stored[name], _describe(leaf)
        if there != here:
            raise ValueError(
                f"Checkpoint {path} does not fit: leaf {name!r} is {there['dtype']}{there['shape']} there, but "
                f"{here['dtype']}{here['shape']} here; was it made with other options?"
            )
    arrays = _read_arrays(path, {name: _stored_form(leaf) for name, leaf in wanted.items()})
    restored = {name: _from_host(arrays[name], leaf) for name, leaf in wanted.items()}

    def restore(where: tuple, leaf: Any) -> Any:
        return restored[_name(where)] if _is_saved(leaf) else leaf

    return jax.tree_util.tree_map_with_path(restore, like), content["metadata"]


def _checkpoints(folder: Path) -> dict[Path, int]:
    """Complete checkpoints and their steps."""
    if not folder.is_dir():
        return {}
    matches = [(path, NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return {path: int(match[1]) for path, match in matches if match and (path / INDEX).is_file()}


def _remove_old(folder: Path, step: int, keep: int) -> None:
    found = _checkpoints(folder)
    kept = sorted({other for other in found.values() if other <= step}, reverse=True)[:keep]
    for path, other in found.items():
        if path.suffix or (other < step and other not in kept):
            shutil.rmtree(path)
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


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


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf, order="C")


def _from_host(array: np.ndarray, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return array
    if _is_key(leaf):
        return jr.wrap_key_data(jnp.array(array), impl=_key_impl(leaf))
    return jnp.array(array)


def _spec(path: Path, name: str, form: Any) -> dict[str, Any]:
    """One chunk an array, uncompressed: floats hardly shrink, and the accelerator waits meanwhile."""
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{(path / ARRAYS).resolve()}/"},
            "path": f"{name}/",
        },
        "metadata": {
            "shape": list(form.shape),
            "data_type": np.dtype(form.dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in form.shape]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        # Zeros too: a chunk that is not there would be read as zeros, with nothing to check.
        "store_data_equal_to_fill_value": True,
    }


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All arrays or none. One context for all: one for each array is 30 to 50 times slower."""
    context, transaction = ts.Context(), ts.Transaction(atomic=True)
    stores = {
        name: ts.open(_spec(path, name, array), create=True, context=context, transaction=transaction)
        for name, array in arrays.items()
    }
    # Referring to the source saves a copy; `arrays` lives until the transaction is committed.
    writes = [
        stores[name].result().write(array, can_reference_source_data_indefinitely=True)
        for name, array in arrays.items()
    ]
    for write in writes:
        write.result()
    transaction.commit_sync()


def _read_arrays(path: Path, forms: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    context = ts.Context()
    stores = {name: ts.open(_spec(path, name, form), open=True, context=context) for name, form in forms.items()}
    reads, arrays = {}, {}
    name = ""
    try:
        for name, store in stores.items():
            reads[name] = store.result().read()
        for name, read in reads.items():
            arrays[name] = read.result()
    except ValueError as error:
        raise ValueError(f"Checkpoint {path} is damaged: leaf {name!r} cannot be read. {error}") from error
    return arrays


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}: it has no {INDEX}.")
    try:
        index = json.loads((path / INDEX).read_text())
        if index["crc32"] != _checksum(index["content"]):
            raise ValueError("Its checksum is wrong.")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Checkpoint {path} is damaged: {INDEX} cannot be read. {error}") from error
    return index["content"]


def _checksum(content: Any) -> int:
    """Of the values, whatever the layout of the file. Through JSON once, as some values change there (tuples, keys)."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; "
