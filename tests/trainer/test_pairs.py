"""Training on image-text pairs, end to end: what it leaves, that it continues bit-equal, and that it learns."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines.retrieval import evaluate_retrieval
from clip_har_jax.pipelines.write_pairs import write_pairs
from clip_har_jax.trainer.result import Result, print_result
from clip_har_jax.trainer.run_data import load_data
from clip_har_jax.trainer.train import train
from tests.support.model_folders import write_images, write_model
from tests.support.pair_shards import write_tar
from tests.support.runs import LABELS, ROOT, StopAt, config_with, environment, finish, params_of, start_run

TEMPLATE = "a photo of a person {}."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, labelled images, and the same images as shards of pairs."""
    root = tmp_path_factory.mktemp("start")
    write_model(root / "model")
    write_images(root / "images", LABELS, per_class=8)
    write_pairs(f"folder:{root / 'images'}", root / "pairs", pairs_per_shard=6)
    return root


def config_for(root: Path, num_steps: int = 4, **sections: Any) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "data": {
            "train": f"webdataset:{root}/pairs/{{00000..00003}}.tar",
            "val": f"folder:{root}/images",
            "retrieval": f"webdataset:{root}/pairs/00000.tar",
            "shuffle_buffer": 5,
            "num_workers": 0,
        },
        "model": {"name": str(root / "model")},
        "method": {"loss": "softmax"},
        "train": {"num_steps": num_steps, "global_batch_size": 8, "log_every_steps": 1},
        "optim": {"learning_rate": 1e-3},
        "eval": {"every_steps": 4, "batch_size": 8},
        "checkpoint": {"every_steps": 2},
    }
    return config_with(values, sections)


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(config_for(folders), tmp_path_factory.mktemp("finished"), quiet=True)


def test_a_run_on_pairs_leaves_a_model_of_the_validation_s_classes(
    finished: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert not any("train/top1" in line for line in lines)
    assert [line["step"] for line in lines if "val/top1" in line] == [4]
    assert bundle.read_actions(Path(finished.model or "")).labels == LABELS
    record = json.loads((finished.workdir / "run.json").read_text())
    assert record["data"]["train"]["num_examples"] is None
    assert record["retrieval"] == finished.metrics["retrieval"]
    assert record["retrieval"]["num_pairs"] == 6
    print_result(finished)
    assert "image to text  recall@1" in capsys.readouterr().out


def test_the_recall_of_a_training_is_that_of_the_model_folder(folders: Path, finished: Result, tmp_path: Path) -> None:
    spec = f"webdataset:{folders}/pairs/00000.tar"
    found = evaluate_retrieval(str(finished.model), spec, tmp_path, batch_size=4)
    assert found == json.loads((tmp_path / "metrics.json").read_text())
    assert {name: found[name] for name in finished.metrics["retrieval"]} == finished.metrics["retrieval"]


def test_a_changed_model_is_refused_before_any_pair_is_read(finished: Result, tmp_path: Path) -> None:
    model = shutil.copytree(str(finished.model), tmp_path / "model")
    with (model / "actions.json").open("a") as file:
        file.write(" ")
    write_tar(tmp_path / "0.tar", [("a.txt", b"no image")])
    with pytest.raises(UserError, match=r"actions\.json: changed since the model was sealed"):
        evaluate_retrieval(str(model), f"webdataset:{tmp_path}/0.tar", tmp_path / "out", batch_size=4)


def test_stopped_and_continued_is_bit_equal(folders: Path, finished: Result, tmp_path: Path) -> None:
    first = train(config_for(folders), tmp_path, sinks=[StopAt(2)], quiet=True)
    assert first.exit_code == 128 + signal.SIGTERM and first.steps == 3
    second = train(config_for(folders), tmp_path, quiet=True)
    whole, continued = params_of(finished.model), params_of(second.model)
    assert all(np.array_equal(whole[name], continued[name]) for name in whole)


def test_other_shards_can_t_be_continued(folders: Path, tmp_path: Path) -> None:
    for name in ("model", "images", "pairs"):
        (tmp_path / name).symlink_to(folders / name)
    assert train(config_for(tmp_path), tmp_path / "run", sinks=[StopAt(1)], quiet=True).exit_code
    (tmp_path / "pairs").unlink()
    (tmp_path / "pairs").mkdir()
    for i in range(4):  # other files under names that sort alike
        (tmp_path / "pairs" / f"{i:05d}.tar").write_bytes((folders / "pairs" / f"{3 - i:05d}.tar").read_bytes())
    config = config_for(tmp_path, data={"train": f"webdataset:{tmp_path}/pairs/{{00003..00000}}.tar"})
    with pytest.raises(UserError, match=r"data\.train"):
        train(config, tmp_path / "run", quiet=True)
    os.replace(tmp_path / "run" / "config.json", tmp_path / "old.json")
    old = json.loads((tmp_path / "old.json").read_text())
    old["data"]["train"] = config.data.train
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"the shards aren't those of step 2, .*put the same shards back"):
        train(config, tmp_path / "run", quiet=True)


