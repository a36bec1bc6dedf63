"""Annotations and images from a store; a local HTTP server stands in for all of them."""

import functools
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from urllib.parse import unquote

import numpy as np
import pytest
import tensorstore as ts

from detectax_eqx.data import DatasetError, Loader, _store, load_coco, make_buckets, read_image, write_shapes_dataset
from detectax_eqx.data._store import read_bytes


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.stopped, self.stumbled = threading.Event(), set()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a path with `status` returns that status, and one with `never` gets no answer."""

    def do_GET(self):
        assert isinstance(self.server, Server)
        parts = self.path.split("/")
        if "never" in parts:
            self.server.stopped.wait(30)
        elif "status" in parts:
            self.send_error(int(parts[parts.index("status") + 1]))
        elif "stumbles" in parts and self.path not in self.server.stumbled:
            self.server.stumbled.add(self.path)
            self.send_error(503)
        else:
            self.path = self.path.replace("/stumbles/", "/").replace("/bucket/", "/")
            super().do_GET()

    def end_headers(self):
        self.send_header("ETag", "one")  # as S3 does
        super().end_headers()

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    annotations, images = write_shapes_dataset(folder, num_images=5, seed=0, image_size=(64, 64))
    content = json.loads(annotations.read_text())
    (images / "a b%20ü").mkdir()
    name = content["images"][0]["file_name"]
    (images / name).rename(images / "a b%20ü" / name)
    content["images"][0]["file_name"] = f"a b%20ü/{name}"
    annotations.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Few, short retries."""
    monkeypatch.setattr(_store, "RETRIES", {"max_retries": 2, "initial_delay": "20ms", "max_delay": "40ms"})
    for cached in (_store._context, _store._open):
        cached.cache_clear()
    yield
    for cached in (_store._context, _store._open):
        cached.cache_clear()


def batches(annotations, images, **options):
    dataset = load_coco(annotations, images)
    buckets = make_buckets(dataset.sizes, canvases=[(64, 64)], min_size=64, max_size=64)
    loader = Loader(dataset, batch_size=2, buckets=buckets, max_objects=6, mask_size=7, **options)
    return [batch.images.pixels for _, batch in loader.iterate(0, 5)]


@pytest.mark.parametrize("root", ["", "/stumbles"])
def test_a_dataset_from_a_server_is_the_one_on_disk(server, url, folder, root, tmp_path, tally):
    expected = batches(folder / "annotations.json", folder / "images")
    found = batches(f"{url}{root}/annotations.json", f"{url}{root}/images")
    np.testing.assert_array_equal(found, expected)
    if root:
        tally("server that answers 503 once per file", len(server.stumbled), len(server.stumbled), "asked again")
        assert len(server.stumbled) > 5
    cached = [batches(f"{url}/annotations.json", f"{url}/images/", cache=tmp_path) for _ in range(2)]
    np.testing.assert_array_equal(cached, [expected] * 2)


def test_one_image(url, folder):
    image = f"{url}/images/000002.png"
    np.testing.assert_array_equal(read_image(image), read_image(folder / "images/000002.png"))
    with pytest.raises(DatasetError, match=rf"{image}\.png: no such image file"):
        read_image(f"{image}.png")
    with pytest.raises(DatasetError, match=rf"{url}/annotations\.json: cannot be read as an image"):
        read_image(f"{url}/annotations.json")


TROUBLE = {
    "status/403/x": r"HTTP status 403 \(Forbidden\)",
    "status/500/x": r"HTTP status 500 \(Internal Server Error\)",
    "status/503/x": r"HTTP status 503 \(Service Unavailable\)",
    "never/x": "no answer within 1 seconds",
}


@pytest.mark.parametrize("path", TROUBLE)
def test_errors_name_url_and_status(url, path, monkeypatch, tally):
    monkeypatch.setattr(_store, "TIMEOUT", 1.0)
    address = f"{url}/{path}"
    for call in (read_bytes, read_image, lambda address: load_coco(address, url)):
        with pytest.raises(ConnectionError, match=f"{address}: {TROUBLE[path]}"):
            call(address)
    tally("store that answers 403, 500, 503, or never", 3, 3, "error names URL and status")


