"""Methods x seeds: a search alike for all, cells that stay, a table of what was measured; finetune.py's choices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from clip_har_jax.config import load_config, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.method_table import make_table, summarize
from clip_har_jax.models.pretrained import read_config
from clip_har_jax.pipelines import tuning
from clip_har_jax.pipelines.method_comparison import compare_methods, default_test
from clip_har_jax.pipelines.presets import choose_preset
from clip_har_jax.pipelines.tuning import (
    Needs,
    Space,
    fingerprints,
    finished,
    search,
    training_needs,
    with_method,
)
from clip_har_jax.trainer.result import Result
from clip_har_jax.trainer.run_data import validates_on_test
from clip_har_jax.trainer.train import train
from tests.support.model_folders import write_image, write_images, write_model

LABELS = ("cycling", "running", "sleeping")


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    return write_model(root / "model"), write_images(root / "images", LABELS, per_class=8)


def config_for(folders):
    return make_config(
        {
            "data": {"train": f"folder:{folders[1]}", "val_fraction": 0.25},
            "model": {"name": str(folders[0])},
            "train": {"num_steps": 2, "global_batch_size": 8},
            "retention": {"data": f"folder:{folders[1]}", "max_drop": 1.0},
            "eval": {"every_steps": 2, "batch_size": 8},
        }
    )


@pytest.mark.slow
def test_a_comparison_is_searched_resumed_and_tabulated(folders, tmp_path, monkeypatch):
    config, test = config_for(folders), f"folder:{write_images(tmp_path / 'test', LABELS, per_class=4)}"
    space = Space((1.0, 100.0), (0.0,))
    tmp_path = tmp_path / "output"
    arguments = (config, ["zero_shot", "linear_probe", "lora"], [0, 1], tmp_path, test, space)
    rows = compare_methods(*arguments, soups=True)
    assert [row["method"] for row in rows] == ["zero_shot", "linear_probe", "lora", "lora, soup"]
    table = (tmp_path / "compare.md").read_text()
    assert table.count("\n| `") == 4
    assert "learning rates 1e-05, 0.001 with weight decay 0.1" in table
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "compare.json").read_text())["search"]
    assert found["zero_shot"] == found["linear_probe"] == []
    tried = {(each["learning_rate"], each["weight_decay"]): each for each in found["lora"]}
    chosen = tuple(rows[2]["settings"].values())
    assert list(tried) == [(1e-5, 0.1), (1e-3, 0.1), (chosen[0], 0.0)]
    assert tried[chosen]["val_top1"] == max(each["val_top1"] for each in tried.values())
    assert set(rows[1]["fits"][0]) == {"penalty"}
    assert rows[0]["step_bytes"] is None
    assert rows[2]["step_bytes"] > rows[1]["step_bytes"] > 0
    assert not list(tmp_path.glob("search/**/run"))

    def fail(*_, **__):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(tuning, "train", fail)
    assert compare_methods(*arguments) == rows[:3]
    with pytest.raises(UserError, match="another config"):
        compare_methods(config, ["lora"], [0], tmp_path, "synthetic", space)


def test_the_search_looks_at_validation_alone(folders, tmp_path, monkeypatch):
    """Rates first, then decays at the best rate; equal accuracies are told apart by the likelihood."""
    seen, quality = (
        [],
        {(1e-5, 0.1): (0.5, 1.0), (1e-4, 0.1): (0.7, 0.9), (1e-3, 0.1): (0.7, 0.8), (1e-3, 0.0): (0.7, 0.7)},
    )

    def trained(config, workdir, quiet):
        workdir.mkdir(parents=True)
        seen.append(config)
        top1, nll = quality[config.optim.learning_rate, config.optim.weight_decay]
        folder = epath.Path(workdir)
        return Result(folder, folder, 2, {"top1": top1, "nll": nll}, {}, seconds=1.0, exit_code=0)

    monkeypatch.setattr(tuning, "train", trained)
    space = Space((1.0, 10.0, 100.0), (0.0, 0.1))
    config = config_for(folders)
    chosen, tried = search(config, Needs(1, has_decay=True), tmp_path, space)
    assert chosen == (1e-3, 0.0)
    assert len(tried) == len(seen) == 4
    assert not any(each.retention.data for each in seen)
    assert search(config, Needs(1, has_decay=True), tmp_path, space)[0] == chosen
    (picture,) = (Path(config.data.train.removeprefix("folder:")) / LABELS[0]).glob("0.png")
    before = picture.read_bytes()
    write_image(picture, seed=999)
    with pytest.raises(UserError, match=r"tried\.json: data\.train changed since it was made"):
        search(config, Needs(1, has_decay=True), tmp_path, space)
    picture.write_bytes(before)
    assert search(config, Needs(1, has_decay=False), tmp_path, space)[0] == (1e-3, 0.1)
    assert len(seen) == 4  # what is tried is kept


def test_intervals_are_students():
    same: dict[str, Any] = {
        "retained": None,
        "ece": 0.1,
        "settings": {},
        "fit": {},
        "trainable_parameters": 1,
        "optimizer_bytes": 1,
    }
    row = summarize("full", [same | {"top1": x, "step_bytes": 1, "seconds": 1.0} for x in (0.5, 0.6, 0.7)])
    np.testing.assert_allclose(row["target"], (0.6, 4.303 * 0.1 / np.sqrt(3)), rtol=1e-3)
    assert row["retained"] is None
    many = summarize("full", [same | {"top1": x, "step_bytes": 1, "seconds": 1.0} for x in np.linspace(0, 1, 11)])
    half = 2.228 * np.linspace(0, 1, 11).std(ddof=1) / np.sqrt(11)
    np.testing.assert_allclose(many["target"], (0.5, half), rtol=1e-3)
    one = summarize("full", [same | {"top1": 0.5, "step_bytes": 1, "seconds": 1.0}])
    assert one["target"] == (0.5, None)
    assert "| `full` | 50.0 | - | 10.0 |" in make_table([one], "")


def test_a_run_warns_when_test_images_choose_what_is_kept(folders, tmp_path, capsys):
    root = tmp_path / "images"
    for split, count in (("train", 4), ("test", 2)):
        write_images(root / split, LABELS, per_class=count)
    config = with_method(config_for(folders), "zero_shot", 0)
    config = replace(config, data=replace(config.data, train=f"folder:{root}", val=f"folder:{root}"))
    train(config, tmp_path / "run")
    assert f"warning: config.data.val=folder:{root} has no validation images" in capsys.readouterr().err
    # held out; asked for; a folder without splits
    for val in ("", f"folder:{root}?split=test", f"folder:{folders[1]}"):
        assert not validates_on_test(replace(config, data=replace(config.data, val=val)))
    write_images(root / "val", LABELS, per_class=1)
    assert not validates_on_test(config)


@pytest.mark.parametrize(
    ("train_spec", "val", "test"),
    [
        ("synthetic", "synthetic?split=val", "synthetic"),
        ("folder:photos", "", "folder:photos"),
        ("manifest:m.parquet", "manifest:m.parquet?split=val&images=photos", "manifest:m.parquet?images=photos"),
    ],
)
def test_the_test_split_of_the_validation_data_decides_where_none_is_named(train_spec, val, test):
    assert default_test(make_config({"data": {"train": train_spec, "val": val}})) == test


def test_what_chooses_a_model_is_no_test(folders, tmp_path):
    config = config_for(folders)
    same, other = f"folder:{folders[1]}", f"folder:{write_images(tmp_path / 'val', LABELS, per_class=2)}"
    validated = replace(config, data=replace(config.data, val=other))
    for test, key in ((same, "train"), (other, "val")):
        with pytest.raises(UserError, match=f"the same images as config.data.{key}"):
            compare_methods(validated, ["full"], [0], tmp_path / "output", test, Space((1.0,), ()))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        (["ful"], [0], "did you mean 'full'"),
        (["full", "full"], [0], "none of them twice"),
        (["full"], [], "one or more"),
    ],
)
def test_mistakes_are_refused(folders, tmp_path, methods, seeds, message):
    with pytest.raises(UserError) as error:
        compare_methods(config_for(folders), methods, seeds, tmp_path, "synthetic", Space((1.0,), ()))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_step_of_fewer_trained_parameters_takes_less_memory(folders):
    clip = read_config(folders[0])
    needs = {
        name: training_needs(with_method(config_for(folders), name, 0), clip)
        for name in ("full", "prompt", "zero_shot")
    }
    full, prompt = needs["full"].step_bytes, needs["prompt"].step_bytes
    assert full is not None and prompt is not None and full > prompt > 0
    assert [needs[name].has_decay for name in needs] == [True, False, False]
    assert needs["zero_shot"].step_bytes is None


def test_a_finished_run_over_images_that_changed_is_refused(folders, tmp_path):
    images, done = write_images(tmp_path / "images", LABELS, per_class=4), tmp_path / "cell.json"
    config, test = config_for((folders[0], images)), f"folder:{images}"
    before = fingerprints(config, test)
    done.write_text(json.dumps({"config_hash": config.digest, "data": before, "test": test, "top1": 0.5}))
    cell = finished(done, config, fingerprints(config, test), test=test)
    assert cell is not None and cell["top1"] == 0.5
    path = next(images.rglob("*.png"))
    write_image(path, seed=99)
    with pytest.raises(UserError, match="test changed since it was made; use another"):
        finished(done, config, fingerprints(config, test), test=test)


def test_presets_go_by_size():
    assert choose_preset(60, 4.0) == choose_preset(500_000, 16.0) == "few_shot"
    assert choose_preset(9_999, 40.0) == "small"
    assert choose_preset(10_000, 40.0) == "large"


def test_finetune_chooses_says_why_and_leaves_what_was_set(folders, capsys):
    overrides = [f"--config.data.train=folder:{folders[1]}", f"--config.model.name={folders[0]}"]
    config = load_config(
        "configs/finetune.py", [*overrides, "--config.train.num_epochs=2.0", "--config.train.patience=0"]
    )
    said = capsys.readouterr().out
    assert "preset 'few_shot': the median class has 6 training images, at most 16" in said
    assert "train.num_epochs=2.0 (as you set it), train.patience=0 (as you set it)" in said
    assert "method.name=lora, optim.learning_rate=0.0002" in said
    assert config.method.name == "lora"
    assert config.train.num_epochs == 2.0
    assert config.train.global_batch_size == 8
    other = load_config("configs/finetune.py", [*overrides, "--config.method.name=linear_probe"])
    assert other.method.name == "linear_probe"
    with pytest.raises(UserError, match="/nowhere"):
        load_config("configs/finetune.py", ["--config.data.train=folder:/nowhere"])
