"""Reads files from disk, or from an http(s), Google Cloud Storage or Amazon S3 URL."""

import re
from functools import cache, lru_cache
from http.client import responses
from pathlib import Path
from urllib.parse import quote, unquote

import tensorstore as ts


# A `Path` on disk, or a URL as a string.
Location = Path | str

SCHEMES = ("http://", "https://", "gs://", "s3://")
# Failed requests are retried for about five seconds. With tensorstore's default of 32 retries, it would be a quarter of
# an hour.
RETRIES = {"max_retries": 4, "initial_delay": "300ms", "max_delay": "3s"}
TIMEOUT = 120.0  # seconds per file


def to_location(path: str | Path) -> Location:
    """Converts a path to a `Path`. URLs are returned unchanged.

    >>> to_location("http://host/images/"), str(to_location("images/"))
    ('http://host/images/', 'images')
    """
    return path if isinstance(path, str) and path.startswith(SCHEMES) else Path(path)


def join(folder: Location, name: str) -> Location:
    """Returns the location of a file in a folder.

    >>> join("http://host/images", "a b.jpg")
    'http://host/images/a%20b.jpg'
    """
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{quote(name)}"


def read_bytes(location: Location) -> bytes:
    """Reads the content of a file.

    Raises a `FileNotFoundError` if the file does not exist, and a `ConnectionError` with the URL and status if a server
    does not return it, after retrying if the error may be transient.
    """
    if isinstance(location, Path):
        return location.read_bytes()
    folder, name = location.rsplit("/", 1)
    try:
        result = _open(f"{folder}/").read(unquote(name)).result(timeout=TIMEOUT)
    except TimeoutError:
        raise ConnectionError(f"{location}: no answer within {TIMEOUT:.0f} seconds.") from None
    except ValueError as error:
        raise ConnectionError(f"{location}: {_reason(str(error))}.") from error
    if result.state == "missing":
        raise FileNotFoundError(f"{location}: the store has no such file.")
    return result.value


@lru_cache(maxsize=64)
def _open(folder: str) -> ts.KvStore:
    return ts.KvStore.open(folder, context=_context()).result()


@cache
def _context() -> ts.Context:
    """One context for all requests, so that connections are reused."""
    return ts.Context({f"{kind}_request_retries": RETRIES for kind in ("http", "gcs", "s3")})


def _reason(message: str) -> str:
    """Extracts the cause from an error message of tensorstore."""
    if code := re.search(r"\[(?:HTTP code |http_response_code=')(\d+)", message):
        return f"HTTP status {code[1]} ({responses.get(int(code[1]), 'unknown')})"
    if trouble := re.search(r"CURL error ([^:]+)", message):
        return trouble[1]
    return message.splitlines()[0][:300]
