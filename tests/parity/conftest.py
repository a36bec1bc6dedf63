"""Leaves out what imports Detectron2 where it is not installed; pytest imports every module for its doctests."""

from importlib.util import find_spec

import jax
import pytest


collect_ignore = [] if find_spec("detectron2") else ["detectron2_models.py", "make_detectron2_reference.py"]


@pytest.fixture(autouse=True)
def unload():
    """Unloads compiled programs after each test: Linux limits the number of memory maps of a process to 65,530."""
    yield
    jax.clear_caches()
