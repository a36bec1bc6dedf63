"""Arrays by name from what loaders accept: a file or a mapping."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._pth import read_pth
from ._safetensors import read_safetensors


def arrays_by_name(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a `.safetensors` file, of any other file as `read_pth` reads it, or of a mapping."""
    if not isinstance(source, str | os.PathLike):
        return dict(source)
    return read_safetensors(source)[0] if Path(source).suffix == ".safetensors" else read_pth(source)
