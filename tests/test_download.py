"""Published weights are downloaded once, completely, and verified, despite faults of server, disk or processes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import equinox as eqx
import numpy as np
import pytest

from detectax_eqx import weights, zoo
from detectax_eqx.zoo import _download, _published_rows

from . import tiny_train
from .tiny_detector import random_arrays


CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
NAME = f"weights-{SHA[:8]}.pth"


class Server(ThreadingHTTPServer):
    """Serves one file after a list of faults, one per request: a status, or a number of bytes after which it stops."""

    def __init__(self, content=CONTENT, *, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.faults, self.requests = content, ranges, [], []
        self.pause = 0.0
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, str):
            self.send_error(int(fault))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body if fault is None else body[:fault]
        for i in range(0, len(body), 30_000):
            self.wfile.write(body[i : i + 30_000])
            self.wfile.flush()
            time.sleep(server.pause)
        if fault is not None:
            self.connection.close()


@pytest.fixture
def server():
    with Server() as one:
        yield one
        one.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTAX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DETECTAX_MIRRORS", raising=False)
    monkeypatch.setattr(_download, "WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "home" / "weights"


def fetch(url):
    return _download.download(url, sha256=SHA[:8])


def check_whole(home, path):
    """Checks that the folder has the complete file and its lock, and nothing else."""
    assert path == home / NAME and path.read_bytes() == CONTENT
    assert {p.name for p in home.iterdir()} == {NAME, f".{NAME}.lock"}


STUMBLES = [
    *([status] for status in ("408", "425", "429", "500", "502", "503", "504")),
    ["503", "500", "429"],
    *([length] for length in (0, 1, 29_999, 30_000, 150_000, 299_999)),
    [100_000, 100_000, 50_000],
    [10, "503", 200_000],
]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("faults", STUMBLES, ids=str)
def test_a_server_that_stumbles_is_asked_again(faults, ranges, server, home, tally):
    server.faults, server.ranges = list(faults), ranges
    check_whole(home, fetch(server.url))
    assert len(server.requests) == len(faults) + 1
    if ranges and all(isinstance(fault, int) and fault for fault in faults):
        assert server.requests[1] == f"bytes={faults[0]}-"  # bytes already received are not requested again
    tally("download: status 4xx or 5xx, or cut off", 1, 1, "goes on where it ended, and is whole")


def test_a_name_of_its_own_and_another_checksum(server, home):
    """RF-DETR's files have equal names on the server, and MD5 checksums."""
    md5, other = hashlib.md5(CONTENT).hexdigest(), "0" * 32
    path = _download.download(server.url, file="nano.pth", md5=md5)
    assert path == home / "nano.pth" and path.read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=rf"small.pth cannot .* with MD5 {md5}… instead of {other}"):
        _download.download(server.url, file="small.pth", md5=other)
    assert {p.name for p in home.iterdir()} == {"nano.pth", ".nano.pth.lock", ".small.pth.lock"}
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"nano.pth is damaged or another file: its MD5 is "):
        _download.download(server.url, file="nano.pth", md5=md5)


def test_it_is_downloaded_once(server, home):
    for _ in range(3):
        check_whole(home, fetch(server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_refusal_names_file_place_and_remedy(status, server, home, tally):
    server.faults = [status] * 9
    with pytest.raises(ConnectionError) as error:
        fetch(server.url)
    text = str(error.value)
    assert all(words in text for words in (server.url, f"HTTP status {status}", f"put it at {home / NAME}"))
    assert len(server.requests) == 1 and not (home / NAME).exists()
    tally("download: refused, or no server", 1, 1, "error names URL, reason, and where to put the file")


def test_no_server(home, tally):
    with pytest.raises(ConnectionError, match=r"Connection refused.*DETECTAX_MIRRORS.*put it at"):
        fetch(f"http://127.0.0.1:9/{NAME}")
    assert not (home / NAME).exists()
    tally("download: refused, or no server", 1, 1, "error names URL, reason, and where to put the file")


@pytest.mark.parametrize("change", ["byte", "longer", "shorter", "page"])
def test_another_file_is_never_used(change, home, tally):
    content = {
        "byte": CONTENT[:1000] + bytes([CONTENT[1000] ^ 1]) + CONTENT[1001:],
        "longer": CONTENT + b"0",
        "shorter": CONTENT[:-1],
        "page": b"<html>Please log in.</html>",
    }[change]
    with Server(content) as liar:
        with pytest.raises(
            ConnectionError, match=rf"it sent another file, with SHA-256 [0-9a-f]{{8}}… instead of {SHA[:8]}…"
        ):
            fetch(liar.url)
        liar.shutdown()
    assert {path.name for path in home.iterdir()} == {f".{NAME}.lock"}
    tally("download: another file", 1, 1, "refused by its checksum, and removed")


def test_mirrors_come_first_and_a_bad_one_is_passed_over(server, home, monkeypatch, tally):
    with Server(b"something else") as liar:
        monkeypatch.setenv("DETECTAX_MIRRORS", f"http://127.0.0.1:9/ {liar.url.rpartition('/')[0]}/")
        check_whole(home, fetch(server.url))
        liar.shutdown()
        assert len(liar.requests) == 1 == len(server.requests)
    tally("download: another file", 1, 1, "refused by its checksum, and removed")


def test_a_part_of_before_is_gone_on_with(server, home, tally):
    """Partial files are used where possible, also if they are complete, too long, or of another file."""
    for before, asked in (
        (CONTENT[:1234], ["bytes=1234-"]),
        (CONTENT, [f"bytes={len(CONTENT)}-"]),
        (CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
    ):
        home.mkdir(parents=True, exist_ok=True)
        (home / NAME).unlink(missing_ok=True)
        (home / f".{NAME}.part").write_bytes(before)
        server.requests.clear()
        check_whole(home, fetch(server.url))
        assert server.requests == asked
        tally("download: a part was there", 1, 1, "goes on where it ended, and is whole")
    (home / NAME).unlink()
    (home / f".{NAME}.part").write_bytes(b"x" * 1000)
    with pytest.raises(ConnectionError, match="it sent another file"):
        fetch(server.url)
    check_whole(home, fetch(server.url))  # the partial file of other content has been removed
    tally("download: a part was there", 1, 1, "goes on where it ended, and is whole")


def test_a_file_put_there_by_hand(home, tally):
    home.mkdir(parents=True)
    (home / NAME).write_bytes(CONTENT)
    check_whole(home, fetch("http://127.0.0.1:9/" + NAME))  # no request is sent
    (home / NAME).write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"damaged or another file: its SHA-256 .* Delete it"):
        fetch("http://127.0.0.1:9/" + NAME)
    assert (home / NAME).exists()
    tally("download: another file", 1, 1, "refused by its checksum, and removed")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk(after, server, home, monkeypatch, tally):
    """The bytes already written stay as a partial file, which is completed once there is space."""
    real, count = os.fsync, iter(range(100))

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, chunk):
            if next(count) >= after:
                raise OSError(28, "No space left on device")
            return self.file.write(chunk)

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = Path.open
    monkeypatch.setattr(_download, "CHUNK", 50_000)
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **o: (
            Full(opened(self, mode, *a, **o))
            if self.suffix == ".part" and mode in ("wb", "ab")
            else opened(self, mode, *a, **o)
        ),
    )
    with pytest.raises(OSError, match=r"No space left on device\. Free disk space for .*DETECTAX_HOME.*\.part"):
        fetch(server.url)
    assert not (home / NAME).exists() and real is os.fsync
    monkeypatch.setattr(Path, "open", opened)
    check_whole(home, fetch(server.url))
    tally("download: full disk", 1, 1, "error names file and remedy; later it goes on")


