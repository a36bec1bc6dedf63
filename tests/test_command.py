"""The command `detectax` runs the scripts, from a checkout and from a wheel."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import detectax_eqx
from detectax_eqx import __main__ as command


ROOT = Path(__file__).parents[1]


def run(*words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "detectax_eqx", *words], capture_output=True, text=True, env=environment or None
    )
    return done.returncode, done.stdout + done.stderr


def test_every_command_is_a_script():
    assert command.scripts() == ROOT / "experiments"
    for name, (script, _) in command.COMMANDS.items():
        assert (ROOT / "experiments" / f"{script}.py").is_file(), name


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage(words, capsys):
    command.main(words)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: detectax COMMAND") and all(f"  {name} " in shown for name in command.COMMANDS)


def test_version_and_what_is_no_command(capsys):
    command.main(["--version"])
    assert capsys.readouterr().out.strip() == detectax_eqx.__version__
    with pytest.raises(SystemExit, match="There is no command 'trian'"):
        command.main(["trian"])


def test_a_command_gets_its_options():
    status, text = run("predict", "--help")
    assert status == 0 and "usage: detectax predict" in text and "--score-threshold" in text
    status, text = run("list")
    assert status == 0 and "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth" in text


def test_every_package_is_in_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in (ROOT / "detectax_eqx").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["tool"]["setuptools"]["packages"]) == packages | {"detectax_eqx._scripts"}
    assert setup["project"]["version"] == detectax_eqx.__version__


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_wheel_away_from_the_checkout(tmp_path):
    """Built, unpacked elsewhere and used there: pages' parts and scripts are in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    environment = {"PYTHONPATH": str(target), "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    code = "import detectax_eqx; print(detectax_eqx.__file__)"
    place = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert place.stdout.startswith(str(target)), place.stderr
    package = target / "detectax_eqx"
    assert (package / "py.typed").is_file() and (package / "report" / "page.html").is_file()
    for words in (["list"], *([name, "--help"] for name in command.COMMANDS if name != "list")):
        done = subprocess.run(
            [sys.executable, "-m", "detectax_eqx", *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
