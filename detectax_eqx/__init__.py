"""Object detection and instance segmentation in JAX and Equinox.

Importing the package installs a jaxtyping + beartype import hook, so that every public function and module checks the
shapes and dtypes of its arguments when it is called. Under `jax.jit` that costs trace time only. Set the environment
variable `DETECTAX_TYPECHECK=0` before importing to turn it off.
"""

import os as _os


if _os.environ.get("DETECTAX_TYPECHECK", "1") != "0":
    from jaxtyping import install_import_hook as _install_import_hook

    from . import _typecheck as _typecheck  # imported before the hook, which refers to it by name

    _install_import_hook("detectax_eqx", "detectax_eqx._typecheck.check")

from ._types import Batch as Batch, Detections as Detections, Targets as Targets, WeightedSum as WeightedSum


__version__ = "0.1.0"
