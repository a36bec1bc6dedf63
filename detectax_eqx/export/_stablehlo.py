"""Exports a detector as StableHLO programs and weights in one `.npz` file that needs only JAX and NumPy to run."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import export

from ..files import whole_file
from ..models import AbstractDetector, Selection
from ._program import Shape, about_model, detection_program, named_outputs


PLATFORMS = ("cpu", "cuda", "tpu")
# RoIAlign constrains the memory layout of its features. XLA implements this custom call, but JAX does not guarantee its
# stability.
LAYOUT = export.DisabledSafetyCheck.custom_call("LayoutConstraint")


def save_stablehlo(
    model: AbstractDetector,
    path: str | os.PathLike,
    *,
    shapes: Sequence[Shape],
    class_names: Sequence[str],
    selection: Selection | None = None,
    platforms: Sequence[str] = PLATFORMS,
    any_batch: bool = False,
) -> None:
    """Writes a detector to a `.npz` file with one program for each of `shapes`. The programs share the weights.

    The detector may be any `AbstractDetector` that JAX can trace.

    The file holds:

    - `about`: JSON as bytes, with `class_names`, `shapes`, `preprocessing`, `selection`, `platforms`, `outputs`,
      `num_weights`, and the JAX version and calling convention with which the file was written.
    - `weights/0`, `weights/1`, …: the arrays that every program takes as its first argument, as a list.
    - `programs/NAME`, for each shape's `name`: the input of `jax.export.deserialize`. Calling the deserialised program
      takes the weights, uint8 images `(b, h, w, c)` and their int32 `(height, width)`, `(b, 2)`. It returns `outputs`:
      boxes, scores, labels, valid and, if the model predicts them, masks, keypoints and mask_boxes, as in
      `Detections`.

    `experiments/run_stablehlo.py` runs the file without this package. The file is written atomically: it is first
    written under a temporary name in the same folder, then renamed.

    - `selection`: which detections the programs keep; default `model.selection`, see `detection_program`.
    - `any_batch`: whether the programs take any number of images. If so, the `batch` of `shapes` is ignored, and is
      null in `about`. JAX compiles such a program once per batch size.

    Raises a `ValueError` if the number of `class_names` differs from the model's number of classes, if `shapes` is
    empty, for weights of a dtype that NumPy does not define, and in the cases of `detection_program`.
    """
    about = about_model(model, class_names, selection)
    if not shapes:
        raise ValueError("shapes must hold at least one Shape.")
    weights, rebuild = jax.tree.flatten(eqx.filter(model, eqx.is_array))
    foreign = {str(array.dtype) for array in weights if array.dtype.kind not in "fiub"}
    if foreign:
        raise ValueError(f"weights must have NumPy dtypes, got {', '.join(sorted(foreign))}: cast them first.")
    static = eqx.filter(model, eqx.is_array, inverse=True)
    programs, outputs = {}, []
    for shape in shapes:

        def run(weights, images, image_sizes, shape=shape):
            model = eqx.combine(jax.tree.unflatten(rebuild, weights), static)
            named = named_outputs(detection_program(model, shape, selection)(images, image_sizes))
            outputs[:] = named
            return tuple(named.values())

        batch = export.symbolic_shape("b")[0] if any_batch else shape.batch
        arguments = (
            [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in weights],
            jax.ShapeDtypeStruct((batch, *shape.source, shape.channels), np.uint8),
            jax.ShapeDtypeStruct((batch, 2), np.int32),
        )
        exported = export.export(jax.jit(run), platforms=tuple(platforms), disabled_checks=[LAYOUT])
        programs[shape.name] = exported(*arguments)
    about |= {
        "shapes": [
            asdict(shape) | {"name": shape.name, "batch": None if any_batch else shape.batch} for shape in shapes
        ],
        "platforms": list(platforms),
        "outputs": outputs,
        "num_weights": len(weights),
        "jax": jax.__version__,
        "calling_convention": max(program.calling_convention_version for program in programs.values()),
    }
    arrays: dict[str, Any] = {"about": _bytes(json.dumps(about).encode())}
    arrays |= {f"weights/{i}": np.asarray(array) for i, array in enumerate(weights)}
    arrays |= {f"programs/{name}": _bytes(program.serialize()) for name, program in programs.items()}
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _bytes(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(data), np.uint8)
