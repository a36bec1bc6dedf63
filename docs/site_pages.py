"""A MkDocs hook that adds pages from outside docs/ and rewrites links to them.

Markdown files link to files of the repository, so that the links work when it is browsed. On the site, a link to a
notebook, to BENCHMARKS.md or to CONTRIBUTING.md leads to its page; a link to a file without a page becomes plain text.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parent.parent
# Files of the repository and their pages on the site; notebooks are added separately.
PAGES = {"BENCHMARKS.md": "benchmarks/index.md", "CONTRIBUTING.md": "contributing.md"}
# Files that link to an existing page.
ALIASES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CITATION.cff": "citation.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def notebooks() -> dict[str, str]:
    """Maps notebooks to their pages on the site."""
    return {f"notebooks/{path.name}": f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def title(notebook: str) -> str:
    """Returns the heading of a notebook."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "markdown")
    return "".join(first["source"]).splitlines()[0].removeprefix("# ")


def on_config(config: Any) -> Any:
    """Adds notebooks, benchmarks and notes to the navigation."""
    api = next(i for i, entry in enumerate(config.nav) if "API" in entry)
    config.nav.insert(api, {"Notebooks": [{title(path): path} for path in notebooks().values()]})
    after = []
    benchmarks = sorted(f"benchmarks/{path.name}" for path in (ROOT / "docs" / "benchmarks").glob("*.md"))
    if (ROOT / "BENCHMARKS.md").exists():
        after.append({"Benchmarks": ["benchmarks/index.md", *(p for p in benchmarks if p != "benchmarks/index.md")]})
    notes = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "notes").rglob("*.md"))
    if notes:
        after.append({"Notes": notes})
    config.nav[api + 2 : api + 2] = [*after, {"Contributing": "contributing.md"}]
    return config


@event_priority(100)  # before the notebook plugin
def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for source, target in PAGES.items():
        if (ROOT / source).exists() and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in notebooks():
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites links to repository files as links to pages of the site."""
    here = page.file.src_uri
    if here.startswith("notebooks/"):
        return markdown
    source = {target: path for path, target in PAGES.items()}.get(here, f"docs/{here}")

    def replaced(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        path, hash, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page_of = {**PAGES, **ALIASES, **notebooks()}.get(target)
        if page_of is None and target.startswith("docs/"):
            page_of = target.removeprefix("docs/")
            if (ROOT / target).is_dir():
                page_of = f"{page_of}/index.md"
        if page_of is None or (files.get_file_from_path(page_of) is None and (ROOT / target).exists()):
            return text
        return f"{mark}[{text}]({posixpath.relpath(page_of, posixpath.dirname(here) or '.')}{hash}{anchor})"

    return LINK.sub(replaced, markdown)
