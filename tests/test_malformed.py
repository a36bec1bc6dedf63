"""Malformed input raises a readable error, or is repaired and counted. It never hangs or gives a wrong number."""

import time
import traceback
import tracemalloc
from collections import Counter

import pytest

from detectax_eqx.data import DatasetError
from detectax_eqx.train import CheckpointError
from detectax_eqx.weights import WeightsError

from .malformed import annotations, checkpoints, images, options, pickles, results, weights


# The short form takes every n-th case of each family, the long form every case.
FAMILIES = {annotations: 3, images: 3, weights: 6, pickles: 12, checkpoints: 3, options: 6, results: 6}
# `SECONDS` are processor time, which other work on the machine does not lengthen.
SECONDS, WAITING_SECONDS, MEGABYTES = 20, 120, 300
OURS = (DatasetError, WeightsError, CheckpointError, SystemExit, ConnectionError, FileNotFoundError)


def outcome(case, folder, capsys):
    """Runs a case. Returns "refused", or what the case's check returns; fails on anything else."""
    folder.mkdir()
    call = case.make(folder)
    began, started = time.process_time(), time.monotonic()
    try:
        result = call()
    except OURS as error:
        shown = capsys.readouterr()
        # The option parser prints its message and exits with a number.
        text = shown.out + shown.err if isinstance(error, SystemExit) and error.code == 2 else str(error)
        assert text and "Traceback" not in text
        missing = [word for word in case.words if word not in text and word.replace("-", "_") not in text]
        assert not missing, f"the message lacks {missing}: {text[:600]}"
        assert len(text) < 6000, f"a message of {len(text)} characters"
        return "refused"
    finally:
        assert time.process_time() - began < SECONDS, "it took long"
        assert time.monotonic() - started < WAITING_SECONDS, "it hung"
    assert case.check is not None, "it was accepted"
    return case.check(result)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Image size")
@pytest.mark.timeout(900)
def test_malformed(family, every, tmp_path, capsys, monkeypatch, tally):
    monkeypatch.chdir(tmp_path)
    outcomes, failures = Counter(), []
    for number, case in enumerate(family.cases()):
        if not every and number % FAMILIES[family]:
            continue
        if every and family in (weights, pickles):
            tracemalloc.start()
        try:
            outcomes[outcome(case, tmp_path / str(number), capsys)] += 1
            if tracemalloc.is_tracing():
                assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 1e6, "it took much memory"
        except Exception as error:
            failures.append(f"{case.name}: {''.join(traceback.format_exception(error)[-3:])}")
        finally:
            tracemalloc.stop()
    survived = outcomes.total()
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    name = family.__name__.rpartition(".")[2]
    if every:
        tally(f"malformed {name}", survived + len(failures), survived, kinds)
    assert not failures, f"{len(failures)} of {survived + len(failures)}\n" + "\n".join(failures[:40])
    assert survived > 5 and not (tmp_path / "harmed").exists()


def test_there_are_enough_cases():
    counts = {family.__name__: sum(1 for _ in family.cases()) for family in FAMILIES}
    assert sum(counts.values()) > 300 and min(counts.values()) > 50, counts
