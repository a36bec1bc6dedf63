"""Writes files atomically: they appear complete or not at all."""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike) -> Generator[Path, None, None]:
    """Yields a temporary path to write to, which is synced to disk and replaces `path` at the end of the `with` block.

    If the block raises or the process is killed, `path` is unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/numbers.txt") as temporary:
    ...         _ = temporary.write_text("1 2 3")
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('numbers.txt', '1 2 3')]
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically. Values that JSON cannot represent, such as paths, are written as strings.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/options.json", {"output": Path("runs/mine")})
    ...     print(Path(f"{folder}/options.json").read_text())
    {
     "output": "runs/mine"
    }
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, default=str, indent=1), encoding="utf-8")
