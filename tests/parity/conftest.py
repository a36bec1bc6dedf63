"""Leaves out what imports Detectron2 where it is not installed; pytest imports every module for its doctests."""

from importlib.util import find_spec


collect_ignore = [] if find_spec("detectron2") else ["detectron2_models.py", "make_detectron2_reference.py"]
