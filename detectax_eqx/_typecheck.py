"""The type checker that the import hook applies to every function and module of the package."""

from beartype import BeartypeConf, beartype


# `is_pep484_tower`: an `int` passes where a `float` is asked for, so that `spatial_scale=1` works.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
