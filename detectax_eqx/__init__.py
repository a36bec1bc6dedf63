"""Object detection and instance segmentation in JAX and Equinox.

Importing the package installs a jaxtyping and beartype import hook, so that every public function and module checks the
shapes and dtypes of its arguments when it is called. Under `jax.jit` the checks run at trace time only. To turn them
off, set the environment variable `DETECTAX_TYPECHECK=0` before importing.
"""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any


if _os.environ.get("DETECTAX_TYPECHECK", "1") != "0":
    from jaxtyping import install_import_hook as _install_import_hook

    from . import _typecheck as _typecheck  # imported before the hook, which refers to it by name

    _install_import_hook("detectax_eqx", "detectax_eqx._typecheck.check")

from ._types import (
    Batch as Batch,
    Detections as Detections,
    Images as Images,
    Targets as Targets,
    WeightedSum as WeightedSum,
)


if _TYPE_CHECKING:
    from . import (
        data as data,
        draw as draw,
        evaluate as evaluate,
        export as export,
        files as files,
        models as models,
        nn as nn,
        ops as ops,
        report as report,
        train as train,
        weights as weights,
        zoo as zoo,
    )


__version__ = "0.1.0"
_PACKAGES = ("data", "draw", "evaluate", "export", "files", "models", "nn", "ops", "report", "train", "weights", "zoo")


def __getattr__(name: str) -> _Any:
    """Imports a subpackage when it is first used: `import detectax_eqx as dx; dx.ops.nms`."""
    if name in _PACKAGES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES])
