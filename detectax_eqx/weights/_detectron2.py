"""Conversion of parameters from Detectron2 and to Detectron2, by name."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Shaped

from ._detectron2_names import current_detectron2_name, detectron2_names, is_ignored, layouts
from ._load import load_named
from ._names import without_prefixes
from ._pkl import read_pkl
from ._source import arrays_by_name
from ._trees import named_leaves, named_values


Model = TypeVar("Model", bound=eqx.Module)

# Caffe2's ResNets have no statistics, which are part of the scale and the bias. Detectron2 assumes these, so that the
# norm, which adds its `eps` to the variance, is `weight * x + bias`.
CAFFE2_MEAN, CAFFE2_VARIANCE = 0.0, 1 - 1e-5


def read_detectron2(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads parameters by Detectron2's names.

    - `source`: a `.pkl` file of Detectron2's model zoo or of an ImageNet backbone (see `read_pkl`), a `.pth` file that
      Detectron2's trainer saved (see `read_pth`), a `.safetensors` file with Detectron2's names, or a mapping from
      names to arrays.

    The names of Caffe2's ResNets are replaced by Detectron2's, and their missing statistics are added. Entries that are
    not parameters are dropped: counters, mean and standard deviation of pixels, anchors, and a classifier's last layer.
    Arrays keep the arrangement that they have in Detectron2.

    >>> arrays = read_detectron2({"conv1_w": np.ones((8, 3, 7, 7)), "pred_w": np.ones(3)})
    >>> list(arrays)
    ['stem.conv1.weight']
    """
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".pkl":
        arrays = read_pkl(source)
    else:
        arrays = arrays_by_name(source)
    arrays = without_prefixes({name: array for name, array in arrays.items() if not is_ignored(name)})
    renamed = {current_detectron2_name(name): np.asarray(array) for name, array in arrays.items()}
    if renamed.keys() != arrays.keys():
        for name in [name for name in renamed if name.endswith(".norm.weight")]:
            for statistic, value in (("running_mean", CAFFE2_MEAN), ("running_var", CAFFE2_VARIANCE)):
                filled = np.full_like(renamed[name], value)
                renamed.setdefault(re.sub(r"weight$", statistic, name), filled)
    return renamed


def load_detectron2(model: Model, source: str | os.PathLike | Mapping[str, Any], *, bgr: bool = True) -> Model:
    """Returns a copy of `model` with Detectron2's parameters.

    - `model`: a detector made by `models.faster_rcnn_detectron2` or another function of `models` ending so, or a
      `ResNet` for an ImageNet backbone. Its shapes are sufficient (`equinox.filter_eval_shape`).
    - `source`: any source that `read_detectron2` accepts. Nothing in it is run.
    - `bgr`: whether the network was trained on BGR images, as are all ResNets of Detectron2's model zoo. Its first
      convolution is then reversed, since images are RGB here.

    Every parameter of the model must be in the source, and every entry of the source must be used. Otherwise, raises a
    `WeightsError` that lists entries that are missing, unused, of another shape, not floating point, or not finite. A
    file does not say which options it was trained with: ResNets of MSRA have their strides in the first 1×1
    convolutions (`stride_in_1x1=True`), torchvision's have not, and the shapes are the same.

    Parameters are rearranged where Detectron2 differs: the background is its last class and has neither a box nor a
    mask, and the anchors of a cell are in another order. Labels are the same: `0..num_classes - 1`.

    The weights of Detectron2's model zoo are licensed under CC BY-SA 3.0. So are files that are converted from them.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet50
    >>> body = resnet50(key=jr.key(0), width=4)
    >>> arrays = to_detectron2(body)
    >>> arrays["res5.0.shortcut.norm.running_var"].shape
    (128,)
    >>> loaded = load_detectron2(body, arrays)
    """
    rules = layouts(model, bgr=bgr)
    arrays = read_detectron2(source)
    for rule in rules:
        for name in [name for name in arrays if rule.pattern.search(name)]:
            if arrays[name].ndim:
                arrays[name] = rule.to_ours(arrays[name])
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given mapping"
    return load_named(model, arrays, detectron2_names(model), origin)


def load_detectron2_backbone(model: Model, source: str | os.PathLike | Mapping[str, Any], *, bgr: bool = True) -> Model:
    """Returns a copy of a detector whose ResNet has the parameters of an ImageNet backbone, such as MSRA's `R-50.pkl`.

    Arguments are those of `load_detectron2`. The pyramid and the heads keep their values.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import faster_rcnn_detectron2
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet50
    >>> backbone = BackboneWithFPN(resnet50(key=jr.key(0), width=4), key=jr.key(1), channels=16)
    >>> model = faster_rcnn_detectron2(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> arrays = to_detectron2(resnet50(key=jr.key(3), width=4))
    >>> loaded = load_detectron2_backbone(model, arrays)
    >>> bool((loaded.backbone.body.conv1.weight == arrays["stem.conv1.weight"][:, ::-1]).all())
    True
    """

    def body(tree):
        return tree.backbone.body

    return eqx.tree_at(body, model, load_detectron2(body(model), source, bgr=bgr))


def detectron2_shapes(model: eqx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by Detectron2's names. The model may consist of shapes only.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet50
    >>> detectron2_shapes(eqx.filter_eval_shape(lambda: resnet50(key=jr.key(0))))["stem.conv1.weight"]
    (64, 3, 7, 7)
    """
    names, rules = detectron2_names(model), layouts(model, bgr=True)
    shapes = {}
    for name, leaf in named_leaves(model).items():
        array = np.broadcast_to(np.zeros((), bool), leaf.shape)  # takes no memory
        for rule in rules:
            if rule.pattern.search(names[name]):
                array = rule.to_theirs(array)
        shapes[names[name]] = array.shape
    return shapes


def to_detectron2(model: eqx.Module, *, bgr: bool = True) -> dict[str, np.ndarray]:
    """Returns the parameters of a model by Detectron2's names, in its arrangement, for `load_state_dict`.

    The inverse of `load_detectron2`, for the same models. Raises a `ValueError` for shapes without values.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet50
    >>> to_detectron2(resnet50(key=jr.key(0), width=4))["stem.conv1.weight"].shape
    (4, 3, 7, 7)
    """
    names, rules = detectron2_names(model), layouts(model, bgr=bgr)
    arrays = {names[name]: np.array(leaf) for name, leaf in named_values(model).items()}
    for rule in rules:
        for name in [name for name in arrays if rule.pattern.search(name)]:
            arrays[name] = np.ascontiguousarray(rule.to_theirs(arrays[name]))
    return arrays
