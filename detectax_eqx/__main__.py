"""The `detectax` command, which runs the scripts of `experiments/` by name."""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import detectax_eqx


# For each command: its script and its description.
COMMANDS = {
    "train": ("train", "train a detector on a dataset in COCO format"),
    "predict": ("predict", "detect objects in image files and draw them"),
    "evaluate": ("evaluate", "score a detector, or a file of results, on a dataset in COCO format"),
    "export": ("export", "write a detector as ONNX, StableHLO or safetensors"),
    "inspect": ("inspect_dataset", "inspect a dataset before training on it"),
    "convert": ("convert", "convert weights from one format to another"),
    "convert-dataset": ("convert_dataset", "write a dataset in YOLO's or Pascal VOC's format as a COCO file"),
    "list": ("list_detectors", "list detectors and their published weights"),
}


# The environment variable that passes the program name to a script, for its help text.
PROGRAM = "DETECTAX_PROGRAM"


def usage() -> str:
    """The text that `detectax --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    commands = "\n".join(lines)
    return (
        f"usage: detectax COMMAND ...\n\n{commands}\n\n"
        f"`detectax COMMAND --help` lists the options. Version {detectax_eqx.__version__}."
    )


def scripts() -> Path:
    """The folder of the scripts: inside the installed package, or `experiments/` in a checkout."""
    package = Path(__file__).parent
    installed = package / "_scripts"
    return installed if installed.is_dir() else package.parent / "experiments"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script of a command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    if given[0] == "--version":
        print(detectax_eqx.__version__)
        return
    name, *rest = given
    if name not in COMMANDS:
        raise SystemExit(f"There is no command {name!r}.\n\n{usage()}")
    folder = scripts()
    os.environ[PROGRAM] = f"detectax {name}"
    sys.argv = [f"detectax {name}", *rest]
    sys.path.insert(0, str(folder))  # scripts import shared modules from their own folder
    runpy.run_path(str(folder / f"{COMMANDS[name][0]}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
