"""Names the arrays of a PyTree, and replaces them by name: all of them or none."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree, Shaped


Tree = TypeVar("Tree")

ARRAYS = jax.Array, np.ndarray, jax.ShapeDtypeStruct  # the last stands for an array without values
MAX_LISTED = 20  # entries of each kind listed in a message; the attributes of the error hold all of them


class WeightsError(ValueError):
    """Raised for weights that cannot be read or do not fit the model.

    - `missing`: names in the model that are not in the source. `unused`: names in the source that are not in the model.
    - `mismatched`: a line for each entry whose shape or dtype differs, with both.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unused: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ):
        super().__init__(message)
        self.missing, self.unused, self.mismatched = missing, unused, mismatched


def named_leaves(tree: PyTree) -> dict[str, Shaped[jax.Array | np.ndarray | jax.ShapeDtypeStruct, "..."]]:
    """Returns the arrays of a tree by dotted path, such as `backbone.body.layers.0.0.conv1.weight`, in tree order.

    Only JAX arrays, NumPy arrays and `jax.ShapeDtypeStruct`s are included, not functions or Python numbers.

    Raises a `ValueError` if two leaves have the same name. This requires a dictionary with dots in its keys.

    >>> import jax.numpy as jnp
    >>> {name: leaf.shape for name, leaf in named_leaves({"a": [jnp.zeros(2), 1.0], "b": jnp.zeros((3, 1))}).items()}
    {'a.0': (2,), 'b': (3, 1)}
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, ARRAYS):
            name = _name(path)
            if name in leaves:
                raise ValueError(
                    f"Two leaves of the tree are called {name!r}. Give their dictionaries keys without dots."
                )
            leaves[name] = leaf
    return leaves


def named_values(tree: PyTree) -> dict[str, Shaped[jax.Array | np.ndarray, "..."]]:
    """Returns the `named_leaves` of a tree whose arrays all have values.

    Raises a `ValueError` for a leaf that is a `jax.ShapeDtypeStruct`.
    """
    values = {}
    for name, leaf in named_leaves(tree).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name} is a shape without values, as eval_shape returns. Load weights into the model first."
            )
        values[name] = leaf
    return values


def replace_leaves(tree: Tree, arrays: Mapping[str, Any], *, source: str = "the given arrays") -> Tree:
    """Returns a copy of `tree` with every array replaced by the array of the same name in `arrays`.

    - `arrays`: by the names of `named_leaves`. Each must have the shape and dtype of the leaf that it replaces. Arrays
      are copied, so that changing them later does not change the tree. A leaf without values (as in a model made with
      `equinox.filter_eval_shape`, which allocates nothing) is replaced by a JAX array.
    - `source`: the origin of the arrays, for the error message.

    Raises one `WeightsError` that lists every name that is missing, unused, or of another shape or dtype.

    >>> import jax.numpy as jnp
    >>> replace_leaves({"a": jnp.zeros(2), "activation": abs}, {"a": np.ones(2, np.float32)})
    {'a': Array([1., 1.], dtype=float32), 'activation': <built-in function abs>}
    >>> replace_leaves({"a": jnp.zeros(2)}, {"b": np.ones(2, np.float32)}, source="b.pth")
    Traceback (most recent call last):
    ...
    detectax_eqx.weights._trees.WeightsError: b.pth does not fit the model.
      1 missing in the source: a
      1 unused in the source: b
    """
    leaves = named_leaves(tree)
    missing = tuple(name for name in leaves if name not in arrays)
    unused = tuple(name for name in arrays if name not in leaves)
    mismatched = tuple(
        f"{name} is {_describe(arrays[name])} in the source but {_describe(leaf)} in the model"
        for name, leaf in leaves.items()
        if name in arrays and _describe(arrays[name]) != _describe(leaf)
    )
    if missing or unused or mismatched:
        lines = [f"{source} does not fit the model."]
        kinds = (("missing in the source", missing), ("unused in the source", unused), ("mismatched", mismatched))
        for kind, entries in kinds:
            if entries:
                more = f", … and {len(entries) - MAX_LISTED} more" if len(entries) > MAX_LISTED else ""
                lines.append(f"  {len(entries)} {kind}: {', '.join(entries[:MAX_LISTED])}{more}")
        raise WeightsError("\n".join(lines), missing=missing, unused=unused, mismatched=mismatched)

    def replacement(path, leaf):
        if not isinstance(leaf, ARRAYS):
            return leaf
        array = np.array(arrays[_name(path)])
        # jnp.array would compile a program per shape.
        return array if isinstance(leaf, np.ndarray) else jax.device_put(array)

    return jax.tree_util.tree_map_with_path(replacement, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _describe(array: Any) -> str:
    array = array if isinstance(array, ARRAYS) else np.asarray(array)
    return f"{array.dtype} {tuple(array.shape)}"
