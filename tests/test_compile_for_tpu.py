"""The table of TPU programs: its figures, the rows that stay, and failures."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from . import tiny_train


sys.path.append(str(Path(__file__).parents[1] / "experiments"))
script = importlib.import_module("compile_for_tpu")
tables = importlib.import_module("_benchmark.tables")

FAKE = {"topologies": ("v3:2x2x1",), "models": ("mask_rcnn_resnet50_fpn",), "canvases": ((64, 96),)}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "docs" / "benchmarks"
    path.mkdir(parents=True)
    (path / "tpu.md").write_text("Before.\n<!-- tpu -->\n<!-- /tpu -->\nAfter.\n")
    return path


def table(folder):
    """Header and rows of the rendered page."""
    return tables.read_table(folder / "tpu.md", "tpu")


@pytest.fixture
def cpu(monkeypatch):
    """Replaces TPUs by CPUs, and the programs of a detector by a matrix product."""
    program = jax.jit(lambda x: x @ x).lower(jnp.ones((512, 512)))
    monkeypatch.setattr(
        script.topologies, "get_topology_desc", lambda name, platform: SimpleNamespace(devices=jax.devices()[:8])
    )
    monkeypatch.setattr(script, "version", lambda package: "1.2")
    monkeypatch.setattr(script, "commit", lambda: "abc")
    monkeypatch.setattr(script, "lower_step", lambda *_: program)
    monkeypatch.setattr(script, "lower_detection", lambda *_: program)


@pytest.mark.usefixtures("cpu")
def test_rows_are_measured_and_others_stay(folder):
    other = ("v5e:2x4", "x", "y", "1.00 of 16 GiB", "1", "older")
    columns = (*tables.TABLES["tpu"].keys, *tables.TABLES["tpu"].columns)
    tables.Measurements(folder).add("tpu", dict(zip(columns, other, strict=True)), None, keys=[other[:3]])
    for _ in range(2):
        script.main(script.Options(**FAKE, folder=folder))
    header, rows = table(folder)
    assert header == columns and rows[-1] == other and len(rows) == 3
    for row, what in zip(rows, ("detection, an image on each core", "training in bfloat16, 16 images"), strict=False):
        assert row[:3] == ("v3:2x2x1", "mask_rcnn_resnet50_fpn, 64×96", what)
        assert row[3:] == ("0.00 of 16 GiB", "0", f"jax {jax.__version__}, libtpu 1.2, commit abc")
    text = (folder / "tpu.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n")


@pytest.mark.usefixtures("cpu")
def test_only_what_is_asked_for_is_compiled(folder):
    script.main(script.Options(**FAKE, programs=("detection",), folder=folder))
    assert [row[2] for row in table(folder)[1]] == ["detection, an image on each core"]


@pytest.mark.usefixtures("cpu")
def test_a_program_that_does_not_fit_fails(folder, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17.2G of 15.75G hbm")

    monkeypatch.setattr(script, "lower_step", too_large)
    with pytest.raises(SystemExit, match="Not every program fits"):
        script.main(script.Options(**FAKE, folder=folder))
    rows = table(folder)[1]
    assert [row[3:5] for row in rows] == [("0.00 of 16 GiB", "0"), ("does not fit 16 GiB", "—")]


def test_another_error_is_not_taken_for_that():
    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        script.measure(broken, 16)


def test_figures():
    program = jax.jit(lambda x, y: x @ y).lower(*[jax.ShapeDtypeStruct((8192, 8192), jnp.float32)] * 2)
    memory, flops = script.measure(lambda: program, 16)
    assert memory.endswith(" of 16 GiB") and 0.75 <= float(memory.split()[0]) < 0.8  # three arrays of 0.25 GiB
    assert flops == round(2 * 8192**3 / 1e9)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_small_detector_compiles(folder, monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is in the extra `tpu`")
    tiny_train.shrink(monkeypatch)
    monkeypatch.setattr(script, "SOURCE", 64)
    script.main(script.Options(**FAKE | {"models": ("faster_rcnn_resnet18_fpn",)}, folder=folder))
    for row in table(folder)[1]:
        assert float(row[3].split()[0]) < 1 and float(row[4]) > 0
