"""Options that XLA compiles programs with."""

import jax

from ._plain import is_plain


# XLA's default schedule on CPU starts everything as early as possible and holds the results: a fifth more memory, no
# less time, and gradient checkpointing saves little.
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def step_compiler_options() -> dict[str, str | bool]:
    """Options of XLA that `make_train_step` compiles with; pass them on where a program of your own contains the step.

    >>> isinstance(step_compiler_options(), dict)
    True
    """
    return CPU_OPTIONS if jax.default_backend() == "cpu" and not is_plain("options") else {}


def convolution_options() -> dict[str, bool]:
    """Options of XLA that suit a program with convolutions: `jax.jit(f, compiler_options=convolution_options())`.

    On GPUs from Hopper on, XLA lays maps out channels last, as tensor cores want them. In full float32
    (`jax_default_matmul_precision` is "highest") tensor cores are not used, and cuDNN would transpose the maps of each
    convolution back and forth: there the options ask for channels first. Elsewhere there are none.

    >>> isinstance(convolution_options(), dict)
    True
    """
    full = jax.config.jax_default_matmul_precision in ("highest", "float32")  # type: ignore[attr-defined]
    wanted = full and jax.default_backend() == "gpu" and not is_plain("options")
    return {"xla_gpu_force_conv_nchw": True} if wanted else {}
