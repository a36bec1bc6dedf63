"""The command `detectax` runs the scripts, from a checkout and from a wheel."""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import jax.random as jr
import pytest
from PIL import Image

import detectax_eqx
from detectax_eqx import __main__ as command, data, models, zoo


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


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_fits_two_screens(name, monkeypatch, capsys):
    """Of 80 columns and 50 lines; advanced options of training are shown by --help-all."""
    monkeypatch.setenv("COLUMNS", "80")
    for key in (command.PROGRAM, "PYTHONPATH"):
        monkeypatch.setenv(key, "")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and len(shown.splitlines()) <= 100
    assert ("--help-all" in shown) == (name == "train") and "--weight-decay" not in shown
    if name == "train":
        with pytest.raises(SystemExit):
            command.main([name, "--help-all"])
        assert "--weight-decay" in capsys.readouterr().out


def test_every_package_is_in_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in (ROOT / "detectax_eqx").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["tool"]["setuptools"]["packages"]) == packages | {"detectax_eqx._scripts"}
    assert setup["project"]["version"] == detectax_eqx.__version__


def build_wheel(folder):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_wheel_away_from_the_checkout(tmp_path):
    """Built, unpacked elsewhere and used there: pages' parts and scripts are in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = build_wheel(tmp_path)
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


def interpreter(version):
    """A Python of this version: on the path, or among pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pyenvs = [str(path) for path in sorted(root.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, (*pyenvs, shutil.which(f"python{version}"))):
        if subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    return pytest.skip(f"no Python {version} is installed")


IN_PYTHON = """
from detectax_eqx import zoo
predictor = zoo.Predictor.from_weights("faster_rcnn_resnet18_fpn", "detector.safetensors", norm="group")
predictor("street.jpg").draw().save("python.png")
"""


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_wheel_in_an_empty_environment(version, tmp_path):
    """One command, and three lines of Python, from weights and a picture to a drawn picture."""
    python, wheel = interpreter(version), build_wheel(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    name, canvas = "faster_rcnn_resnet18_fpn", (96, 128)
    model = zoo.Architecture(name, "group").build(2, key=jr.key(0))
    model = replace(model, preprocessing=replace(model.preprocessing, resize=models.ShortestEdge(*canvas)))
    categories = (data.Category(1, "cat"), data.Category(2, "dog"))
    zoo.Predictor(model, categories, (canvas,)).save_weights(work / "detector.safetensors")
    _, images = data.write_shapes_dataset(tmp_path / "shapes", num_images=1, image_size=canvas)
    with Image.open(next(images.iterdir())) as picture:
        picture.save(work / "street.jpg")

    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True, capture_output=True)
    tools = tmp_path / "venv/bin"
    kept = {"PATH", "HOME", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS"}
    environment = {key: value for key, value in os.environ.items() if key in kept} | {"JAX_PLATFORMS": "cpu"}
    install = [tools / "pip", "install", "--disable-pip-version-check", wheel]
    installed = subprocess.run(install, capture_output=True, text=True, env=environment)
    assert installed.returncode == 0, installed.stderr
    predict = [tools / "detectax", "predict", "--model", name, "--weights", "detector.safetensors", "--norm", "group"]
    for words in ([*predict, "street.jpg"], [tools / "python", "-c", IN_PYTHON]):
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=work)
        assert done.returncode == 0, done.stdout + done.stderr
    for file in ("predictions/street.jpg.png", "python.png"):
        with Image.open(work / file) as picture:
            assert picture.size == canvas[::-1]
