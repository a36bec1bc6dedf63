"""Compiler options for XLA."""

import jax

from ._plain import is_plain


# XLA's default schedule on CPU runs everything as early as possible and keeps the results. It takes a fifth more memory
# and no less time, and gradient checkpointing then saves little.
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def step_compiler_options() -> dict[str, str | bool]:
    """Returns the XLA options that `make_train_step` compiles with. Pass them if your own program contains the step.

    >>> isinstance(step_compiler_options(), dict)
    True
    """
    return CPU_OPTIONS if jax.default_backend() == "cpu" and not is_plain("options") else {}


def convolution_options() -> dict[str, bool]:
    """Returns XLA options for programs with convolutions: `jax.jit(f, compiler_options=convolution_options())`.

    On Hopper and later GPUs, XLA lays out maps channels last, as tensor cores require. In full float32
    (`jax_default_matmul_precision` is "highest"), tensor cores are not used and cuDNN would transpose the maps of each
    convolution back and forth, so the options request channels first. Otherwise the result is empty.

    >>> isinstance(convolution_options(), dict)
    True
    """
    full = jax.config.jax_default_matmul_precision in ("highest", "float32")  # type: ignore[attr-defined]
    channels_first = full and jax.default_backend() == "gpu" and not is_plain("options")
    return {"xla_gpu_force_conv_nchw": True} if channels_first else {}
