"""Safetensors files of the arrays of a model, by their names in the PyTree."""

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
from ._names import current_name
from ._published import check_exists
from ._trees import WeightsError, named_leaves, named_values, replace_leaves


Model = TypeVar("Model")


def save_safetensors(model: PyTree, path: str | os.PathLike, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes every array of `model` to a safetensors file under its name in the tree (`named_leaves`).

    - `model`: a module, or a flat dictionary of arrays, such as the result of `to_torchvision`, whose keys become the
      names.
    - `metadata`: strings to store with the arrays, such as the categories of the labels.

    The file is written atomically: to a temporary file beside it, which is then renamed.

    Raises a `ValueError` for typed PRNG keys, which the format cannot represent (store `jax.random.key_data` instead),
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
        arrays[name] = np.ascontiguousarray(leaf).reshape(leaf.shape)  # ascontiguousarray makes scalars one-dimensional
    with whole_file(path) as temporary:
        save_file(arrays, temporary, metadata=None if metadata is None else dict(metadata))


def load_safetensors(model: Model, path: str | os.PathLike) -> Model:
    """Returns a copy of `model` with the arrays of a file that `save_safetensors` wrote.

    - `model`: its shapes are sufficient (`equinox.filter_eval_shape`).

    Former names of this package are replaced by the current ones.

    Raises a `WeightsError` that names the file if it is damaged or does not fit the model. In the latter case, it says
    what the file seems to be, if that is another model, and lists every missing array, every unused array, and every
    array of another shape or dtype (with both).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors({"w": jnp.ones(2)}, f"{folder}/model.safetensors")
    ...     load_safetensors({"w": jnp.zeros(2)}, f"{folder}/model.safetensors")
    {'w': Array([1., 1.], dtype=float32)}
    """
    leaves = named_leaves(model)
    arrays = {
        name if name in leaves else current_name(name): array for name, array in read_safetensors(path)[0].items()
    }
    try:
        return replace_leaves(model, arrays, source=str(path))
    except WeightsError as error:
        raise explain(error, str(path), arrays, leaves) from None


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
    """Returns the arrays of a safetensors file by name, and its metadata.

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
        raise WeightsError(f"Cannot read {path}: it is damaged or not a safetensors file ({error}).") from error
