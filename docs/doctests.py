"""An extension for griffe, which reads the package for the API pages.

Examples in docstrings become code blocks, annotations are shown as written, the comment above a constant becomes its
docstring, and `A, B = 1, 2` defines both names.
"""

import ast
import re
import textwrap
from typing import Any

import griffe


# Array types of jaxtyping.
ARRAY = re.compile(r"(Float|Int|UInt|Bool|Real|Shaped|Num|Inexact|Key)\d*$")


class Axes:
    """The axes string of an array annotation. griffe would parse a plain string as an expression."""

    def __init__(self, names: str):
        self.names = names

    def __repr__(self) -> str:
        return f'"{self.names}"'


def fence(text: str) -> str:
    """Turns each doctest, from `>>>` to a blank line, into a Markdown code block.

    >>> fence("Adds.\\n\\n>>> 1 + 1\\n2")
    'Adds.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    blocks = textwrap.dedent(text).strip("\n").split("\n\n")
    return "\n\n".join(f"```pycon\n{block}\n```" if block.startswith(">>> ") else block for block in blocks)


def describe(attribute: griffe.Attribute) -> None:
    """Uses the comment above a constant, if there is one, as its docstring."""
    lines, first = attribute.lines_collection[attribute.filepath], (attribute.lineno or 1) - 1
    start = first
    while start > 0 and lines[start - 1].startswith("# "):
        start -= 1
    if start < first:
        text = " ".join(line.removeprefix("# ") for line in lines[start:first])
        attribute.docstring = griffe.Docstring(text, parent=attribute)


class Doctests(griffe.Extension):
    """Rewrites docstrings, and shows signatures as in the source: `" n"` names axes and is not an expression."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turns the examples of a docstring into code blocks."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)

    def on_function_node(self, *, node: Any, **_: Any) -> None:
        """Protects the axes of arrays, so that griffe does not parse them as forward references."""
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for annotation in (node.returns, *(argument.annotation for argument in arguments)):
                self._protect(annotation)

    def on_attribute_node(self, *, node: Any, **_: Any) -> None:
        """Protects the axes in the fields of a class."""
        if isinstance(node, ast.AnnAssign):
            self._protect(node.annotation)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Uses the comment above a constant as its docstring."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_module and attr.lineno:
            describe(attr)

    def on_module_members(self, *, node: Any, mod: griffe.Module, **_: Any) -> None:
        """Adds constants that are assigned several at once."""
        for statement in node.body if isinstance(node, ast.Module) else ():
            if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Tuple)):
                continue
            target = statement.targets[0]
            for name, value in (
                zip(target.elts, statement.value.elts, strict=False) if isinstance(target, ast.Tuple) else ()
            ):
                if isinstance(name, ast.Name):
                    attribute = griffe.Attribute(name.id, value=ast.unparse(value), lineno=statement.lineno)
                    mod.set_member(name.id, attribute)
                    describe(attribute)

    def _protect(self, annotation: ast.expr | None) -> None:
        for part in ast.walk(annotation) if annotation is not None else ():
            is_array = (
                isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and ARRAY.match(part.value.id)
            )
            if is_array and isinstance(part.slice, ast.Tuple):
                for element in part.slice.elts:
                    if isinstance(element, ast.Constant) and isinstance(element.value, str):
                        element.value = Axes(element.value)
