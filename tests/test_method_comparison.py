"""Methods x seeds: finished cells stay, the table says what was measured; finetune.py chooses by the data's size."""

import json

import numpy as np
import pytest
from model_folders import write_images, write_model

from clip_har_jax.config import load_config, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines import compare as compare_module
from clip_har_jax.pipelines.compare import compare, summarize
from clip_har_jax.pipelines.presets import choose_preset

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
def test_a_comparison_is_resumed_and_tabulated(folders, tmp_path, monkeypatch):
    config, test = config_for(folders), f"folder:{folders[1]}"
    arguments = (config, ["zero_shot", "bitfit"], [0, 1], tmp_path, test, [1.0])
    rows = compare(*arguments, soups=True)
    assert [row["method"] for row in rows] == ["zero_shot", "bitfit", "bitfit, soup"]
    table = (tmp_path / "compare.md").read_text()
    assert table.count("\n| `") == 3
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    cell = json.loads((tmp_path / "cells/bitfit/seed_1/rate_0.0001/cell.json").read_text())
    assert cell["trainable_parameters"] == rows[1]["trainable_parameters"] > 0

    def fail(*_, **__):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(compare_module, "train", fail)
    again = compare(*arguments)
    assert again == rows[:2]
    with pytest.raises(UserError, match="another config"):
        compare(config_for((folders[0], folders[1])), ["bitfit"], [0], tmp_path, "synthetic", [1.0])


def test_intervals_are_students():
    cells = [
        {"top1": x, "retained": None, "ece": 0.1, "learning_rate": 1.0, "trainable_parameters": 1, "optimizer_bytes": 1}
        | {"seconds": 1.0}
        for x in (0.5, 0.6, 0.7)
    ]
    row = summarize("full", cells)
    np.testing.assert_allclose(row["target"], (0.6, 4.303 * 0.1 / np.sqrt(3)), rtol=1e-3)
    assert row["retained"] is None


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
        compare(config_for(folders), methods, seeds, tmp_path, "synthetic", [1.0])
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_presets_go_by_size():
    assert choose_preset(60, 4.0) == choose_preset(500_000, 16.0) == "few_shot"
    assert choose_preset(9_999, 40.0) == "small"
    assert choose_preset(10_000, 40.0) == "large"


def test_finetune_chooses_says_why_and_leaves_what_was_set(folders, capsys):
    overrides = [f"--config.data.train=folder:{folders[1]}", f"--config.model.name={folders[0]}"]
    config = load_config("configs/finetune.py", [*overrides, "--config.train.num_epochs=2.0"])
    said = capsys.readouterr().out
    assert "preset 'few_shot': the median class has 7 images, at most 16" in said
    assert config.method.name == "lora"
    assert config.train.num_epochs == 2.0
    assert config.train.global_batch_size == 8
    other = load_config("configs/finetune.py", [*overrides, "--config.method.name=linear_probe"])
    assert other.method.name == "linear_probe"
    with pytest.raises(UserError, match="/nowhere"):
        load_config("configs/finetune.py", ["--config.data.train=folder:/nowhere"])
