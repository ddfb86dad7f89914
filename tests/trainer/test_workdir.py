"""The work folder: what may differ when a run continues in it, and what a disk that fails says."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from clip_har_jax.config import RunConfig, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.settings import FREE, WARNED, settings_of
from clip_har_jax.trainer.workdir import claim_config, clear_other_run, make_workdir

ROOT = Path(__file__).parents[2]


CHANGED: dict[str, list[tuple[str, Any]]] = {
    "free": [("checkpoint.every_steps", 7), ("mesh.strategy", "fsdp"), ("train.accumulation_steps", 2)],
    "warned": [("optim.learning_rate", 0.5), ("train.num_steps", 3), ("method.label_smoothing", 0.1)],
    "refused": [
        ("data.train", "folder:x"),
        ("seed", 1),
        ("model.name", "ViT-B/32"),
        ("optim.ema_decay", 0.9),
        ("train.global_batch_size", 32),
        ("method.freeze", ("text.*",)),
    ],
}


def make_saved(path):
    """Return a work folder with a checkpoint, as far as its names say."""
    folder = make_workdir(path)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    return folder


def config_with(key, value):
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return make_config(tree)


@pytest.mark.parametrize(("policy", "key", "value"), [(p, k, v) for p, pairs in CHANGED.items() for k, v in pairs])
def test_what_may_change_at_resume(tmp_path, policy, key, value):
    folder = make_saved(tmp_path / "run")
    assert claim_config(folder, make_config()) == []
    if policy == "refused":
        with pytest.raises(UserError) as error:
            claim_config(folder, config_with(key, value))
        assert f"--config.{key}=" in str(error.value)
        assert claim_config(folder, make_config()) == []  # what stood there still does
    else:
        (change,) = claim_config(folder, config_with(key, value))
        assert (change.key, change.policy) == (key, policy)
        assert claim_config(folder, config_with(key, value)) == []


def test_a_run_that_saved_nothing_holds_no_one_to_its_config(tmp_path):
    """A mistake in a config is mended in the same folder."""
    folder = make_workdir(tmp_path / "run")
    claim_config(folder, config_with("train.global_batch_size", 12))
    assert claim_config(folder, config_with("train.global_batch_size", 16)) == []
    (folder / "checkpoints_damaged" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="global_batch_size=16"):
        claim_config(folder, make_config())


def test_a_key_that_a_newer_version_has_stood_at_its_default(tmp_path):
    folder = make_saved(tmp_path / "run")
    claim_config(folder, make_config())
    old = json.loads((folder / "config.json").read_text())
    del old["data"]["sampling"], old["method"]
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"method\.freeze=\[\], this one says"):
        claim_config(folder, config_with("method.freeze", ("text.*",)))
    assert claim_config(folder, make_config()) == []


def test_a_batch_size_changes_when_asked(tmp_path):
    folder = make_saved(tmp_path / "run")
    claim_config(folder, make_config())
    with pytest.raises(UserError, match="allow_new_batch_size"):
        claim_config(folder, config_with("train.global_batch_size", 32))
    asked = make_config({"train": {"global_batch_size": 32}, "checkpoint": {"allow_new_batch_size": True}})
    changes = {change.key: change.policy for change in claim_config(folder, asked)}
    assert changes == {"train.global_batch_size": "warned", "checkpoint.allow_new_batch_size": "free"}


@pytest.mark.parametrize(
    ("last_step", "finished", "config", "data", "stays"),
    [
        (3, False, {}, "a", True),
        (9, False, {}, "a", True),  # killed while the model was written: nothing is computed again
        (9, True, {}, "a", False),
        (3, False, {"checkpoint": {"every_steps": 7}}, "a", True),
        (3, False, {"optim": {"learning_rate": 0.5}}, "a", False),
        (3, False, {}, "b", False),
    ],
)
def test_a_restart_clears_what_is_not_this_run_unfinished(tmp_path, last_step, finished, config, data, stays):
    folder = make_saved(tmp_path / "run")
    claim_config(folder, make_config())
    record = {"last_step": last_step, "finished": finished, "data": {"train": {"fingerprint": "a"}}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "notes.txt").write_text("a person's own")
    clear_other_run(folder, make_config(config), {"train": data})
    assert (folder / "checkpoints" / "3").exists() == (folder / "config.json").exists() == stays
    assert (folder / "notes.txt").exists()


def test_the_documentation_says_what_may_change_at_resume():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    text = page[page.index("## What may change at resume") : page.index("Everything else is refused")]
    policies = {key: found.at_resume for key, _, found in settings_of(RunConfig) if found is not None}
    for policy, part in zip((FREE, WARNED), text.split("Warned of"), strict=True):
        excluded = part.partition("but not")[2]
        named = set(re.findall(r"`([a-z_0-9.]+\*?)`", part)) - {"run.json"}
        but_not = set(re.findall(r"`([a-z_.]+)`", excluded.partition(")")[0]))
        assert but_not <= policies.keys()
        keys = {key for key in policies for name in named - but_not if fnmatch(key, name)} - but_not
        assert keys == {key for key, found in policies.items() if found == policy}


@pytest.mark.parametrize("place", ["a file", "in a file", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, place):
    path = tmp_path / "file"
    path.write_text("")
    workdir = {"a file": str(path), "in a file": str(path / "run")}.get(place, place)
    with pytest.raises(UserError) as error:
        make_workdir(workdir)
    assert f"--workdir={workdir}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path):
    script = "import resource, sys\nfrom clip_har_jax.config import make_config\n"
    script += "from clip_har_jax.errors import UserError\nfrom clip_har_jax.trainer import workdir\n"
    script += "from clip_har_jax.lock import FolderLock\n"
    script += "folder = workdir.make_workdir(sys.argv[1])\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    script += "try:\n    with workdir.disk_faults(folder), FolderLock(folder):\n        pass\n"
    script += "except UserError as error:\n    print(error)\n"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert "File too large; what was saved stays whole" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_name_that_is_empty_is_refused():
    with pytest.raises(UserError, match="--workdir is empty"):
        make_workdir("")


def test_a_damaged_config_is_named(tmp_path):
    folder = make_workdir(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        claim_config(folder, make_config())
