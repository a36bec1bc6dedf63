"""A model's arrays as a safetensors file, by their names in the PyTree."""

import os
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import whole_file
from ._describe import explain
from ._names import current_own_name
from ._published import check_exists
from ._trees import WeightsError, named_leaves, named_values, replace_leaves


Model = TypeVar("Model")


def save_safetensors(model: PyTree, path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes every array of `model` to a safetensors file, under its name in the tree (`named_leaves`).

    - `model`: a module, or a flat dictionary of arrays such as `to_torchvision` gives, whose keys are then the names.
    - `metadata`: strings to go with them, such as the categories that the labels stand for.

    The file appears complete or not at all: it is written beside, then renamed.

    Raises a `ValueError` for typed PRNG keys, which the format has no place for (`jax.random.key_data` gives numbers),
    and for shapes without values.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors({"w": jnp.ones(2)}, f"{folder}/model.safetensors", metadata={"classes": "cat dog"})
    ...     os.listdir(folder)
    ['model.safetensors']
    """
    arrays = {}
    for name, leaf in named_values(model).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name} is a PRNG key, which safetensors cannot hold. Store jax.random.key_data of it.")
        arrays[name] = np.ascontiguousarray(leaf).reshape(leaf.shape)  # NumPy makes scalars one-dimensional
    with whole_file(path) as temporary:
        save_file(arrays, temporary, metadata=None if metadata is None else dict(metadata))


def load_safetensors(model: Model, path: str | os.PathLike) -> Model:
    """A copy of `model`, which may be one of shapes alone, with the arrays of a file that `save_safetensors` wrote.

    Names that this package gave up are replaced by today's.

    Raises a `WeightsError` that names the file if it is damaged, or says what it seems to be, if that is another model,
    and lists every array of the model that it lacks, every one that it has too many, and every one of another shape or
    dtype (with both).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors({"w": jnp.ones(2)}, f"{folder}/model.safetensors")
    ...     load_safetensors({"w": jnp.zeros(2)}, f"{folder}/model.safetensors")
    {'w': Array([1., 1.], dtype=float32)}
    """
    leaves = named_leaves(model)
    arrays = {
        name if name in leaves else current_own_name(name): array for name, array in read_safetensors(path)[0].items()
    }
    try:
        return replace_leaves(model, arrays, source=str(path))
    except WeightsError as error:
        raise explain(error, str(path), arrays, leaves) from None


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    Raises a `WeightsError` that names the file if it is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors({"w": jnp.ones(2)}, f"{folder}/model.safetensors", metadata={"classes": "cat dog"})
    ...     read_safetensors(f"{folder}/model.safetensors")
    ({'w': array([1., 1.], dtype=float32)}, {'classes': 'cat dog'})
    """
    check_exists(path)
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"Cannot read {path}: it is damaged or no safetensors file ({error}).") from error
