"""Files from elsewhere: downloaded once, resumed, checked, and whole or not there."""

import fcntl
import hashlib
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


# A server that stumbles is asked again after these waits, in seconds.
WAITS = (0.5, 2.0, 5.0)
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 2**20
# HTTP statuses after which asking again may help (RFC 9110, RFC 6585).
PASSING = (408, 425, 429, 500, 502, 503, 504)


def home() -> Path:
    """The cache folder: `DETECTAX_HOME`, or `detectax_eqx` in `XDG_CACHE_HOME`, or `~/.cache/detectax_eqx`."""
    if chosen := os.environ.get("DETECTAX_HOME"):
        return Path(chosen).expanduser()
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "detectax_eqx"


def download(url: str, *, sha256: str) -> Path:
    """The path of a file in `home() / "weights"`, which is downloaded if it is not there.

    What is downloaded, or was put there by hand, is used only if its checksum begins with `sha256`. The file is written
    under another name and moved when it is whole. A download that was cut off goes on where it ended, also after the
    process was killed. Of several processes that want the file, one downloads it and the others wait.

    Raises a `ConnectionError` that names the URLs that were tried and the place to put the file, an `OSError` if it
    cannot be written, and a `ValueError` if a file that is there has another checksum.
    """
    name = url.rpartition("/")[2]
    path = home() / "weights" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{name}.lock")):
            if not path.exists():
                part = path.with_name(f".{name}.part")
                _fetch(_sources(url), part, sha256=sha256, path=path)
                part.replace(path)
            elif not (found := _checksum(path)).startswith(sha256):
                raise ValueError(
                    f"{path} is damaged or another file: its SHA-256 is {found[: len(sha256)]}…, not "
                    f"{sha256}…. Delete it, and it is downloaded again from {url}."
                )
    except OSError as error:
        if error.filename is None:  # of the network
            raise
        remedy = f"{error.strerror}. Make room for {name}, or choose another folder by DETECTAX_HOME"
        raise OSError(error.errno, remedy, str(error.filename)) from None
    return path


def _sources(url: str) -> list[str]:
    """The file's URL on each of the mirrors, and its own."""
    name = url.rpartition("/")[2]
    return [f"{mirror.rstrip('/')}/{name}" for mirror in os.environ.get("DETECTAX_MIRRORS", "").split()] + [url]


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """One process at a time; the operating system takes the lock back however a process ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(sources: list[str], part: Path, *, sha256: str, path: Path) -> None:
    """Downloads to `part` from the first source that has the right file."""
    problems = []
    for source in sources:
        problem = _try(source, part)
        if problem is None:
            found = _checksum(part)
            if found.startswith(sha256):
                return
            part.unlink()
            problem = f"it sent another file, of SHA-256 {found[: len(sha256)]}… instead of {sha256}…"
        problems.append(f"{source}: {problem}")
    raise ConnectionError(
        f"{path.name} cannot be downloaded. {'; '.join(problems)}. Try again, set DETECTAX_MIRRORS to a folder's URL "
        f"that has it, or fetch it by other means and put it at {path}."
    )


def _try(source: str, part: Path) -> str | None:
    """Downloads from one source, going on after interruptions. Returns what went wrong in the end, or `None`."""
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
            if error.code == 416:  # what is there is all there is, or more
                if before and _size_of(source) == before:
                    return None
                part.unlink(missing_ok=True)
            elif error.code not in PASSING:
                return problem
        except (HTTPException, OSError) as error:
            if getattr(error, "filename", None) is not None:  # of our own disk
                raise
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
    return problem


def _receive(source: str, part: Path, before: int) -> None:
    """Appends the rest of the file to `part`, or all of it where the server knows no ranges."""
    headers = {"User-Agent": "detectax_eqx"} | ({"Range": f"bytes={before}-"} if before else {})
    with urlopen(Request(source, headers=headers), timeout=TIMEOUT) as response:
        if before and response.status != 206:
            before = 0
        rest = response.headers.get("Content-Length")
        total = None if rest is None else before + int(rest)
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
    """Errors of writing do not say which file: here they do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _size_of(source: str) -> int | None:
    with urlopen(Request(source, method="HEAD", headers={"User-Agent": "detectax_eqx"}), timeout=TIMEOUT) as response:
        size = response.headers.get("Content-Length")
        return None if size is None else int(size)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
