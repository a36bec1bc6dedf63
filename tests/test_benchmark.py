"""The benchmark: measurements, pages, verdicts, workers, and disagreements between the two sides."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "experiments"))
benchmark = import_module("benchmark")
agreement, bench, pages, tables = (
    import_module(f"_benchmark.{name}") for name in ("agreement", "bench", "pages", "tables")
)

CPU, GPU = "2 CPU cores (Test)", "1 × Test GPU"
PAGES = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))


@pytest.fixture
def folder(tmp_path):
    """A folder for measurements, with a page for operators and runs."""
    path = tmp_path / "docs" / "benchmarks"
    path.mkdir(parents=True)
    names = ("targets", "ops", "size", "runs")
    text = "\n".join(f"## {n}\n\n<!-- {n} -->\n<!-- /{n} -->\n\nAfter {n}.\n" for n in names)
    (path / "ops.md").write_text("# Title\n\n" + text)
    return path


def run_on(hardware, commit="abc"):
    return tables.Run(hardware, "jax 1", commit, "2026-01-01", "`make bench`")


def put(folder, run, ratios, keys=None):
    """Adds operator rows one at a time, reading the measurements again before each."""
    keys = [(name,) for name in ratios] if keys is None else keys
    for name, ratio in ratios.items():
        tables.Measurements(folder).add("ops", {"operator": name, "ratio": ratio}, run, keys=keys)


def recorded(folder):
    return [(row["operator"], row["ratio"], row["run"]) for row in tables.Measurements(folder).of("ops")]


def test_a_run_replaces_its_own_rows_and_leaves_those_of_other_hardware(folder):
    put(folder, run_on(CPU), {"nms": 1.0, "paste": 2.0})
    put(folder, run_on(GPU), {"nms": 9.0})
    put(folder, run_on(CPU, commit="def"), {"nms": 3.0})
    assert recorded(folder) == [("nms", 9.0, 2), ("nms", 3.0, 3)]
    # The first run has no rows left. The text around the tables is unchanged.
    pages.render(folder)
    header, runs = tables.read_table(folder / "ops.md", "runs")
    assert header == ("run", "hardware", "versions", "commit", "date", "command")
    assert [(row[0], row[1], row[3]) for row in runs] == [("2", GPU, "abc"), ("3", CPU, "def")]
    text = (folder / "ops.md").read_text()
    assert "After ops.\n\n## size" in text and text.endswith("After runs.\n")
    assert sorted(file.name for file in folder.iterdir()) == ["measurements.jsonl", "ops.md", "runs.jsonl"]


def test_rows_that_were_not_measured_stay_with_their_run(folder):
    put(folder, run_on(CPU), {"nms": 1.0, "paste": 2.0, "renamed since": 1.0})
    put(folder, run_on(CPU, commit="def"), {"nms": 3.0}, keys=[("nms",), ("paste",)])
    assert recorded(folder) == [("nms", 3.0, 2), ("paste", 2.0, 1)]
    assert list(tables.Measurements(folder).runs) == [1, 2]


def test_the_same_run_is_entered_once_and_columns_may_change(folder):
    put(folder, run_on(GPU), {"nms": 1.0})
    put(folder, run_on(GPU), {"nms": 2.0})
    assert list(tables.Measurements(folder).runs) == [1]
    tables.Measurements(folder).add("ops", {"operator": "a|b", "ours ms": 5}, run_on(CPU), keys=[("a|b",)])
    pages.render(folder)
    header, rows = tables.read_table(folder / "ops.md", "ops")
    assert header == ("operator", "ours ms", "torchvision ms", "ratio", "spread", "run")
    assert rows == [("nms", "", "", "2.00×", "", "1"), ("a|b", "5.00", "", "", "", "2")]


def test_cells_are_formatted_by_their_column():
    ratio = {"ours s": 0.01234, "torchvision s": 1234.5, "ratio": None, "spread": None, "ours images/s": None}
    row = {"model": "m", "images": "1 × 2×3", "precision": "float32", **ratio, "run": 3}
    assert list(pages.cells("inference", row).values()) == [
        *("m", "1 × 2×3", "float32", "0.0123", "1,234.50", bench.NO_PEER, "", "—", "", "3")
    ]
    assert pages.shown("refused by this version", "ratio") == "refused by this version"
    assert pages.shown([1.234, 5.678], "spread") == "1.23–5.68"


def test_missing_markers_are_reported_by_file_and_name(folder):
    with pytest.raises(tables.MarkerError, match=r"ops\.md lacks the markers <!-- data -->"):
        tables.read_table(folder / "ops.md", "data")


def test_targets_are_read_off_the_tables(folder):
    ratios = {
        "nms, 1,000 boxes, spread": 7.0,
        "nms, 10,000 boxes, spread": 4.49,
        "mask paste, 100 onto 800×1216": None,  # no peer
    }
    put(folder, run_on(CPU), ratios)
    pages.render(folder)
    assert tables.read_table(folder / "ops.md", "targets")[1] == [
        ("nms, 1,000 boxes, spread", "≥ 7×", "7.00×", "yes", "1"),
        ("nms, 10,000 boxes, spread", "≥ 4.5×", "4.49×", "no", "1"),
    ]


@pytest.fixture(params=["cpu", "gpu"])
def device(request, tmp_path):
    sides = bench.Bench(quick=False, peer_python=None, folder=tmp_path)
    sides.abouts = [{"platform": request.param}]
    return sides


def test_every_target_names_a_row_that_is_measured(device):
    wanted = pages.TARGETS[device.abouts[0]["platform"]]
    assert len({target["work"] for target in wanted}) == len(wanted)
    for target in wanted:
        key = tuple(target["key"])
        assert target["column"] in tables.TABLES[target["table"]].columns
        rows = benchmark.rows_of(device, target["table"])
        assert [row for row in rows if row[: len(key)] == key], target["work"]


def test_every_table_has_a_description_and_rows_with_its_keys(device):
    for name in benchmark.NAMES:
        keys = tables.TABLES[name].keys
        assert all(len(row) == len(keys) for row in benchmark.rows_of(device, name)) and keys
        device.quick = True
        assert benchmark.rows_of(device, name)
        device.quick = False


def test_every_row_of_a_view_is_measured_on_some_device(tmp_path):
    measured = set()
    for platform in ("cpu", "gpu"):
        sides = bench.Bench(quick=False, peer_python=None, folder=tmp_path)
        sides.abouts = [{"platform": platform}]
        measured |= {(name, key) for name in benchmark.NAMES for key in benchmark.rows_of(sides, name)}
    for view in pages.VIEWS.values():
        for label, table, key, _ in view.get("rows", ()):
            assert (table, tuple(key)) in measured, label


def test_the_committed_pages_are_rendered_from_the_committed_measurements(tmp_path):
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "docs" / "benchmarks")
    shutil.copy(ROOT / "BENCHMARKS.md", tmp_path)
    for page in [tmp_path / "BENCHMARKS.md", *(tmp_path / "docs" / "benchmarks").glob("*.md")]:
        if page.name != "reliability.md":  # the tests write that page
            lines = page.read_text().splitlines(keepends=True)
            marked = [i for i, line in enumerate(lines) if line.startswith("<!-- /")]
            begins = {i: next(k for k in range(i, -1, -1) if lines[k] == lines[i].replace("/", "", 1)) for i in marked}
            dropped = {k for end, begin in begins.items() for k in range(begin + 1, end)}
            page.write_text("".join(line for i, line in enumerate(lines) if i not in dropped))
    pages.render(tmp_path / "docs" / "benchmarks")
    for page in [ROOT / "BENCHMARKS.md", *PAGES]:
        assert (tmp_path / page.relative_to(ROOT)).read_bytes() == page.read_bytes(), page.name
    rows = json.loads("[" + ",".join((ROOT / "docs/benchmarks/measurements.jsonl").read_text().splitlines()) + "]")
    text = "".join(page.read_text() for page in PAGES)
    assert all(
        pages.markdown([], [list(pages.cells(row["table"], row).values())]).splitlines()[-1] in text for row in rows
    )


def test_the_summary_and_the_harness_stay_small():
    assert len((ROOT / "BENCHMARKS.md").read_bytes()) <= 15_000
    harness = [ROOT / "experiments" / "benchmark.py", *(ROOT / "experiments" / "_benchmark").rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in harness) < 1500


def row_of(name, *ratios):
    """An operator row whose measurements return the given ratios in turn."""
    left = list(ratios)
    return {(name,): lambda: (1.0, 1.0, left.pop(0), None)}


def judged(folder, *rows):
    options = benchmark.Options(folder=folder, check=True)
    sides = bench.Bench(quick=False, peer_python=Path("python"), folder=folder)
    benchmark.check(options, sides, {"ops": {key: row[key] for row in rows for key in row}}, CPU)


def test_check_tolerates_a_fifth(folder, capsys):
    put(folder, run_on(CPU), {"a": 1.0, "b": 2.0})
    put(folder, run_on(GPU), {"c": 50.0})
    judged(folder, row_of("a", 0.81), row_of("b", 1.62), row_of("c", 0.1))
    judged(folder, row_of("a", 0.79, 0.81), row_of("b", 9.0))  # slow only once, not in the repeated measurement
    assert "regressed" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        judged(folder, row_of("a", 0.9), row_of("b", 1.58, 1.57))
    assert failed.value.code == 1
    assert "regressed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no ratios for"):
        judged(folder, row_of("new", 1.0))


def test_a_disagreement_is_reported_and_its_row_not_written(folder):
    put(folder, run_on(CPU), {"old": 1.0, "renamed": 1.0})

    def disagree():
        agreement.require_close({"x": np.ones(3)}, {"x": np.array([1, 1, 1.1])}, atol=1e-3)
        return 1.0, 1.0, 1.0, None

    sides = bench.Bench(quick=False, peer_python=None, folder=folder)
    rows = row_of("good", 2.0) | {("old",): disagree}
    failures = benchmark.measure(benchmark.Options(folder=folder), sides, "ops", rows, run_on(CPU, commit="def"))
    assert len(failures) == 1 and "old: x: differs from torchvision's by 0.091" in failures[0]
    assert recorded(folder) == [("good", 2.0, 2), ("old", 1.0, 1)]
    rendered = tables.read_table(folder / "ops.md", "ops")[1]
    assert [row[:4] for row in rendered] == [("good", "1.00", "1.00", "2.00×"), ("old", "", "", "1.00×")]


def detections(**changes):
    """Detections for a batch of one image."""
    arrays = {
        "boxes": np.array([[0, 0, 10, 10], [5, 5, 30, 20]], np.float32),
        "scores": np.array([0.9, 0.8], np.float32),
        "labels": np.array([3, 4], np.int32),
        "masks": np.array([[[255]], [[128]]], np.uint8),
    }
    return [{**arrays, **changes}]


def test_detections_agree_in_any_order_and_to_the_tolerances():
    theirs = detections()
    boxes = theirs[0]["boxes"]
    swapped = [{name: array[[1, 0]] for name, array in detections(boxes=boxes + 0.02)[0].items()}]
    agreed = agreement.compare_detections(swapped, theirs)
    assert agreed.detections == 2 and agreed.mask_iou == 1.0
    assert agreed.box == pytest.approx(0.02, abs=1e-5)
    wrong = {
        "another label": detections(labels=np.array([3, 5], np.int32)),
        "boxes differ": detections(boxes=boxes + 0.1),
        "boxes differ by nan": detections(boxes=boxes * np.float32("nan")),
        "scores by 0.0002": detections(scores=theirs[0]["scores"] + np.float32(2e-4)),
        "least mask IoU 0.5": detections(masks=np.array([[[255]], [[192]]], np.uint8)),
        "1 detections, torchvision's 2": [{name: array[:1] for name, array in theirs[0].items()}],
    }
    for message, ours in wrong.items():
        with pytest.raises(agreement.Disagreement, match=message):
            agreement.compare_detections(ours, theirs)
    none = [{name: array[:0] for name, array in theirs[0].items()}]
    with pytest.raises(agreement.Disagreement, match="neither"):
        agreement.compare_detections(none, none)


def test_losses_agree_on_average():
    """Differences of the size that random sampling causes are accepted; larger ones are not."""

    def steps(*values):
        return [{"loss_objectness": np.float32(value)} for value in values]

    agreement.compare_losses(steps(0.70, 0.78, 0.74), steps(0.76, 0.72, 0.71), rtol=0.01)
    agreement.compare_losses(steps(1.0, 1.0), steps(1.009, 1.009), rtol=0.01)
    with pytest.raises(agreement.Disagreement, match=r"loss_objectness: 1\.0000 on average, torchvision's 1\.0200"):
        agreement.compare_losses(steps(1.0, 1.0), steps(1.02, 1.02), rtol=0.01)
    with pytest.raises(agreement.Disagreement, match="has losses"):
        agreement.compare_losses(steps(1.0, 1.0), [{"loss_mask": np.float32(1.0)}] * 2, rtol=0.01)


@pytest.fixture(scope="module")
def worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        with bench.Worker(sys.executable, "_cases.ours") as started:
            yield started


def test_a_worker_builds_runs_and_times_a_case(worker):
    about = worker.about()
    assert about["platform"] == "cpu" and {"jax", "python"} == about["versions"].keys()
    boxes = np.array([[0, 0, 2, 2], [1, 0, 3, 2]], np.float32)
    facts = worker.build("pairwise_iou", {"boxes": boxes[:1], "anchors": boxes})
    assert facts["seconds"] >= 0
    np.testing.assert_allclose(worker.result()["iou"], [[1, 1 / 3]], rtol=1e-6)
    assert 0 < worker.time(3) < 1
    assert worker.memory() >= 0
    compared = bench.side_by_side(worker, worker, budget=0.1)
    assert len(compared.ratios) >= 5 and compared.cells[0] > 0


def test_a_worker_reports_what_failed_and_goes_on(worker):
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(bench.WorkerError, match="iou_threshold must lie between 0 and 1, got 2"):
        worker.build("nms", {"boxes": boxes, "scores": boxes[:, 0]}, iou_threshold=2.0)
        worker.result()
    assert worker.about()
    absent = bench.Worker(sys.executable, "_cases.absent")
    with absent, pytest.raises(bench.WorkerError, match="ended with status 1"):
        absent.about()


def test_without_a_peer_ours_is_measured_and_the_ratio_says_what_fills_it(folder, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sides = bench.Bench(quick=True, peer_python=None, folder=folder)
    options = benchmark.Options(quick=True, only="decode", folder=folder)
    try:
        rows, run = benchmark.rows_of(sides, "ops"), benchmark.describe(sides)
        assert benchmark.measure(options, sides, "ops", rows, run) == []
    finally:
        sides.release()
    header, rows = tables.read_table(folder / "ops.md", "ops")
    row = dict(zip(header, *rows, strict=True))
    assert float(row["ours ms"]) > 0 and row["ratio"] == bench.NO_PEER
    assert tables.read_table(folder / "ops.md", "runs")[1][0][1].endswith(", quick")
