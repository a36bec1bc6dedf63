"""Optional packages, and what to install where one is missing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


# What each extra of pyproject.toml brings, by the names under which it is imported.
EXTRAS = {
    "onnx": ("jax2onnx", "onnx", "onnxruntime"),
    "edge": ("litert_converter", "ai_edge_quantizer", "ai_edge_litert"),
}


def require(extra: str) -> None:
    """Raises an `ImportError` that names the extra and how to install it, unless all that it brings is there.

    >>> require("onxx")
    Traceback (most recent call last):
    ...
    KeyError: 'onxx'
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} is missing, which the extra {extra!r} brings: pip install 'detectax_eqx[{extra}]'."
        )


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Within it, the library's logger `name` passes on errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
