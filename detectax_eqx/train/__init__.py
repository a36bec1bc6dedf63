"""Training: state, step, sharding, augmentation, learning rates, optimisers, checkpoints. The loop is the script's."""

from ._augment import augment as augment, jitter_colors as jitter_colors
from ._checkpoint import (
    latest_checkpoint as latest_checkpoint,
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from ._optimizers import adamw as adamw, sgd as sgd
from ._schedules import (
    scale_learning_rate as scale_learning_rate,
    warmup_cosine as warmup_cosine,
    warmup_multistep as warmup_multistep,
)
from ._sharding import make_mesh as make_mesh, replicate as replicate, shard_batch as shard_batch
from ._state import TrainState as TrainState, init_train_state as init_train_state
from ._step import make_train_step as make_train_step, step_compiler_options as step_compiler_options
