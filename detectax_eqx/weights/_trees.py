"""The arrays of a PyTree by name, and their replacement, which is complete or does not happen."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree, Shaped


Tree = TypeVar("Tree")

ARRAYS = jax.Array, np.ndarray, jax.ShapeDtypeStruct  # the last stands for one whose values are still to come
LISTED = 20  # entries of each kind that a message lists; the error's attributes hold all


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit the model they are for.

    - `missing`: names that the model has and the source has not. `unused`: the other way round.
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
    """The arrays of a tree by their dotted path, such as `backbone.body.layers.0.0.conv1.weight`, in the tree's order.

    Leaves that are neither arrays of JAX or NumPy nor shapes that stand for them (functions, Python numbers) are left
    out.

    Raises a `ValueError` if two leaves have the same name, which takes a dictionary with dots in its keys.

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
    """`named_leaves` of a tree that holds values.

    Raises a `ValueError` for a leaf that is a shape alone.
    """
    values = {}
    for name, leaf in named_leaves(tree).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name} is a shape without values, as eval_shape gives. Load weights into the model first."
            )
        values[name] = leaf
    return values


def replace_leaves(tree: Tree, arrays: Mapping[str, Any], *, source: str = "the given arrays") -> Tree:
    """A copy of `tree` whose every array is the one of that name in `arrays`.

    - `arrays`: under the names of `named_leaves`, each of the very shape and dtype of the leaf that it replaces. They
      are copied, so that changing them later does not change the tree. Where the leaf is a shape alone
      (`equinox.filter_eval_shape` makes a model of such, at no cost), it becomes an array of JAX.
    - `source`: where they come from, for the message.

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
                more = f", … and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
                lines.append(f"  {len(entries)} {kind}: {', '.join(entries[:LISTED])}{more}")
        raise WeightsError("\n".join(lines), missing=missing, unused=unused, mismatched=mismatched)

    def replacement(path, leaf):
        if not isinstance(leaf, ARRAYS):
            return leaf
        array = np.array(arrays[_name(path)])
        # jnp.array would compile a program for each shape.
        return array if isinstance(leaf, np.ndarray) else jax.device_put(array)

    return jax.tree_util.tree_map_with_path(replacement, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _describe(array: Any) -> str:
    array = array if isinstance(array, ARRAYS) else np.asarray(array)
    return f"{array.dtype} {tuple(array.shape)}"