def test_a_folder_that_cannot_be_written(server, home, monkeypatch, tally):
    home.parent.mkdir()
    home.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="DETECTAX_HOME"):
        fetch(server.url)
    tally("download: full disk", 1, 1, "error names file and remedy; later it goes on")


CODE = """
import sys
from detectax_eqx.zoo import _download
_download.CHUNK = 10_000
print(_download.download(sys.argv[1], sha256=sys.argv[2]))
"""


def start(url):
    return subprocess.Popen([sys.executable, "-c", CODE, url, SHA[:8]], stdout=subprocess.PIPE, text=True)


def test_two_processes_download_once(server, home, tally):
    server.pause = 0.05
    processes = [start(server.url) for _ in range(2)]
    for process in processes:
        assert process.communicate()[0].strip() == str(home / NAME) and process.returncode == 0
    check_whole(home, home / NAME)
    assert server.requests == [None]
    tally("download: two processes", 1, 1, "one downloads, the other waits")


def test_killed_midway(server, home, tally):
    server.pause = 0.2
    process = start(server.url)
    part = home / f".{NAME}.part"
    while not (part.exists() and part.stat().st_size > 20_000):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (home / NAME).exists() and part.stat().st_size < len(CONTENT)
    server.pause = 0.0
    check_whole(home, fetch(server.url))
    assert server.requests[-1] and server.requests[-1].startswith("bytes=")
    tally("download: killed midway", 1, 1, "goes on where it ended, and is whole")


def test_weights_by_name(home, monkeypatch, tmp_path):
    """From a server to a predictor. The table of published weights supplies norm, classes and categories."""
    name = "fcos_resnet50_fpn"
    tiny_train.shrink(monkeypatch)
    model = random_arrays(eqx.filter_eval_shape(tiny_train.build, name, 91, ""))
    weights.save_safetensors(weights.to_torchvision(model), tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    sha = hashlib.sha256(content).hexdigest()[:8]
    with Server(content) as server:
        url = f"{server.url.rpartition('/')[0]}/fcos-{sha}.safetensors"
        row = replace(zoo.published(name), url=url, file=url.rpartition("/")[2], sha256=sha)
        monkeypatch.setitem(_published_rows.PUBLISHED, name, row)
        predictor = zoo.Predictor.pretrained(name)
        server.shutdown()
    assert eqx.tree_equal(predictor.model, model)
    assert predictor.class_names[:3] == ("N/A", "person", "bicycle") and predictor.category_ids()[90] == 90
    file = home / f"fcos-{sha}.safetensors"
    by_file = zoo.Predictor.from_weights(name, file)
    assert by_file.categories == predictor.categories and by_file.architecture == row.architecture
    with pytest.raises(
        ValueError, match=r"no published weights for 'resnet50'; choose one of faster_rcnn_resnet50_fpn"
    ):
        zoo.published("resnet50")


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTAX_HOME", "~/models")
    assert _download.cache_folder() == Path.home() / "models"
    monkeypatch.delenv("DETECTAX_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _download.cache_folder() == tmp_path / "detectax_eqx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _download.cache_folder() == Path.home() / ".cache" / "detectax_eqx"
