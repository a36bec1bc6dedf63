"""Files wherever they lie: on disk, or in a store of http, Google or Amazon, by their URLs."""

import re
from functools import cache, lru_cache
from http.client import responses
from pathlib import Path
from urllib.parse import quote, unquote

import tensorstore as ts


# A string is a URL.
Location = Path | str

SCHEMES = ("http://", "https://", "gs://", "s3://")
# A server that stumbles gets some five seconds; with tensorstore's own 32 retries it would be a quarter of an hour.
RETRIES = {"max_retries": 4, "initial_delay": "300ms", "max_delay": "3s"}
TIMEOUT = 120.0  # seconds for a file


def to_location(path: str | Path) -> Location:
    """A path, or the URL as it is.

    >>> to_location("http://host/images/"), str(to_location("images/"))
    ('http://host/images/', 'images')
    """
    return path if isinstance(path, str) and path.startswith(SCHEMES) else Path(path)


def join(folder: Location, name: str) -> Location:
    """Where a file of a folder lies.

    >>> join("http://host/images", "a b.jpg")
    'http://host/images/a%20b.jpg'
    """
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{quote(name)}"


def read_bytes(location: Location) -> bytes:
    """The content of a file.

    Raises a `FileNotFoundError` if there is none, and a `ConnectionError` with URL and status if a store does not give
    it, after some retries where these may help.
    """
    if isinstance(location, Path):
        return location.read_bytes()
    folder, name = location.rsplit("/", 1)
    try:
        found = _open(f"{folder}/").read(unquote(name)).result(timeout=TIMEOUT)
    except TimeoutError:
        raise ConnectionError(f"{location}: no answer within {TIMEOUT:.0f} seconds.") from None
    except ValueError as error:
        raise ConnectionError(f"{location}: {_reason(str(error))}.") from error
    if found.state == "missing":
        raise FileNotFoundError(f"{location}: the store has no such file.")
    return found.value


@lru_cache(maxsize=64)
def _open(folder: str) -> ts.KvStore:
    return ts.KvStore.open(folder, context=_context()).result()


@cache
def _context() -> ts.Context:
    """One for all, whose connections are used again."""
    return ts.Context({f"{kind}_request_retries": RETRIES for kind in ("http", "gcs", "s3")})


def _reason(message: str) -> str:
    """What went wrong, out of tensorstore's message."""
    if code := re.search(r"\[(?:HTTP code |http_response_code=')(\d+)", message):
        return f"HTTP status {code[1]} ({responses.get(int(code[1]), 'unknown')})"
    if trouble := re.search(r"CURL error ([^:]+)", message):
        return trouble[1]
    return message.splitlines()[0][:300]
