"""Saving while training continues, what a failed save leaves behind, and one run per folder at a time."""

import os
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from detectax_eqx import data, models, train, zoo
from detectax_eqx.train import CheckpointError, CheckpointSaver, DamagedCheckpointError, _checkpoint

from .test_checkpoint import assert_identical


TREE = {"w": jnp.arange(1000.0), "key": jr.key(3), "step": jnp.int32(5)}


class SlowDisk:
    """A disk that writes only once `go` is set."""

    def __init__(self, monkeypatch):
        self.go, self.writes = threading.Event(), []
        write = _checkpoint.write_arrays

        def wait(path, arrays):
            self.writes.append(path.parent.name)
            assert self.go.wait(30)
            write(path, arrays)

        monkeypatch.setattr(_checkpoint, "write_arrays", wait)


@pytest.fixture
def disk(monkeypatch):
    return SlowDisk(monkeypatch)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, disk):
    """The steps after a save donate the state that is being written, and do not change what is written."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros(100_000), "step": jnp.int32(0)}
    with CheckpointSaver() as saver:
        saver.save([tmp_path], state, step=0, metadata={"at": [0]})
        for _ in range(5):
            consumed, state = state, step(state)
            saver.check()
            assert consumed["w"].is_deleted()
        assert train.latest_checkpoint(tmp_path) is None
        disk.go.set()
    tree, metadata = train.load_checkpoint(tmp_path / "00000000", state)
    assert not np.asarray(tree["w"]).any() and int(tree["step"]) == 0 and metadata == {"at": [0]}


def test_one_save_at_a_time_and_none_left_out(tmp_path, disk):
    with CheckpointSaver() as saver:
        saver.save([tmp_path / "best", tmp_path / "last"], TREE, step=1, metadata={})
        second = threading.Thread(
            target=saver.save, args=([tmp_path / "last"], TREE), kwargs={"step": 2, "metadata": {}}
        )
        second.start()
        second.join(0.2)
        assert second.is_alive() and disk.writes == ["00000001.tmp"]
        disk.go.set()
        second.join()
    assert disk.writes == ["00000001.tmp", "00000001.tmp", "00000002.tmp"]
    for name in ("best/00000001", "last/00000001", "last/00000002"):
        assert_identical(train.load_checkpoint(tmp_path / name, TREE)[0], TREE)


def test_the_error_of_a_save_reaches_the_next_call(tmp_path, monkeypatch):
    def fail(path, arrays):
        (path / "half").parent.mkdir()
        (path / "half").write_bytes(bytes(1000))
        raise OSError(28, "No space left on device")

    def again(saver):
        saver.save([tmp_path], TREE, step=3, metadata={})

    train.save_checkpoint(tmp_path, TREE, step=1, metadata={})
    monkeypatch.setattr(_checkpoint, "write_arrays", fail)
    message = r"Cannot save checkpoint .*00000002: No space left on device\. Earlier .* are unchanged\. Free disk space"
    for call in (CheckpointSaver.wait, CheckpointSaver.__exit__, again):
        saver = CheckpointSaver()
        saver.save([tmp_path], TREE, step=2, metadata={})
        with pytest.raises(CheckpointError, match=message):
            call(saver)
        saver.wait()  # it is reported only once
    saver.save([tmp_path], TREE, step=2, metadata={})
    with pytest.raises(CheckpointError, match=message):
        while True:
            saver.check()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]  # the half-written checkpoint is removed
    assert_identical(train.load_checkpoint(tmp_path / "00000001", TREE)[0], TREE)


def test_options(tmp_path):
    with CheckpointSaver() as saver:
        with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
            saver.save([tmp_path], TREE, step=1, metadata={}, keep=0)
        with pytest.raises(ValueError, match="step must not be negative, got -1"):
            saver.save([tmp_path], TREE, step=-1, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("disk", ["limited", pytest.param("full", marks=pytest.mark.long)])
def test_a_disk_without_room(tmp_path, disk, tally):
    """A limit on file size stands in for a full disk; the long form fills a real one."""
    script = """
        import sys, numpy as np
        from detectax_eqx import train
        folder, tree = sys.argv[1], {"w": np.ones(100, "f")}
        first = train.save_checkpoint(folder, tree, step=1, metadata={})
        try:
            with train.CheckpointSaver() as saver:
                saver.save([folder], {"w": np.ones(1_000_000, "f")}, step=2, metadata={})
        except train.CheckpointError as error:
            print(error)
        print(train.load_checkpoint(first, tree)[0]["w"].sum(), train.latest_checkpoint(folder).name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    if disk == "full":
        prepare, words = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}", "No space left on device"
        shell = ["unshare", "--user", "--map-root-user", "--mount", "sh"]
    else:
        prepare, words, shell = "ulimit -f 2000", "File too large", ["sh"]
    command = [*shell, "-c", f'{prepare} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if disk == "full" and done.stderr.startswith("unshare"):
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    survived = f"Cannot save checkpoint {tmp_path}/00000002: {words}." in done.stdout
    survived = survived and done.stdout.endswith("100.0 00000001\n")
    tally("full disk during a save", 1, survived, "error names checkpoint and remedy, the one before is whole")
    assert survived, done.stdout + done.stderr


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def arrays_of(checkpoint):
    """The file of a checkpoint that holds the values of "w"."""
    needle = np.asarray(TREE["w"])[500:510].tobytes()
    (file,) = [file for file in checkpoint.rglob("*") if file.is_file() and needle in file.read_bytes()]
    return file


DAMAGE = {
    "a flipped bit": (lambda path: flip_bit(arrays_of(path)), r"00000003 is damaged: leaf '\w+' cannot be read"),
    "a flipped bit of the index": (lambda path: flip_bit(path / "index.json"), r"00000003 is damaged: index\.json"),
    "missing arrays": (lambda path: arrays_of(path).unlink(), r"00000003 is damaged: leaf '\w+' cannot be read"),
    "a missing index": (lambda path: (path / "index.json").unlink(), r"00000003 is damaged: index\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, damage, tally):
    change, message = DAMAGE[damage]
    for step in (2, 3):
        train.save_checkpoint(tmp_path, TREE | {"step": jnp.int32(step)}, step=step, metadata={"step": step})
    change(tmp_path / "00000003")
    restored = train.load_latest_checkpoint(tmp_path, TREE)
    survived = restored.path == tmp_path / "00000002" and int(restored.tree["step"]) == 2 == restored.metadata["step"]
    tally(f"newest checkpoint with {damage}", 1, survived, "refused by name, the one before is used")
    assert survived
    (error,) = restored.refused
    with pytest.raises(DamagedCheckpointError, match=message):
        raise error
    change(tmp_path / "00000002")
    with pytest.raises(DamagedCheckpointError, match=r"(?s)All checkpoints in .* are damaged.*00000003.*00000002"):
        train.load_latest_checkpoint(tmp_path, TREE)


def test_a_checkpoint_of_another_model_is_no_reason_to_take_an_older_one(tmp_path):
    for step in (2, 3):
        train.save_checkpoint(tmp_path, TREE, step=step, metadata={})
    with pytest.raises(CheckpointError, match=r"00000003 does not fit: it lacks 'v'"):
        train.load_latest_checkpoint(tmp_path, TREE | {"v": jnp.zeros(2)})
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        train.load_latest_checkpoint(tmp_path / "none", TREE)


def layouts():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    cut = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {"w": jnp.arange(1000.0), "key": jr.key(3), "keys": jr.split(jr.key(1), 8), "step": jnp.int32(5)}
    spread = {"w": cut, "key": whole, "keys": cut, "step": whole}
    return {"one": tree, "copied": jax.device_put(tree, whole), "cut": jax.device_put(tree, spread)}


@pytest.mark.parametrize("saved", ["one", "copied", "cut"])
def test_a_checkpoint_fits_any_layout_on_devices(tmp_path, saved, tally):
    trees = layouts()
    path = train.save_checkpoint(tmp_path, trees[saved], step=0, metadata={})
    for like in trees.values():
        restored, _ = train.load_checkpoint(path, like)
        assert_identical(restored, like)
        same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored, like)
        tally("restored on other devices", 1, all(same.values()), "bit for bit, laid out as asked")
        assert all(same.values())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        assert_identical(train.load_checkpoint(path, shapes)[0], like)
        consume = jax.jit(lambda w: w + 1, donate_argnums=0)
        consume(restored["w"])  # restored arrays are copies of their own: a step may donate them
        assert_identical(train.load_checkpoint(path, like)[0], like)


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with train.lock_folder(folder):
        words = rf"run is in use by process {os.getpid()} on host \S+: wait for it to end, or use another folder\."
        with pytest.raises(BlockingIOError, match=words), train.lock_folder(folder):
            pass
    with train.lock_folder(folder):
        pass


def test_a_lock_dies_with_its_process(tmp_path, tally):
    script = (
        "import sys; from detectax_eqx import train\nwith train.lock_folder(sys.argv[1]): print(flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on host"), train.lock_folder(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with train.lock_folder(tmp_path):
        tally("second run in one folder", 1, True, "refused, naming process and host; free again after kill -9")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_save_stops_training_for_less_than_a_step(tmp_path, tally):
    """Mask R-CNN R50-FPN with SGD, two small images per step: a large state and a short step."""
    canvas = (160, 256)
    dataset = data.load_coco(*data.write_shapes_dataset(tmp_path / "data", num_images=2, image_size=canvas))
    buckets = data.make_buckets(dataset.sizes, canvases=[canvas], min_size=160, max_size=256)
    batch = data.Loader(dataset, batch_size=2, buckets=buckets, max_objects=6).batch(0)
    model = zoo.build("mask_rcnn_resnet50_fpn", dataset.num_classes, key=jr.key(0))
    trainable, optimizer = models.trainable(model), train.sgd(0.001)

    def loss(model, example, *, key):
        image = jnp.asarray(example.images.pixels, jnp.float32) / 255
        return model.loss(image, example.images.sizes, example.targets, key=key)

    step = train.make_train_step(loss, optimizer, trainable=trainable)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array)))
    seconds = {"step": [], "save": [], "step beside a save": [], "whole save": []}

    def clock(what, function, *arguments, **options):
        began = time.perf_counter()
        result = jax.block_until_ready(function(*arguments, **options))
        seconds[what].append(time.perf_counter() - began)
        return result

    with CheckpointSaver() as saver:
        for k in range(8):
            state, _ = clock("step" if k % 2 else "step beside a save", step, state, batch)
            if k % 2:
                began = time.perf_counter()
                clock("save", saver.save, [tmp_path / "last"], state, step=k, metadata={})
                saver.wait()
                seconds["whole save"].append(time.perf_counter() - began)
                clock("save", saver.save, [tmp_path / "last"], state, step=k, metadata={})
    seconds["step beside a save"].pop(0)  # includes compilation
    wait, alone, beside, whole = (
        statistics.median(seconds[what]) for what in ("save", "step", "step beside a save", "whole save")
    )
    figures = f"waits {wait:.2f} s of a step's {alone:.2f} s ({beside:.2f} s beside the writing); alone {whole:.2f} s"
    tally(f"saving {size / 1e6:.0f} MB while training", len(seconds["save"]), len(seconds["save"]), figures)
    assert max(seconds["save"]) < min(seconds["step"])


