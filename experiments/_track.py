"""Metrics for experiment trackers: TensorBoard and Weights & Biases."""

import importlib
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from _options import Options, flat


# The package that each tracker needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Trackers:
    """A context manager that passes metrics on to the trackers of `--track`, in the first of several processes.

    - `start`: the step that the run starts at; what was logged for later steps is superseded.
    """

    def __init__(self, options: Options, *, start: int):
        self._options, self._start = options, start
        self._logs: list[Callable[[dict[str, float], int], None]] = []
        names = options.logging.track if jax.process_index() == 0 else ()
        self._modules = {name: load_package(name) for name in names}

    def __enter__(self) -> "Trackers":
        with ExitStack() as stack:
            for name, module in self._modules.items():
                self._logs.append(STARTERS[name](module, self._options, self._start, stack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Passes on values as `kind/name`, without undefined COCO metrics. `kind` is `train` or `val`."""
        defined = {f"{kind}/{name}": value for name, value in values.items() if kind == "train" or value >= 0}
        for log in self._logs:
            log(defined, step)


def load_package(tracker: str) -> Any:
    """The module of a tracker."""
    try:
        return importlib.import_module(PACKAGES[tracker])
    except ImportError as error:
        raise SystemExit(
            f"--track {tracker} needs the package {PACKAGES[tracker]} ({error}). Install it with `pip install "
            "'detectax_eqx[track]'`, or leave --track out."
        ) from None


def start_tensorboard(module: Any, options: Options, start: int, stack: ExitStack) -> Callable[..., None]:
    """Opens an event file in `tensorboard/` of the run's folder."""
    writer = module.SummaryWriter(str(options.run.output / "tensorboard"), purge_step=start + 1)
    stack.callback(writer.close)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log


def start_wandb(module: Any, options: Options, start: int, stack: ExitStack) -> Callable[..., None]:
    """Starts a run of Weights & Biases, or resumes the one whose id is in the run's folder."""
    folder = options.run.output / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "id.txt"
    if start == 0 or not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    config = {name: str(value) if isinstance(value, Path) else value for name, value in flat(options).items()}
    run = module.init(
        project="detectax_eqx",
        name=options.run.output.resolve().name,
        id=file.read_text(),
        dir=str(options.run.output),
        config=config,
        resume="allow",
    )
    stack.callback(run.finish)
    return lambda values, step: run.log(values, step=step)


STARTERS: dict[str, Callable[..., Callable[..., None]]] = {"tensorboard": start_tensorboard, "wandb": start_wandb}