def test_no_server(tally):
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1/x: Could not connect to server"):
        read_bytes("http://127.0.0.1:1/x")
    with pytest.raises(ConnectionError, match=r"gs://b/x: .*Invalid GCS bucket name"):
        read_bytes("gs://b/x")
    tally("no server", 2, 2, "error names URL and status")


def test_a_server_that_fails_is_no_bad_image(url, folder):
    """What a batch holds must not depend on the state of a server."""
    content = json.loads((folder / "annotations.json").read_text())
    content["images"][1]["file_name"] = "status/503/x.png"
    (folder / "other.json").write_text(json.dumps(content))
    dataset = load_coco(f"{url}/other.json", f"{url}/images", check_images=False)
    buckets = make_buckets(dataset.sizes, canvases=[(64, 64)], min_size=64, max_size=64)
    loader = Loader(dataset, batch_size=5, buckets=buckets, mask_size=None, max_bad_images=5)
    with pytest.raises(ConnectionError, match=r"images/status/503/x\.png: HTTP status 503"):
        loader.batch(0)


def test_a_few_images_are_looked_at_beforehand(url, folder):
    content = json.loads((folder / "annotations.json").read_text())
    content["images"][0]["width"] = 65
    (folder / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"image 1 \(000001\.png\).*is 64×64 pixels, but annotated as 65×64"):
        load_coco(f"{url}/wrong.json", f"{url}/images")
    with pytest.raises(DatasetError, match=r"unusable image ×5"):
        load_coco(f"{url}/annotations.json", f"{url}/elsewhere")


def test_s3_by_the_same_code(url, folder, monkeypatch):
    """A store that speaks S3 at a custom address; for reading, this server is one."""

    def open_at_server(location, context):
        bucket, _, path = location.removeprefix("s3://").partition("/")
        spec = {"driver": "s3", "bucket": bucket, "path": unquote(path), "endpoint": url, "aws_region": "us-east-1"}
        return KvStore.open(spec | {"aws_credentials": {"type": "anonymous"}}, context=context)

    KvStore = ts.KvStore
    monkeypatch.setattr(_store.ts, "KvStore", type("Opens", (), {"open": staticmethod(open_at_server)}))
    expected = batches(folder / "annotations.json", folder / "images")
    np.testing.assert_array_equal(batches("s3://bucket/annotations.json", "s3://bucket/images"), expected)
    with pytest.raises(ConnectionError, match=r"s3://bucket/status/403/x: .*403"):
        read_bytes("s3://bucket/status/403/x")


GCS = """
    import functools, http.server, sys, threading
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            bucket, name = self.path.split("?")[0].removeprefix("/storage/v1/b/").split("/o/")
            assert bucket == "some-bucket"
            self.path = f"/{name}"
            if name == "forbidden": return self.send_error(403)
            super().do_GET()
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=sys.argv[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import os
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
    from detectax_eqx.data import load_coco, read_image
    from detectax_eqx.data._store import read_bytes
    dataset = load_coco("gs://some-bucket/annotations.json", "gs://some-bucket/images")
    print(len(dataset), sum(int(read_image(image.path).sum()) for image in dataset.images))
    try:
        read_bytes("gs://some-bucket/forbidden")
    except ConnectionError as error:
        print(error)
"""


def test_gs_by_the_same_code(folder):
    """Uses tensorstore's environment variable for emulators of Google's storage, which is read once per process."""
    command = [sys.executable, "-c", textwrap.dedent(GCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    total = sum(int(read_image(path).sum()) for path in (folder / "images").rglob("*.png"))
    first, second = done.stdout.splitlines()
    assert first == f"5 {total}"
    assert "gs://some-bucket/forbidden: HTTP status 403" in second
