"""Scripts cache compiled programs in the user's cache folder, unless configured otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# A script that compiles one program and prints where it is cached.
SCRIPT = """
import sys
from dataclasses import dataclass
sys.path.insert(0, sys.argv.pop(1))
import jax
assert jax.config.jax_compilation_cache_dir is None or "JAX_COMPILATION_CACHE_DIR" in __import__("os").environ
from _shared import run

@dataclass
class Options:
    pass

def main(options):
    jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7)).block_until_ready()
    print("kept in", jax.config.jax_compilation_cache_dir)

run(main, Options, None)
"""


def start(home, **environment):
    """What the script prints, with `home` as the home folder; programs are cached however fast they compile."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_", "XLA_"))}
    settings = {"HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "300"}
    settings |= {"JAX_PLATFORMS": "cpu", "DETECTAX_TYPECHECK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(EXPERIMENTS)],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def programs(folder):
    """Names of the files in a folder of cached programs."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    assert f"kept in {tmp_path / '.cache' / 'detectax_eqx' / 'programs-'}" in start(tmp_path)
    cached = programs(tmp_path)
    assert cached
    start(tmp_path)
    assert programs(tmp_path) == cached  # used again


def test_settings_are_respected(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    assert f"kept in {other / 'detectax_eqx'}" in start(home, XDG_CACHE_HOME=str(other))
    own = tmp_path / "own"
    assert f"kept in {own}\n" in start(home, JAX_COMPILATION_CACHE_DIR=str(own))
    assert programs(own)
    assert "kept in None" in start(home, JAX_ENABLE_COMPILATION_CACHE="0")
    assert "kept in \n" in start(home, JAX_COMPILATION_CACHE_DIR="")
    assert not programs(home)


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / ".cache").write_text("a file, not a folder")
    text = start(tmp_path)
    assert len([line for line in text.splitlines() if "Compiled programs are not kept" in line]) == 1
    assert "kept in None" in text and "Traceback" not in text


@pytest.mark.parametrize("package", ["detectax_eqx", "detectax_eqx.train"])
def test_an_import_of_the_library_changes_no_settings(package):
    code = f"import jax, {package}; print(jax.config.jax_compilation_cache_dir)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
