"""K-shot and base-to-novel protocols: what each trains on and is judged by, with seeds and intervals."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.method_table import interval
from clip_har_jax.pipelines.protocols import base_to_novel, few_shot
from clip_har_jax.pipelines.tuning import Space
from tests.support.model_folders import write_images, write_model

ROOT = Path(__file__).parents[2]
LABELS = ("cycling", "dancing", "running", "sleeping", "walking")
SPACE = Space((1.0,), ())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        test = write_images(root / "test", LABELS, per_class=2)
        yield write_model(root / "model"), write_images(root / "images", LABELS, per_class=8), f"folder:{test}"


def config_for(folders):
    return make_config(
        {
            "data": {"train": f"folder:{folders[1]}", "val_fraction": 0.25},
            "model": {"name": str(folders[0])},
            "train": {"num_steps": 2, "global_batch_size": 8},
            "eval": {"every_steps": 2, "batch_size": 8},
        }
    )


@pytest.mark.slow
def test_few_shot_compares_by_number_of_examples(folders, tmp_path):
    table = few_shot(config_for(folders), ["zero_shot", "linear_probe"], [0, 1], tmp_path, folders[2], SPACE, [1, 4])
    assert table["zero_shot"]["1"][0] == table["zero_shot"]["4"][0]
    for count in (1, 4):
        cells = json.loads((tmp_path / f"shots_{count}" / "compare.json").read_text())["cells"]
        probes = [cell for cell in cells if cell["method"] == "linear_probe"]
        mean, half = table["linear_probe"][str(count)]
        assert (mean, half) == pytest.approx(interval([cell["top1"] for cell in probes]))
        for cell in probes:
            folder = next((tmp_path / f"shots_{count}" / "cells" / "linear_probe" / f"seed_{cell['seed']}").iterdir())
            config = json.loads((folder / "run" / "config.json").read_text())
            assert config["data"]["shots"] == count and config["seed"] == cell["seed"]
    text = (tmp_path / "few_shot.md").read_text()
    assert "| method | 1 shots | 4 shots |" in text and "2 seeds" in text and "±" in text


def test_base_to_novel_judges_both_halves(folders, tmp_path):
    methods = ["zero_shot", "linear_probe"]
    table = base_to_novel(config_for(folders), methods, [0], tmp_path, folders[2], SPACE, 2)
    facts = json.loads((tmp_path / "base_to_novel.json").read_text())
    assert facts["base"] == list(LABELS[:3]) and facts["novel"] == list(LABELS[3:])
    assert table["linear_probe"]["novel"] is None and table["linear_probe"]["harmonic"] is None
    base, novel = (table["zero_shot"][half][0] for half in ("base", "novel"))
    assert table["zero_shot"]["harmonic"] == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0)
    assert "| `linear_probe` | " in (tmp_path / "base_to_novel.md").read_text()
    cells = json.loads((tmp_path / "base" / "compare.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == set(methods)


@pytest.mark.parametrize("shots", [[], [2, 2], [0]])
def test_numbers_of_examples_that_do_not_fit(folders, tmp_path, shots):
    with pytest.raises(UserError, match=r"--shots=.*numbers from 1 are needed, none of them twice"):
        few_shot(config_for(folders), ["zero_shot"], [0], tmp_path, folders[2], SPACE, shots)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shots=2"], "--shots goes with --protocol=few_shot or base_to_novel"),
        (["--protocol=base_to_novel", "--shots=2,4"], "base_to_novel takes one number"),
        (["--protocol=few_shot", "--soups"], "--soups goes with --protocol=all alone"),
    ],
)
def test_flags_that_do_not_go_together(folders, tmp_path, monkeypatch, flags, said):
    path = ROOT / "scripts" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_script", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = [str(path), f"--config={ROOT / 'configs' / 'compare.py'}", "--methods=zero_shot", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*command, f"--config.data.train=folder:{folders[1]}", *flags])
    with pytest.raises(UserError, match=said):
        script.main()
