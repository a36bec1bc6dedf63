"""The benchmark: its tables in a file, its verdicts, its workers, and what it does where the sides disagree."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest


sys.path.append(str(Path(__file__).parents[1] / "experiments"))
benchmark = import_module("benchmark")
agreement, bench, check, process, tables, targets = (
    import_module(f"_benchmark.{name}") for name in ("agreement", "bench", "check", "process", "tables", "targets")
)

CPU, GPU = "2 CPU cores (Test)", "1 × Test GPU"
HEADER = ("operator", "ratio", "run")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    names = ("targets", "ops", "size", "runs")
    path.write_text("# Title\n\n" + "\n".join(f"## {n}\n\n<!-- {n} -->\n<!-- /{n} -->\n\nAfter {n}.\n" for n in names))
    return path


def run_on(hardware, commit="abc"):
    return tables.Run(hardware, "jax 1", commit, "2026-01-01", "`make bench`")


def put(file, run, rows, keys=None):
    name = tables.register(file, run)
    keys = [row[:1] for row in rows] if keys is None else keys
    tables.merge(file, "ops", HEADER, [(*row, name) for row in rows], keys=keys)


def test_a_run_replaces_its_own_rows_and_leaves_those_of_other_hardware(file):
    put(file, run_on(CPU), [("nms", "1.00×"), ("paste", "2.00×")])
    put(file, run_on(GPU), [("nms", "9.00×")])
    put(file, run_on(CPU, commit="def"), [("nms", "3.00×")])
    assert tables.read_table(file, "ops") == (HEADER, [("nms", "9.00×", "2"), ("nms", "3.00×", "3")])
    # The first run has no rows left; the text around the tables is as it was.
    header, runs = tables.read_table(file, "runs")
    assert header == ("run", "hardware", "versions", "commit", "date", "command")
    assert [(row[0], row[1], row[3]) for row in runs] == [("2", GPU, "abc"), ("3", CPU, "def")]
    assert "After ops.\n\n## size" in file.read_text() and file.read_text().endswith("After runs.\n")
    assert list(file.parent.iterdir()) == [file]


def test_rows_that_were_not_measured_stay_with_their_run(file):
    put(file, run_on(CPU), [("nms", "1.00×"), ("paste", "2.00×"), ("renamed since", "1.00×")])
    put(file, run_on(CPU, commit="def"), [("nms", "3.00×")], keys=[("nms",), ("paste",)])
    assert tables.read_table(file, "ops")[1] == [("nms", "3.00×", "2"), ("paste", "2.00×", "1")]
    assert [row[0] for row in tables.read_table(file, "runs")[1]] == ["1", "2"]


def test_the_same_run_is_entered_once_and_columns_may_change(file):
    put(file, run_on(GPU), [("nms", "1.00×")])
    assert tables.register(file, run_on(GPU)) == "1"
    name = tables.register(file, run_on(CPU))
    tables.merge(file, "ops", ("operator", "ms", "run"), [("a|b", "5", name)], keys=[("a|b",)])
    assert tables.read_table(file, "ops")[1] == [("nms", "", "1"), ("a|b", "5", "2")]


def test_missing_markers_are_told_by_file_and_name(file):
    with pytest.raises(tables.MarkerError, match=r"BENCHMARKS\.md lacks the markers <!-- data -->"):
        tables.read_table(file, "data")


def test_targets_are_read_off_the_tables(file):
    header = ("operator", "ours ms", "ratio", "run")
    name = tables.register(file, run_on(CPU))
    rows = [
        ("nms, 1,000 boxes, spread", "1", "7.00×", name),
        ("nms, 10,000 boxes, spread", "1", "4.49×", name),
        ("mask paste, 100 onto 800×1216", "1", bench.NO_PEER, name),
    ]
    tables.merge(file, "ops", header, rows, keys=[row[:1] for row in rows])
    for other in ("inference", "training", "data", "compile", "export"):
        file.write_text(file.read_text() + f"<!-- {other} -->\n<!-- /{other} -->\n")
    targets.write_targets(file, CPU, on_host=True)
    assert tables.read_table(file, "targets")[1] == [
        ("nms, 1,000 boxes, spread", "≥ 7×", "7.00×", "yes", "1"),
        ("nms, 10,000 boxes, spread", "≥ 4.5×", "4.49×", "no", "1"),
    ]


@pytest.mark.parametrize(("platform", "wanted"), [("cpu", targets.CPU_TARGETS), ("gpu", targets.GPU_TARGETS)])
def test_every_target_names_a_row_that_is_measured(tmp_path, platform, wanted):
    device = bench.Bench(quick=False, peer_python=None, folder=tmp_path)
    device.abouts = [{"platform": platform}]
    assert len({target.work for target in wanted}) == len(wanted)
    for target in wanted:
        table = benchmark.TABLES[target.table]
        assert target.column in table.columns
        assert [row for row in table.rows(device) if row.key[: len(target.key)] == target.key], target.work


def table_of(*rows):
    return bench.Table("ops", ("operator",), ("ratio",), lambda _: list(rows))


def row_of(name, *ratios):
    """A row that measures one ratio after the other."""
    left = list(ratios)
    return bench.Row((name,), lambda: (f"{left.pop(0):.2f}×",))


def judged(file, *rows):
    options = benchmark.Options(file=file, check=True)
    sides = bench.Bench(quick=False, peer_python=Path("python"), folder=file.parent)
    benchmark.check(options, sides, [table_of(*rows)], CPU)


def test_check_tolerates_a_fifth(file, capsys):
    put(file, run_on(CPU), [("a", "1.00×"), ("b", "2.00×")])
    put(file, run_on(GPU), [("c", "50.00×")])
    judged(file, row_of("a", 0.81), row_of("b", 1.62), row_of("c", 0.1))
    judged(file, row_of("a", 0.79, 0.81), row_of("b", 9.0))  # once slow is not twice slow
    assert "regressed" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        judged(file, row_of("a", 0.9), row_of("b", 1.58, 1.57))
    assert failed.value.code == 1
    assert "regressed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no ratios of"):
        judged(file, row_of("new", 1.0))


def test_a_disagreement_is_reported_and_its_row_not_written(file):
    put(file, run_on(CPU), [("old", "1.00×"), ("renamed", "1.00×")])

    def disagree():
        agreement.require_close({"x": np.ones(3)}, {"x": np.array([1, 1, 1.1])}, atol=1e-3)
        return ("1.00×",)

    table = table_of(row_of("good", 2.0), bench.Row(("old",), disagree))
    sides = bench.Bench(quick=False, peer_python=None, folder=file.parent)
    failures = benchmark.measure(benchmark.Options(file=file), sides, table, run_on(CPU, commit="def"))
    assert len(failures) == 1 and "old: x: differs from torchvision's by 0.091" in failures[0]
    assert tables.read_table(file, "ops")[1] == [("good", "2.00×", "2"), ("old", "1.00×", "1")]


def detections(**changes):
    arrays = {
        "boxes": np.array([[[0, 0, 10, 10], [5, 5, 30, 20], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0.8, 0]], np.float32),
        "labels": np.array([[3, 4, 0]], np.int32),
        "valid": np.array([[True, True, False]]),
        "masks": np.array([[[[255]], [[128]], [[0]]]], np.uint8),
    }
    return {**arrays, **changes}


def test_detections_agree_in_any_order_and_to_the_tolerances():
    theirs = detections()
    rows = [1, 0, 2]
    swapped = {name: array[:, rows] for name, array in detections(boxes=theirs["boxes"] + 0.02).items()}
    agreed = agreement.compare_detections(swapped, theirs)
    assert agreed.detections == 2 and agreed.mask_iou == 1.0
    assert agreed.box == pytest.approx(0.02, abs=1e-5)
    wrong = {
        "another label": detections(labels=np.array([[3, 5, 0]], np.int32)),
        "boxes differ": detections(boxes=theirs["boxes"] + 0.1),
        "scores by 0.0002": detections(scores=theirs["scores"] + np.float32(2e-4)),
        "least mask IoU 0.5": detections(masks=np.array([[[[255]], [[192]], [[0]]]], np.uint8)),
        "1 detections, torchvision's 2": detections(valid=np.array([[True, False, False]])),
    }
    for message, ours in wrong.items():
        with pytest.raises(agreement.Disagreement, match=message):
            agreement.compare_detections(ours, theirs)
    with pytest.raises(agreement.Disagreement, match="neither"):
        agreement.compare_detections(*[detections(valid=np.zeros((1, 3), bool))] * 2)


def test_losses_agree_on_average():
    """What sampling alone makes of them is no disagreement; what goes beyond is."""

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
        with process.Worker(sys.executable, "_benchmark.ours") as started:
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
    compared = process.side_by_side(worker, worker, budget=0.1)
    assert len(compared.ratios) >= 5 and compared.ratio > 0


def test_a_worker_tells_what_failed_and_goes_on(worker):
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(process.WorkerError, match="iou_threshold must lie between 0 and 1, got 2"):
        worker.build("nms", {"boxes": boxes, "scores": boxes[:, 0]}, iou_threshold=2.0)
        worker.result()
    assert worker.about()
    absent = process.Worker(sys.executable, "_benchmark.absent")
    with absent, pytest.raises(process.WorkerError, match="ended with status 1"):
        absent.about()


def test_without_a_peer_ours_is_measured_and_the_ratio_says_what_fills_it(file, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sides = bench.Bench(quick=True, peer_python=None, folder=file.parent)
    options = benchmark.Options(quick=True, only="decode", file=file)
    try:
        assert benchmark.measure(options, sides, benchmark.TABLES["ops"], benchmark.describe(sides)) == []
    finally:
        sides.release()
    header, rows = tables.read_table(file, "ops")
    row = dict(zip(header, *rows, strict=True))
    assert float(row["ours ms"]) > 0 and row["ratio"] == bench.NO_PEER
    assert tables.read_table(file, "runs")[1][0][1].endswith(", quick")
