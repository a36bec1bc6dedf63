"""Loads arrays under another library's names into a model."""

from collections.abc import Mapping
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ._describe import explain
from ._trees import MAX_LISTED, WeightsError, named_leaves, replace_leaves


Model = TypeVar("Model", bound=eqx.Module)


def load_named(
    model: Model,
    arrays: Mapping[str, Shaped[np.ndarray, "..."]],
    names: Mapping[str, str],
    origin: str,
    ignored: tuple[str, ...] = (),
) -> Model:
    """Returns a copy of `model` with `arrays`, by the names of another library.

    - `names`: maps the names of `named_leaves(model)` to those of the library.
    - `origin`: where the arrays are from, for messages.
    - `ignored`: prefixes of names that need not be used.

    Raises a `WeightsError` if an array is missing, unused, of another shape, not floating point, or not finite.
    """
    wanted = {names[name]: (name, leaf) for name, leaf in named_leaves(model).items()}
    replacements, nonfinite = {}, []
    for name, array in arrays.items():
        if name.startswith(ignored):
            continue
        ours, leaf = wanted.get(name, (name, None))
        # Arrays that do not fit are not copied, since a shape alone can make them large. They are reported below.
        if leaf is not None and array.shape == leaf.shape and jnp.issubdtype(array.dtype, jnp.floating):
            with np.errstate(over="ignore"):
                array = array.astype(leaf.dtype)
            if not np.isfinite(array).all():
                nonfinite.append(name)
        replacements[ours] = array
    try:
        loaded = replace_leaves(model, replacements, source=origin)
    except WeightsError as error:
        raise explain(error, origin, arrays, {name: leaf for name, (_, leaf) in wanted.items()}) from None
    if nonfinite:
        raise WeightsError(f"{origin} has non-finite values in {', '.join(nonfinite[:MAX_LISTED])}.")
    return loaded
