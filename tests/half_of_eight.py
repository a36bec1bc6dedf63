"""What either of the two processes of test_scaling.py does: five steps together with the other."""

import sys
from pathlib import Path

import jax
import jax.random as jr


sys.path.insert(0, str(Path(__file__).parents[1]))


def main(address, index, output):
    """Trains with pieces of the parameters everywhere; the first process writes the whole to a file."""
    jax.distributed.initialize(address, 2, int(index))
    from detectax_eqx import models, train, weights
    from tests.tiny_detector import IMAGES, build, loss, make_batch

    mesh = train.make_mesh(model=8)
    rows = train.local_rows(mesh, IMAGES)
    assert len(rows) == IMAGES // 2
    model, optimizer = build(), train.sgd(0.02)
    trainable = models.trainable(model)
    step = train.make_train_step(loss, optimizer, trainable=trainable, mesh=mesh)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1), ema=True)
    state = train.shard_state(state, mesh)
    for k in range(5):
        mine = jax.tree.map(lambda x: x[rows], make_batch(k))
        state, _ = step(state, train.shard_batch(mine, mesh))
    whole = train.to_host(state)
    if index == "0":
        weights.save_safetensors((whole.model, whole.opt_state, whole.ema), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