TOGETHER = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from detectax_eqx import train
    address, number, folder = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(number))
    mesh = jax.make_mesh((2,), ("data",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    values = np.arange(1000, dtype=np.float32)
    def lay(sharding, values=values):
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    state = {"cut": lay(cut), "whole": lay(whole)}
    with train.lock_folder(folder), train.CheckpointSaver() as saver:
        for step in (1, 2):
            saver.save([folder], state, step=step, metadata={})
    jax.experimental.multihost_utils.sync_global_devices("saved")
    blank = {name: lay(leaf.sharding, 0 * values) for name, leaf in state.items()}
    restored = train.load_latest_checkpoint(folder, blank)
    for name, leaf in restored.tree.items():
        assert leaf.sharding == state[name].sharding
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
    print(restored.path.name)
"""


@pytest.mark.long
def test_two_processes_save_and_load_what_neither_holds_whole(tmp_path, tally):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", textwrap.dedent(TOGETHER), address]
    processes = [
        subprocess.Popen([*command, str(i), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate()[0].split()[-1:] for process in processes]
    alone, _ = train.load_checkpoint(tmp_path / "00000002", {"cut": np.zeros(1000, "f"), "whole": np.zeros(1000, "f")})
    expected = np.arange(1000, dtype=np.float32)
    survived = outputs == [["00000002"]] * 2 and all(np.array_equal(leaf, expected) for leaf in alone.values())
    tally("restored on other devices", 3, 3 * survived, "bit for bit, laid out as asked")
    assert survived, outputs
