"""Conversion of parameters from torchvision and to torchvision, by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Shaped

from ._load import load_named
from ._names import current_name, current_torchvision_name, is_counter, without_prefixes
from ._source import arrays_by_name
from ._torchvision_names import torchvision_names
from ._trees import named_values


Model = TypeVar("Model", bound=eqx.Module)


def read_torchvision(
    source: str | os.PathLike | Mapping[str, Any], model: eqx.Module | None = None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads parameters from any supported source, by torchvision's names.

    - `source`: a `.pth` file (see `read_pth`), a `.safetensors` file with the names of torchvision or of this package,
      or a mapping from names to arrays.
    - `model`: the model that the parameters are for; its shapes are sufficient. If given, names of this package in a
      `.safetensors` file and former names of torchvision are replaced by torchvision's current names for this model.
      Otherwise all names stay as they are.

    Prefixes that all names share, such as `module.` and `model.`, are removed. Counters (`num_batches_tracked`,
    `n_averaged`) are dropped.

    >>> arrays = read_torchvision({"module.conv1.weight": np.ones(2), "n_averaged": np.array(7)})
    >>> list(arrays)
    ['conv1.weight']
    """
    own = isinstance(source, str | os.PathLike) and Path(source).suffix == ".safetensors"
    arrays = {name: array for name, array in arrays_by_name(source).items() if not is_counter(name)}
    arrays = without_prefixes(arrays)
    names = {} if model is None else torchvision_names(model)
    known = set(names.values())

    def renamed(name: str) -> str:
        if model is None or name in known:
            return name
        if own and (ours := name if name in names else current_name(name)) in names:
            return names[ours]
        return current if (current := current_torchvision_name(name)) in known else name

    return {renamed(name): np.asarray(array) for name, array in arrays.items()}


def load_torchvision(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """Returns a copy of `model` with torchvision's parameters.

    - `model`: a detector of `zoo`, or a backbone's body such as a `ResNet` for the checkpoint of an ImageNet
      classifier, whose last layers are ignored. Its shapes are sufficient (`equinox.filter_eval_shape`).
    - `source`: any source that `read_torchvision` accepts: a `.pth` file, read without torch and without running
      anything in it, a `.safetensors` file, or a mapping from torchvision's names to arrays.

    Every parameter of the model must be in the source, and every entry of the source must be used. Otherwise, raises a
    `WeightsError`. It says what the source seems to be, if that is another model, and lists entries that are missing,
    unused, of another shape, not floating point, or not finite.

    torchvision's two-stage detectors count the background as a class: their 91 classes are `num_classes=90` here, and
    label `k` here is their label `k + 1`. Its dense detectors have no background class: their 91 classes are
    `num_classes=91`, and labels are the same.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> body = resnet18(key=jr.key(0), width=8)
    >>> arrays = to_torchvision(body)
    >>> arrays["layer1.0.bn1.running_var"].shape
    (8,)
    >>> loaded = load_torchvision(body, arrays)
    """
    arrays, names = read_torchvision(source, model), torchvision_names(model)
    # The last layers of a classifier are not part of a backbone. Classifiers lack the prefix that detectors have.
    classifier = not any(name.startswith("backbone.") for name in arrays)
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given mapping"
    return load_named(model, arrays, names, origin, ignored=("fc.", "classifier.") if classifier else ())


def load_torchvision_backbone(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """Returns a copy of a detector whose backbone has the parameters of an ImageNet classifier's checkpoint.

    The classifier must have the architecture of `model.backbone.body`. `source` is as in `load_torchvision`. The
    pyramid and the heads keep their values.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> arrays = to_torchvision(resnet18(key=jr.key(3), width=8))
    >>> loaded = load_torchvision_backbone(model, arrays)
    >>> bool((loaded.backbone.body.conv1.weight == arrays["conv1.weight"]).all())
    True
    """

    def body(tree):
        return tree.backbone.body

    return eqx.tree_at(body, model, load_torchvision(body(model), source))


def to_torchvision(model: eqx.Module) -> dict[str, np.ndarray]:
    """Returns the parameters of a model by torchvision's names, for `load_state_dict` after `torch.from_numpy`.

    The inverse of `load_torchvision`, for the same models. Raises a `ValueError` for shapes without values.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> to_torchvision(resnet18(key=jr.key(0), width=8))["layer4.1.conv2.weight"].shape
    (64, 64, 3, 3)
    """
    names = torchvision_names(model)
    return {names[name]: np.array(leaf) for name, leaf in named_values(model).items()}
