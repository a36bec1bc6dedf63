"""The documentation: every public name is on one page, the README is short, and linked files exist."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE, DOCS = ROOT / "detectax_eqx", ROOT / "docs"
API = {path.stem: path for path in sorted((DOCS / "api").glob("*.md"))}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LONGEST_README = 180


def public_names(init: Path) -> set[str]:
    """The names that a package's `__init__.py` re-exports."""
    imports = [node for node in ast.parse(init.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def packages() -> dict[str, set[str]]:
    """The public names of each public package, keyed by its dotted name. The top level is included."""
    names = {"detectax_eqx": public_names(PACKAGE / "__init__.py")}
    for init in sorted(PACKAGE.glob("[!_]*/__init__.py")):
        names[f"detectax_eqx.{init.parent.name}"] = public_names(init)
    return names


def documented(page: Path) -> list[str]:
    """The dotted names that an API page documents."""
    return re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of the links and images in a Markdown text. Code is ignored."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_every_public_name_stands_on_one_api_page_once():
    public = {f"{package}.{name}" for package, names in packages().items() for name in names}
    counts = Counter(name for page in API.values() for name in documented(page))
    assert not public - set(counts), "public, but on no page of docs/api"
    assert not set(counts) - public, "on a page of docs/api, but not public"
    assert not [name for name, count in counts.items() if count > 1], "documented more than once"


@pytest.mark.parametrize("package", packages())
def test_a_package_has_a_page_of_its_own(package):
    page = API["index" if package == "detectax_eqx" else package.removeprefix("detectax_eqx.")]
    assert {name.rpartition(".")[0] for name in documented(page)} == {package}


def test_the_navigation_lists_every_page():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    by_folder = ("benchmarks", "notes")  # which docs/site_pages.py adds
    there = {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parts[len(DOCS.parts)] not in by_folder
    }
    assert listed == there


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= LONGEST_README
    assert "make demo" in text and "make test" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link in links(page.read_text()):
        path = link.partition("#")[0]
        if path and not re.match(r"[a-z]+:", link):
            target = (page.parent / path).resolve()
            assert target.exists(), f"{link} leads nowhere"
            assert target.is_relative_to(ROOT), f"{link} leaves the project"


def test_links_are_found():
    text = "[a](b.md) ![c](d/e.jpg#f) `[not](this)`\n```\n[nor](that)\n```\n"
    assert links(text) == ["b.md", "d/e.jpg#f"]
