"""Checkpoints: every file damaged, and indexes with wrong content under a correct checksum."""

import copy
import json
import math
import shutil
from functools import cache
from tempfile import mkdtemp

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import train
from detectax_eqx.train import _checkpoint

from . import Case, damage


TREE = {"w": jnp.arange(300.0), "n": jnp.arange(40, dtype=jnp.int32), "key": jr.key(3)}
METADATA = {"categories": [{"id": 1, "name": "cat"}]}
VALUES = {
    "missing": None,
    "null": None,
    "text": "x",
    "-1": -1,
    "10^30": 10**30,
    "NaN": math.nan,
    "list": [],
    "object": {},
}
FIELDS = [
    ("content",),
    ("crc32",),
    *[("content", field) for field in ("metadata", "leaves")],
    ("content", "leaves", "w"),
    *[("content", "leaves", "w", field) for field in ("shape", "dtype")],
]


@cache
def whole():
    """A checkpoint to copy."""
    return train.save_checkpoint(mkdtemp(), TREE, step=1, metadata=METADATA)


def load(path):
    tree, metadata = train.load_checkpoint(path, TREE)
    return tree, metadata


def check(result):
    tree, metadata = result
    for name, leaf in TREE.items():
        saved, loaded = (jr.key_data(x) if name == "key" else x for x in (leaf, tree[name]))
        np.testing.assert_array_equal(saved, loaded)
    assert metadata in (METADATA, {})  # under a correct checksum, any object may have been saved
    return "harmless"


def make(change, folder):
    path = folder / "00000001"
    shutil.copytree(whole(), path)
    change(path)
    return lambda: load(path)


def cases():
    names = sorted(str(file.relative_to(whole())) for file in whole().rglob("*") if file.is_file())
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        for what, content in damage((whole() / name).read_bytes(), rng, flips=8, cuts=2):
            yield case(f"file {number} {what}", lambda path, n=name, c=content: (path / n).write_bytes(c), check)
        others = {
            "missing": lambda path, n=name: (path / n).unlink(),
            "a folder": lambda path, n=name: ((path / n).unlink(), (path / n).mkdir()),
            "a link to itself": lambda path, n=name: ((path / n).unlink(), (path / n).symlink_to(path / n)),
            "another": lambda path, n=name, o=names[number - 1]: shutil.copy(path / o, path / n),
        }
        for what, change in others.items():
            yield case(f"file {number} is {what}", change, check)
    for field in FIELDS:
        for what, value in VALUES.items():
            yield case(
                f"index, with a right checksum: {'.'.join(field)} is {what}",
                lambda path, f=field, v=value, m=what == "missing": edit_index(path, f, v, m),
                check,
            )


def case(what, change, check):
    return Case(f"checkpoint: {what}", lambda folder: make(change, folder), ("00000001",), check)


def edit_index(path, field, value, missing):
    index = json.loads((path / "index.json").read_text())
    at = index
    for key in field[:-1]:
        at = at[key]
    if missing:
        del at[field[-1]]
    else:
        at[field[-1]] = copy.deepcopy(value)
    if field[0] == "content" and "content" in index:
        index["crc32"] = _checkpoint._checksum(index["content"])
    (path / "index.json").write_text(json.dumps(index))
