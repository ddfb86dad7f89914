"""Checkpoints: every changed byte is noticed, a failed save costs nothing, and what is restored is what was saved."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.config import CheckpointConfig
from clip_har_jax.errors import UserError
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.checkpoint_seals import LATE
from clip_har_jax.training.state import TrainState

KEEP = CheckpointConfig(keep_latest=2, keep_best=0)


def make_state(step, size=64):
    params = {
        "a.kernel": jnp.arange(size, dtype=jnp.float32).reshape(8, -1) + step,
        "b.bias": jnp.full((8,), float(step)),
    }
    scalar = jnp.asarray(step, jnp.int32)
    return TrainState(scalar, params, {}, (), jnp.zeros(2, jnp.uint32), scalar * 0, scalar * 0)


def position_of(step):
    return {"step": step, "examples_seen": 8 * step, "global_batch_size": 8, "goodput": {}}


def save(folder, steps, config=KEEP, metrics=None):
    with Checkpointer(folder, config) as kept:
        for step in steps:
            values = (metrics or {}).get(step, {})
            kept.save(make_state(step), position_of(step), values)
        kept.finish(make_state(steps[-1]), position_of(steps[-1]), values)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, [1, 2])
    return folder


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def flip(path):
    """Change one bit, somewhere."""
    data = bytearray(path.read_bytes())
    position = np.random.default_rng(len(data)).integers(8 * len(data))
    data[position // 8] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])  # one byte more than a manifest's last line break, which means nothing


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_every_file_of_a_checkpoint_is_checked(saved, tmp_path, damage, capsys):
    names = [path.relative_to(saved) for path in files_of(saved, 2)]
    assert len(names) > 5
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        if not (folder / name).stat().st_size:
            (folder / name).write_bytes(b"x") if damage is not delete else delete(folder / name)
        else:
            damage(folder / name)
        with Checkpointer(folder, KEEP) as kept:
            assert kept.newest_whole() == 1, name
            state = kept.restore(make_state(0), 1)
            assert kept.position(1) == position_of(1)
        np.testing.assert_array_equal(state.params["a.kernel"], make_state(1).params["a.kernel"])
        said = capsys.readouterr().out
        assert "checkpoint 2 is damaged" in said
        assert str(name.relative_to("2")) in said
        assert (tmp_path / f"{number}_damaged" / "2").is_dir()  # moved aside, not thrown away


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_a_damaged_manifest_is_noticed(saved, tmp_path, damage):
    shutil.copytree(saved, tmp_path / "c")
    damage(tmp_path / "c" / "2.manifest.json")
    with Checkpointer(tmp_path / "c", KEEP) as kept:
        assert kept.newest_whole() == 1
        save_again = make_state(2)
        kept.save(save_again, position_of(2), {})  # the number is free again
        kept.finish(save_again, position_of(2), {})
        assert kept.newest_whole() == 2


def test_none_whole_is_said_and_nothing_is_thrown_away(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    for step in (1, 2):
        delete(tmp_path / "c" / f"{step}.manifest.json")
    with Checkpointer(tmp_path / "c", KEEP) as kept, pytest.raises(UserError, match="no checkpoint is whole") as error:
        kept.newest_whole()
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path / "c_damaged")) == ["1", "2"]
    with Checkpointer(tmp_path / "c", KEEP) as kept, pytest.raises(UserError, match="no checkpoint is whole"):
        kept.newest_whole()  # what starts a run again by itself doesn't begin it anew
    shutil.copytree(saved, tmp_path / "c", dirs_exist_ok=True)  # a copy put back
    with Checkpointer(tmp_path / "c", KEEP) as kept:
        assert kept.newest_whole() == 2


def test_a_kill_before_the_seal_is_finished_costs_nothing(saved, tmp_path):
    """Orbax's last files are sealed after the folder's rename; a manifest that still lacks them serves."""
    import json

    shutil.copytree(saved, tmp_path / "c")
    path = tmp_path / "c" / "2.manifest.json"
    manifest = json.loads(path.read_text())
    for name in LATE:
        manifest["files"].pop(name)
    path.write_text(json.dumps(manifest))
    with Checkpointer(tmp_path / "c", KEEP) as kept:
        assert kept.newest_whole() == 2


def test_the_best_is_kept_and_falls_back_when_damaged(tmp_path):
    metrics = {step: {"val/top1": top1} for step, top1 in {1: 0.9, 2: 0.2, 3: 0.3}.items()}
    save(tmp_path / "c", [1, 2, 3], CheckpointConfig(keep_latest=1, keep_best=2), metrics)
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.is_dir()) == ["1", "3"]
    with Checkpointer(tmp_path / "c", CheckpointConfig()) as kept:
        assert kept.best_metric() == 0.9
        assert kept.best_whole() == 1
        flip(files_of(tmp_path / "c", 1)[0])
        assert kept.best_whole() == 3
    manifests = sorted(path.name for path in (tmp_path / "c").glob("*.manifest.json"))
    assert manifests == ["3.manifest.json"]


def test_another_model_is_refused_in_one_line(saved):
    other = make_state(0)._replace(params={"a.kernel": jnp.zeros((4, 4)), "c.bias": jnp.zeros(3)})
    with Checkpointer(saved, KEEP) as kept, pytest.raises(UserError, match="doesn't fit this config's model") as error:
        kept.restore(other, 2)
    assert "\n" not in str(error.value)


# Orbax's threads outlive its event loop when a save fails.
of_failed_saves = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextmanager
def small_files():
    """No file may grow above 20 kB, as on a full disk; gives a function that makes room.

    Not a fixture: pytest reports a test before it ends its fixtures, and its own output may be a larger file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield make_room
    finally:
        make_room()


