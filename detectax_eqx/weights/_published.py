"""Where torchvision's published weights are, for whoever names such a file without having it."""

import os
import re
from pathlib import Path


_URL = "https://download.pytorch.org/models/"
_PUBLISHED = re.compile(r"[a-z0-9_]+-[0-9a-f]{8}\.pth")  # torchvision's names end in the start of a checksum


def check_exists(path: str | os.PathLike) -> Path:
    """The path, if it is there. Otherwise raises a `FileNotFoundError`, with a URL for a name of torchvision's kind."""
    path = Path(path)
    if path.exists():
        return path
    hint = f" torchvision's file of that name is at {_URL}{path.name}" if _PUBLISHED.fullmatch(path.name) else ""
    raise FileNotFoundError(f"There is no file {path}.{hint}")
