"""Notebooks: their stored outputs, and the script that runs them."""

from pathlib import Path

import pytest

from .test_experiments import run


nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source.startswith("# ")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)  # a warning is something to fix
    assert path.stat().st_size < 1_500_000
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 120


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 5


def notebook_of(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)


@pytest.mark.slow
def test_the_script_runs_keeps_outputs_and_fails(tmp_path):
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    notebook_of(good, "from pathlib import Path\nx = 41", "print(x + 1, Path.cwd().name)")
    notebook_of(bad, "1 / 0", "print('not reached')")
    text = run("run_notebooks.py", good)
    assert "good.ipynb" in text and "s of processor time" in text
    cells = nbformat.read(good, as_version=4).cells
    assert cells[1].outputs[0].text == f"42 {tmp_path.name}\n"
    assert not cells[1].metadata  # no timings, which would differ between runs
    text = run("run_notebooks.py", bad, status=1)
    assert "bad.ipynb" in text and "ZeroDivisionError" in text
    assert not nbformat.read(bad, as_version=4).cells[0].outputs
    text = run("run_notebooks.py", good, "--limit", "0.01", status=1)
    assert "More than 0.01 s of processor time: good.ipynb" in text
