"""Checks for optional packages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


# The modules that each extra of pyproject.toml installs, by import name.
EXTRAS = {
    "onnx": ("jax2onnx", "onnx", "onnxruntime"),
    "edge": ("litert_converter", "ai_edge_quantizer", "ai_edge_litert"),
}


def require(extra: str) -> None:
    """Raises an `ImportError` with the install command unless every module of the extra is installed.

    >>> require("onxx")
    Traceback (most recent call last):
    ...
    KeyError: 'onxx'
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} is missing. Install the extra {extra!r}: pip install 'detectax_eqx[{extra}]'."
        )


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A context in which the logger `name` reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
