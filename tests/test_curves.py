"""Curves of a training run: the page, and the values that trackers receive."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from detectax_eqx import data, report

from . import tiny_train
from .tiny_train import grouped


def content_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def curves_of(page):
    charts = content_of(page)["charts"]
    return {chart["title"]: {curve["name"]: curve for curve in chart["curves"]} for chart in charts}


@pytest.fixture
def metrics(tmp_path):
    """1,200 logged steps and two evaluations, the first of which has no AP."""
    lines = [
        {"step": k, "epoch": k / 600, "rate": 0.1, "loss": 2 * k, "loss_box": k if k != 3 else None, "gradient_norm": 1}
        for k in range(1, 1201)
    ]
    lines.insert(600, {"step": 600, "epoch": 1.0, "bbox_AP": -1.0, "bbox_AR100": 0.5})
    lines.append({"step": 1200, "epoch": 2.0, "bbox_AP": 0.25, "bbox_AR100": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1201, "lo')
    return path


def test_curves_are_means_of_blocks_without_what_is_undefined(metrics, tmp_path):
    page = tmp_path / "curves.html"
    report.write_curves(page, metrics, total_steps=2400, running=True)
    curves = curves_of(page)
    assert {title: list(names) for title, names in curves.items()} == {
        "Loss": ["loss", "loss_box"],
        "COCO metrics": ["bbox_AP"],
        "Learning rate": ["rate"],
        "Gradient norm": ["gradient_norm"],
    }
    loss = curves["Loss"]["loss"]
    assert len(loss["xs"]) == 400 and loss["xs"][:2] == [2, 5] and loss["ys"][:2] == [4, 10]
    assert curves["Loss"]["loss_box"]["xs"][:2] == [2.3, 6]  # of steps 1, 2, 4, and 5, 6, 7
    assert curves["COCO metrics"]["bbox_AP"] == {"name": "bbox_AP", "xs": [1200], "ys": [0.25]}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "total, running, subtitle, reloads",
    [
        (2400, True, "step 1,200 of 2,400", True),
        (2400, False, "step 1,200 of 2,400, stopped", False),
        (1200, False, "step 1,200 of 1,200", False),
    ],
)
def test_a_page_reloads_while_the_run_goes_on(total, running, subtitle, reloads, metrics, tmp_path):
    page = tmp_path / "curves.html"
    report.write_curves(page, metrics, total_steps=total, running=running)
    content = content_of(page)
    assert content["subtitle"] == subtitle and (content["reload"] is not None) == reloads


def test_a_run_without_metrics_yet(tmp_path):
    report.write_curves(tmp_path / "curves.html", tmp_path / "metrics.jsonl", total_steps=10, running=True)
    assert content_of(tmp_path / "curves.html")["charts"] == []


class FakeWriter:
    """The part of tensorboardX's SummaryWriter that is used."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    from _track import Trackers

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=FakeWriter))
    with Trackers(grouped(output=tmp_path, track=("tensorboard",)), start=4) as trackers:
        trackers.log("train", {"loss": 1.5}, 5)
        trackers.log("val", {"bbox_AP": 0.5, "bbox_APs": -1.0}, 6)  # no small objects
    writer = FakeWriter.made.pop()
    assert writer.scalars == [("train/loss", 1.5, 5), ("val/bbox_AP", 0.5, 6)] and writer.closed
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 5


def test_wandb_resumes_the_run_of_a_folder(tmp_path, monkeypatch):
    from _track import Trackers

    begun = []

    def init(**settings):
        run = SimpleNamespace(settings=settings, logged=[], finished=False)
        run.log = lambda values, step: run.logged.append((values, step))
        run.finish = lambda: setattr(run, "finished", True)
        begun.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    options = grouped(output=tmp_path / "mine", track=("wandb",), lr=0.5)
    for start in (0, 4):
        with Trackers(options, start=start) as trackers:
            trackers.log("train", {"loss": 1.5}, start + 1)
    assert begun[0].settings["id"] == begun[1].settings["id"] and all(run.finished for run in begun)
    assert begun[0].logged == [({"train/loss": 1.5}, 1)]
    settings = begun[1].settings
    assert settings["name"] == "mine" and settings["resume"] == "allow" and settings["config"]["lr"] == 0.5
    json.dumps(settings["config"])


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    from _track import Trackers

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"--track {name} needs the package {package}.*detectax_eqx\[track\]"):
        Trackers(grouped(output=tmp_path, track=(name,)), start=0)


@pytest.mark.slow
def test_a_run_draws_its_curves_and_gives_its_options_to_another(tmp_path):
    """`--options options.json` restores every option of that run except the output folder."""
    from _options import flat
    from _resume import given_before

    for part in ("train", "val"):
        data.write_shapes_dataset(tmp_path / part, num_images=4, seed=0, image_size=(64, 64))
    options = ("--epochs", "1", "--warmup-steps", "1", "--seed", "3")
    first = tiny_train.start(tmp_path, tmp_path / "first", *options, XLA_FLAGS="")
    (text,), (status,) = tiny_train.finish(first)
    assert status == 0, text
    curves = curves_of(tmp_path / "first/curves.html")
    assert curves["Loss"]["loss"]["xs"] == [1, 2] and curves["COCO metrics"]["bbox_AP"]["xs"] == [2]
    assert content_of(tmp_path / "first/curves.html")["reload"] is None

    saved = json.loads((tmp_path / "first/options.json").read_text())
    before = given_before(["--options", str(tmp_path / "first/options.json"), "--output", "second"])
    assert before is not None
    again = json.loads(json.dumps(flat(before) | {"output": str(tmp_path / "first")}, default=str))
    assert again == saved and saved["seed"] == 3 and saved["epochs"] == 1
    with pytest.raises(SystemExit, match="--options is for a new run"):
        given_before(["--options", str(tmp_path / "first/options.json"), "--output", "first", "--resume"])


@pytest.mark.parametrize(
    "content, words", [('{"images": []}', "it holds no option"), ('{"lr": "fast"}', '"lr" is .fast')]
)
def test_another_file_is_no_options(content, words, tmp_path):
    from _resume import given_before

    (tmp_path / "options.json").write_text(content)
    with pytest.raises(SystemExit, match=rf"options.json is not what train.py writes \({words}"):
        given_before(["--options", str(tmp_path / "options.json"), "--output", "x"])


RECIPES = sorted((Path(__file__).parents[1] / "experiments/recipes").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_train_every_stage_of_their_detector(path):
    from _options import architecture, check_model, check_promise, complete, flat, with_own_sizes
    from _resume import given_before

    options = given_before(["--options", path.stem])
    assert (
        options is not None
        and json.loads(path.read_text()).items() <= json.loads(json.dumps(flat(options), default=str)).items()
    )
    model = architecture(options).shapes(80)
    options = with_own_sizes(options, model)
    check_model(options, model)
    check_promise(options, 1844)
    assert options.architecture.trainable_layers == len(model.backbone.stages)
    side = max(model.preprocessing.limits.values())
    assert options.sizes.canvases == ((side, side),)
    assert flat(complete(options, 1844)) == flat(options) | {"norm": "group"}


def test_an_unknown_recipe_lists_those_there_are():
    from _resume import given_before

    with pytest.raises(
        SystemExit, match="--options is vit: there is no such file, and recipes are rf_detr, swin_b, swin_l, vitdet_b"
    ):
        given_before(["--options", "vit"])