@of_failed_saves
def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(tmp_path, capfd):
    save(tmp_path / "c", [1, 2])
    state = make_state(3, size=640_000)
    with small_files(), Checkpointer(tmp_path / "c", KEEP) as kept:
        kept.save(state, position_of(3), {})  # in the background
        with pytest.raises(UserError, match="checkpoint 3 can't be saved") as error:
            kept.finish(state, position_of(3), {})
        assert "\n" not in str(error.value)
        assert kept.newest_whole() == 2
    with Checkpointer(tmp_path / "c", KEEP) as kept:
        assert kept.newest_whole() == 2
        assert kept.restore(make_state(0), 2).step == 2


@of_failed_saves
def test_what_a_failed_pruning_left_is_not_called_whole(tmp_path, monkeypatch):
    save(tmp_path / "c", [1, 2])

    def stop_halfway(self):
        files_of(tmp_path / "c", 1)[0].unlink()
        raise OSError("deleting stopped")

    monkeypatch.setattr(Checkpointer, "free_space", stop_halfway)
    state = make_state(3, size=640_000)
    with small_files(), Checkpointer(tmp_path / "c", KEEP) as kept:
        kept.save(state, position_of(3), {})
        with pytest.raises(UserError, match=r"whole are: 2[.]"):
            kept.finish(state, position_of(3), {})


@of_failed_saves
def test_a_save_is_tried_again_when_older_ones_are_pruned(tmp_path, monkeypatch, capsys):
    save(tmp_path / "c", [1, 2])
    prune = Checkpointer.free_space
    state = make_state(3, size=640_000)
    with small_files() as make_room, Checkpointer(tmp_path / "c", KEEP) as kept:

        def prune_and_make_room(self):
            prune(self)
            make_room()

        monkeypatch.setattr(Checkpointer, "free_space", prune_and_make_room)
        kept.save(state, position_of(3), {})
        kept.finish(state, position_of(3), {})
        assert kept.newest_whole() == 3
        assert int(kept.restore(state, 3).step) == 3
    assert "older checkpoints were deleted and step 3 is saved" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.is_dir()) == ["2", "3"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoints can't be written there"):
        Checkpointer(tmp_path / "file" / "checkpoints", KEEP)


WITHOUT_PRIVILEGES = """
import ctypes, sys
ctypes.CDLL(None).prctl(24, 1)  # drop CAP_DAC_OVERRIDE from the bounding set: root obeys modes after the next exec
ctypes.CDLL(None).prctl(24, 2)
import os
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
"""
OPEN = """
import sys
from clip_har_jax.config import CheckpointConfig
from clip_har_jax.errors import UserError
from clip_har_jax.training.checkpoint import Checkpointer
for folder in sys.argv[1:]:
    try:
        Checkpointer(folder, CheckpointConfig())
    except UserError as error:
        print(error)
"""
FORBIDDEN = [
    (".", 0o555, "checkpoints can't be written there (Permission denied)"),
    ("2/state/d", 0o000, "checkpoint 2 may not be read"),
    ("2.manifest.json", 0o000, "checkpoint 2 may not be read"),
]


def test_a_lack_of_permission_is_said_at_once_and_no_damage(saved, tmp_path):
    folders = [tmp_path / str(i) for i in range(len(FORBIDDEN))]
    modes = []
    for folder, (place, mode, _) in zip(folders, FORBIDDEN, strict=True):
        shutil.copytree(saved, folder)
        modes.append((folder / place).stat().st_mode)
        (folder / place).chmod(mode)
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, OPEN, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    for folder, (place, _, _), mode in zip(folders, FORBIDDEN, modes, strict=True):
        (folder / place).chmod(mode)
    expected = [f"{folder / place}: {message}" for folder, (place, _, message) in zip(folders, FORBIDDEN, strict=True)]
    assert done.stdout.splitlines() == expected, done.stderr
    for folder in folders:
        with Checkpointer(folder, KEEP) as kept:
            assert kept.newest_whole() == 2


def test_another_mesh_restores_the_same_bits(saved):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("x",), ()))
    like = jax.tree.map(lambda x: jax.device_put(x, split if x.ndim and x.shape[0] == 8 else whole), make_state(0))
    with Checkpointer(saved, KEEP) as kept:
        found = kept.restore(like, 2)
    assert found.params["a.kernel"].sharding == split
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(make_state(2)), strict=True):
        np.testing.assert_array_equal(a, b)
