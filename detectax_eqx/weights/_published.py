"""URLs of torchvision's published weights, for the error message about a missing file."""

import os
import re
from pathlib import Path


_URL = "https://download.pytorch.org/models/"
_PUBLISHED = re.compile(r"[a-z0-9_]+-[0-9a-f]{8}\.pth")  # ends with the start of a checksum


def check_exists(path: str | os.PathLike) -> Path:
    """Returns the path of an existing file.

    Raises a `FileNotFoundError` if there is none, with a URL if the name looks like that of a torchvision checkpoint.
    """
    path = Path(path)
    if path.exists():
        return path
    hint = f" torchvision's file of that name is at {_URL}{path.name}" if _PUBLISHED.fullmatch(path.name) else ""
    raise FileNotFoundError(f"There is no file {path}.{hint}")
