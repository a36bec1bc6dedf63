"""Downloads files to a cache, with resumption, checksums and atomic writes."""

import fcntl
import hashlib
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


# The waits before retries, in seconds.
WAITS = (0.5, 2.0, 5.0)
TIMEOUT = 30.0  # seconds without a response
CHUNK = 2**20
# HTTP statuses after which a retry may succeed (RFC 9110, RFC 6585).
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)


def cache_folder() -> Path:
    """The cache folder: `DETECTAX_HOME`, or `detectax_eqx` in `XDG_CACHE_HOME`, or `~/.cache/detectax_eqx`."""
    if chosen := os.environ.get("DETECTAX_HOME"):
        return Path(chosen).expanduser()
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "detectax_eqx"


class _Checksum(NamedTuple):
    """The beginning of a checksum, in hexadecimal digits."""

    algorithm: str
    expected: str

    def of(self, path: Path) -> str | None:
        """As much of a file's checksum as is expected, or `None` if it is right."""
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, self.algorithm).hexdigest()[: len(self.expected)]
        return None if actual == self.expected else actual

    def __str__(self) -> str:
        return {"sha256": "SHA-256", "md5": "MD5"}[self.algorithm]


def download(url: str, *, file: str | None = None, sha256: str = "", md5: str = "") -> Path:
    """Downloads a file to `cache_folder() / "weights"`, unless it is already there, and returns its path.

    - `file`: its name there and on mirrors; default that of the URL.

    A file, whether downloaded or put there by hand, is used only if its checksum begins with `sha256`, or with `md5` if
    that is given. It is written under a temporary name and renamed when complete. An interrupted download is resumed,
    even after the process was killed. If several processes need the file, one downloads it and the others wait.

    Raises a `ConnectionError` that names the URLs that were tried and where to put the file, an `OSError` if the file
    cannot be written, and a `ValueError` if an existing file has another checksum.
    """
    name = url.rpartition("/")[2] if file is None else file
    checksum = _Checksum("md5", md5) if md5 else _Checksum("sha256", sha256)
    path = cache_folder() / "weights" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{name}.lock")):
            if not path.exists():
                part = path.with_name(f".{name}.part")
                _fetch(_sources(url, name), part, checksum, path=path)
                part.replace(path)
            elif actual := checksum.of(path):
                raise ValueError(
                    f"{path} is damaged or another file: its {checksum} is {actual}…, not {checksum.expected}…. "
                    f"Delete it to download it again from {url}."
                )
    except OSError as error:
        if error.filename is None:  # an error of the network
            raise
        remedy = f"{error.strerror}. Free disk space for {name}, or set DETECTAX_HOME to another folder"
        raise OSError(error.errno, remedy, str(error.filename)) from None
    return path


def _sources(url: str, name: str) -> list[str]:
    """The URLs to try: the file on each mirror, then its original URL."""
    return [f"{mirror.rstrip('/')}/{name}" for mirror in os.environ.get("DETECTAX_MIRRORS", "").split()] + [url]


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """Holds a file lock, which the operating system releases when the process ends, even if killed."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(sources: list[str], part: Path, checksum: _Checksum, *, path: Path) -> None:
    """Downloads to `part` from the first source with the right file."""
    problems = []
    for source in sources:
        problem = _try(source, part)
        if problem is None:
            actual = checksum.of(part)
            if actual is None:
                return
            part.unlink()
            problem = f"it sent another file, with {checksum} {actual}… instead of {checksum.expected}…"
        problems.append(f"{source}: {problem}")
    raise ConnectionError(
        f"{path.name} cannot be downloaded. {'; '.join(problems)}. Try again, set DETECTAX_MIRRORS to the URL of a "
        f"folder that has it, or download it by other means and put it at {path}."
    )


def _try(source: str, part: Path) -> str | None:
    """Downloads from one source, with retries. Returns `None`, or the problem if it failed."""
    problem = ""
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(source, part, before)
            return None
        except HTTPError as error:
            error.close()
            problem = f"HTTP status {error.code} ({error.reason})"
            if error.code == 416:  # range not satisfiable: the part is complete or too long
                if before and _size_of(source) == before:
                    return None
                part.unlink(missing_ok=True)
            elif error.code not in TRANSIENT_STATUSES:
                return problem
        except (HTTPException, OSError) as error:
            if getattr(error, "filename", None) is not None:  # an error of the local disk
                raise
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
    return problem


def _receive(source: str, part: Path, before: int) -> None:
    """Appends the rest of the file to `part`, or rewrites `part` if the server does not support ranges."""
    headers = {"User-Agent": "detectax_eqx"} | ({"Range": f"bytes={before}-"} if before else {})
    with urlopen(Request(source, headers=headers), timeout=TIMEOUT) as response:
        if before and response.status != 206:
            before = 0
        remaining = response.headers.get("Content-Length")
        total = None if remaining is None else before + int(remaining)
        with part.open("ab" if before else "wb") as file, _progress() as bar:
            task = bar.add_task(part.name.removeprefix(".").removesuffix(".part"), total=total, completed=before)
            while chunk := response.read(CHUNK):
                with _names(part):
                    file.write(chunk)
                bar.advance(task, len(chunk))
            with _names(part):
                file.flush()
                os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


@contextmanager
def _names(path: Path) -> Generator[None, None, None]:
    """Adds the file name to write errors, which do not have one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _size_of(source: str) -> int | None:
    with urlopen(Request(source, method="HEAD", headers={"User-Agent": "detectax_eqx"}), timeout=TIMEOUT) as response:
        size = response.headers.get("Content-Length")
        return None if size is None else int(size)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
