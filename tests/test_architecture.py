"""Checks the layering and the layout of the package by reading its imports."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import get_args

import pytest

import detectax_eqx
from detectax_eqx._xla import _plain


PACKAGE = Path(detectax_eqx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import from within the package. Nothing imports `experiments`; `ops` depends on arrays only.
MAY_IMPORT = {
    "_types": set(),
    "_typecheck": set(),
    "_xla": set(),
    "ops": {"_xla"},
    "nn": {"_xla", "ops"},
    "models": {"_xla", "ops", "nn", "_types"},
    "data": {"files", "_types"},
    "train": {"_xla", "ops", "_types"},
    "evaluate": {"ops", "models", "data", "train", "files", "_types"},
    "weights": {"models", "nn", "files"},
    "zoo": {"ops", "nn", "models", "weights", "data", "train", "draw", "evaluate", "_types"},
    "export": {"_xla", "ops", "nn", "models", "weights", "files", "_types"},
    "draw": {"ops", "_types"},
    "report": {"ops", "data", "draw", "evaluate", "files"},
    "files": set(),
}
# The top-level package imports each subpackage when it is first used.
MAY_IMPORT["__init__"] = set(MAY_IMPORT)
# `ops` may import array libraries and a few modules of the standard library (see the test).
OPS_MAY_IMPORT = {"jax", "jaxtyping", "einops", "numpy", "equinox"}
BINDING_NAMES = {
    "detectax_eqx.ops": "box_area clip_boxes xyxy_to_cxcywh cxcywh_to_xyxy xyxy_to_xywh xywh_to_xyxy pairwise_iou "
    "pairwise_ioa pairwise_giou pairwise_diou pairwise_ciou encode_boxes decode_boxes anchor_grid nms class_aware_nms "
    "nms_indices roi_align multilevel_roi_align match_boxes sample_balanced crop_masks paste_masks smooth_l1_loss "
    "keypoints_from_heatmaps linear_assignment deformable_attention grid_sample point_sample sigmoid_focal_loss "
    "giou_loss diou_loss ciou_loss dice_loss RoIFeatures",
    "detectax_eqx.models": "AbstractDetector FasterRCNN MaskRCNN KeypointRCNN RetinaNet FCOS detect detect_batch "
    "trainable",
    "detectax_eqx.zoo": "names build pretrained published Predictor",
    "detectax_eqx.weights": "load_torchvision to_torchvision save_safetensors load_safetensors",
    "detectax_eqx": "Images Targets Detections Batch WeightedSum",
}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path):
    """The modules that a file imports, as absolute names."""
    package = ["detectax_eqx", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([f"{module}.{alias.name}" for alias in node.names] if not node.module else [module])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    part = _part(path)
    for module in _imports(path):
        assert not module.startswith(("experiments", "torch"))
        if module.startswith("detectax_eqx."):
            other = module.split(".")[1]
            assert other == part or other in MAY_IMPORT[part], f"{path} must not import {module}"
        elif part == "ops":
            top = module.split(".")[0]
            assert top in OPS_MAY_IMPORT or top in (
                "math",
                "collections",
                "contextlib",
                "contextvars",
                "dataclasses",
                "functools",
                "typing",
            ), module


# Private packages whose `__init__` exports names for the other packages.
IN_HOUSE = {"_xla", "_types"}


def _imported_names(path: Path):
    """`(subpackage, subpackage.module.name)` of each name that a file imports from another subpackage."""
    package = ["detectax_eqx", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "detectax_eqx" and len(parts) > 1 and parts[1] != _part(path):
                yield parts[1], ".".join(parts[1:])


def _private(package: str, name: str) -> bool:
    inner = name.split(".")[1:] if package in IN_HOUSE else name.split(".")
    return any(part.startswith("_") and not part.startswith("__") for part in inner)


def test_no_private_name_crosses_a_package():
    violations = [
        f"{path}: {name}"
        for path in FILES
        if _part(path) != "__init__"
        for package, name in _imported_names(path)
        if _private(package, name)
    ]
    assert not violations


# Remarks about the compiler belong in `_xla/`; comments elsewhere are about the mathematics.
LORE = re.compile(r"\b(XLA|caches?|threads?|ms|milliseconds?|compilers?|times as fast|[CGT]PUs?)\b", re.IGNORECASE)


def _prose(path: Path):
    """`(line, text)` of each comment and docstring in a file."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring


@pytest.mark.parametrize("package", ["ops", "nn", "models"])
def test_no_compiler_lore(package):
    violations = [
        f"{path.name}:{line}: {match.group()}"
        for path in FILES
        if _part(path) == package
        for line, text in _prose(path)
        for match in LORE.finditer(text)
    ]
    assert not violations


def test_internals_of_jax_are_used_in_one_place():
    internals = ("jax.interpreters", "jax.extend", "jax._src")
    violations = {
        str(path.relative_to(PACKAGE)): module
        for path in FILES
        if _part(path) not in ("_xla", "export")
        for module in _imports(path)
        if module.startswith(internals)
    }
    assert not violations


def test_every_trick_is_in_the_readme():
    text = (PACKAGE / "_xla" / "README.md").read_text()
    headings = set(re.findall(r"^### `(\w+)`", text, re.MULTILINE))
    assert headings == set(get_args(_plain.Trick))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_topic_a_file(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 80, node.name
    assert "from __future__ import annotations" not in lines


def _public():
    modules = [detectax_eqx] + [
        importlib.import_module(f"detectax_eqx.{info.name}")
        for info in pkgutil.iter_modules(detectax_eqx.__path__)
        if not info.name.startswith("_")
    ]
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", list(_public()))
def test_public_names_are_documented_and_typed(value):
    assert inspect.getdoc(value), "no docstring"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        untyped = [name for name, p in signature.parameters.items() if p.annotation is inspect.Parameter.empty]
        assert not untyped
        assert signature.return_annotation is not inspect.Signature.empty
        if "key" in signature.parameters:
            assert signature.parameters["key"].kind is inspect.Parameter.KEYWORD_ONLY


def test_packages_load_when_they_are_used():
    packages = sorted(path.parent.name for path in PACKAGE.glob("[!_]*/__init__.py"))
    code = "import sys, detectax_eqx as dx; print([n for n in dir(dx) if 'detectax_eqx.' + n in sys.modules]);"
    code += f"print([getattr(dx, name).__name__ for name in {packages}])"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["['_typecheck', '_types']", str([f"detectax_eqx.{name}" for name in packages])]
    with pytest.raises(AttributeError, match="module 'detectax_eqx' has no attribute 'modles'"):
        importlib.import_module("detectax_eqx").__getattr__("modles")


@pytest.mark.parametrize("module", BINDING_NAMES)
def test_promised_names_exist(module):
    missing = [name for name in BINDING_NAMES[module].split() if not hasattr(importlib.import_module(module), name)]
    assert not missing
