"""Training: state, step, sharding, augmentation, learning rates, optimisers and checkpoints.

The training loop itself is in the scripts.
"""

from .._xla import step_compiler_options as step_compiler_options
from ._augment import augment as augment, jitter_colors as jitter_colors
from ._checkpoint import (
    CheckpointError as CheckpointError,
    DamagedCheckpointError as DamagedCheckpointError,
    Restored as Restored,
    latest_checkpoint as latest_checkpoint,
    load_checkpoint as load_checkpoint,
    load_latest_checkpoint as load_latest_checkpoint,
    remove_unfinished as remove_unfinished,
    save_checkpoint as save_checkpoint,
)
from ._lock import lock_folder as lock_folder
from ._optimizers import adamw as adamw, no_vectors as no_vectors, sgd as sgd
from ._saver import CheckpointSaver as CheckpointSaver
from ._schedules import (
    scale_learning_rate as scale_learning_rate,
    warmup_cosine as warmup_cosine,
    warmup_multistep as warmup_multistep,
)
from ._sharding import (
    local_rows as local_rows,
    make_mesh as make_mesh,
    num_parts as num_parts,
    shard_batch as shard_batch,
    shard_state as shard_state,
    state_shardings as state_shardings,
    to_host as to_host,
)
from ._state import TrainState as TrainState, init_train_state as init_train_state
from ._step import METRICS as METRICS, TrainStep as TrainStep, make_train_step as make_train_step
