"""What either of the two processes of test_sharding.py does: train and evaluate together with the other."""

import json
import sys
from pathlib import Path

import jax
import jax.random as jr


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]


def detections(model, annotations, images):
    """What a model finds in a dataset, in COCO's format."""
    from _shared import Detector, detect_dataset

    from detectax_eqx import data

    dataset = data.load_coco(annotations, images)
    return detect_dataset(Detector(model, dataset.categories, 64, 64, ((64, 64),)), dataset, score_threshold=0.2)


def main(coordinator, index, annotations, images, output):
    """Five steps with pieces of the parameters everywhere, then an evaluation of their average."""
    jax.distributed.initialize(coordinator, 2, int(index))
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
    found = detections(whole.ema, annotations, images)
    if index == "0":
        weights.save_safetensors((whole.model, whole.opt_state, whole.ema), f"{output}.safetensors")
        Path(f"{output}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