def test_the_pairs_of_failed_updates_are_named(folders: Path, tmp_path: Path) -> None:
    sections = {"train": {"max_skipped_steps": 1}, "optim": {"learning_rate": 1e30}, "eval": {"every_steps": 100}}
    config = config_for(folders, 20, **sections)
    with pytest.raises(UserError, match="wasn't finite 2 times in a row"):
        train(config, tmp_path, quiet=True)
    written = json.loads((tmp_path / "nonfinite_examples.json").read_text())
    assert len(written) == 2
    for entry in written:
        assert [example["index"] for example in entry["examples"]] == list(range(8))
        names = [example["input"] for example in entry["examples"]]
        assert all(re.fullmatch(rf"{folders}/pairs/0000\d\.tar: \d{{8}}", name) for name in names)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"data": {"val": ""}}, r"config\.data\.val: image-text pairs have no classes; name labelled images"),
        ({"data": {"shots": 2}}, r"config\.data\.shots needs classes"),
        ({"data": {"sampling": "class_balanced"}}, r"config\.data\.sampling needs classes"),
        ({"data": {"augment": {"no_flip_labels": ("left",)}}}, r"config\.data\.augment\.no_flip_labels needs classes"),
        ({"data": {"retrieval": "synthetic"}}, r"config\.data\.retrieval: synthetic: not image-text pairs"),
        ({"data": {"train": "webdataset:none/{0..1}.tar"}}, r"config\.data\.train: .* 2 of 2 files are missing"),
        ({"data": {"val": "webdataset:a.tar"}}, r"config\.data\.val: .* image-text pairs have no classes"),
    ],
)
def test_settings_that_don_t_fit_pairs_are_refused(folders: Path, sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_data(config_for(folders, **sections))


def test_an_epoch_of_unknown_length_needs_a_number_of_steps(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.train\.num_steps: the number of pairs in tar shards isn't known"):
        train(config_for(folders, train={"num_steps": None}), tmp_path / "run", quiet=True)


def test_only_shards_are_replaced(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes\.txt', and the folder would be replaced"):
        write_pairs(f"folder:{folders}/images", tmp_path)
    once, again = (write_pairs(f"folder:{folders}/images", tmp_path / name, 10) for name in "ab")
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert len(once) == 3


CONFIG = """from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(CONFIG.format(values=values))
    return path


def rows_of(notes: Path) -> dict[int, list[int]]:
    """Return the checksums of each step's rows, of all processes."""
    rows: dict[int, list[int]] = {}
    for path in sorted(notes.glob("batches.*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            rows.setdefault(line["step"], [])
            rows[line["step"]] += line["rows"]
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_continue_the_batches_of_one(folders: Path, tmp_path: Path) -> None:
    """One process is stopped; two continue with its position and read the same global batches, each its own shards."""
    values = config_for(folders, 40, data={"num_streams": 2}).to_dict()
    config = write_config(tmp_path / "config.py", values)
    script = ROOT / "tests" / "support" / "instrumented_train.py"
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()

    def run(workdir: str, notes: str) -> subprocess.Popen[str]:
        env = environment(4, NOTES=tmp_path / notes)
        return start_run(config, tmp_path / workdir, script=script, env=env)

    assert finish(run("run_whole", "whole"))[0] == 0
    process = run("run", "first")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 6/"):
            break
    process.send_signal(signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code == 128 + signal.SIGTERM, stderr
    launcher = str(ROOT / "scripts" / "launch_distributed.py")
    command = [sys.executable, launcher, "--processes=2", "--devices_per_process=2", "--", str(script)]
    command += [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    env = environment(NOTES=tmp_path / "second")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    wanted, again = rows_of(tmp_path / "whole"), rows_of(tmp_path / "second")
    assert len(again) > 10 and min(again) > 6
    assert all(again[step] == wanted[step] for step in again)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pairs_of_the_embedded_set_are_learned_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    """A tiny model from random weights; SIGKILL in the middle, then the same command again."""
    write_pairs("synthetic?split=train", tmp_path / "train", 500, [TEMPLATE], max_pairs=6000)
    write_pairs("synthetic?split=val", tmp_path / "val", templates=[TEMPLATE], max_pairs=300)
    values = {
        "data": {
            "train": f"webdataset:{tmp_path}/train/{{00000..00011}}.tar",
            "val": "synthetic?split=val",
            "retrieval": f"webdataset:{tmp_path}/val/00000.tar",
            "shuffle_buffer": 200,
            "augment": {"crop_scale_min": 1.0},
        },
        "text": {"templates": (TEMPLATE,)},
        "method": {"loss": "softmax"},
        "train": {"num_steps": 100},
        "optim": {"name": "muon", "learning_rate": 5e-3, "weight_decay": 0.05},
        "eval": {"every_steps": 50},
        "checkpoint": {"every_steps": 20},
    }
    config = write_config(tmp_path / "config.py", values)
    process = start_run(config, tmp_path / "killed")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 50/"):
            break
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    code, stdout, stderr = finish(start_run(config, tmp_path / "killed"), 1200)
    assert code == 0, stderr
    assert "continuing at step" in stdout
    assert finish(start_run(config, tmp_path / "whole"), 1200)[0] == 0
    ours, theirs = params_of(tmp_path / "killed" / "model"), params_of(tmp_path / "whole" / "model")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    found = json.loads((tmp_path / "whole" / "run.json").read_text())["retrieval"]
    print({name: found[name] for name in ("image_to_text", "text_to_image", "chance")})
    for direction in ("image_to_text", "text_to_image"):
        assert found[direction]["recall@1"] > 4 * found["chance"][direction]["recall@1"]
