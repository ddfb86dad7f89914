"""Training, end to end on a very small model: what it leaves, that it continues bit-equal, that all meshes agree."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from clip_har_jax import bundle
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.factory import load, make_base
from clip_har_jax.models.params import flat_params
from clip_har_jax.trainer import train as train_module
from clip_har_jax.trainer.record import continue_account
from clip_har_jax.trainer.run import setup
from clip_har_jax.trainer.run_data import load_data
from clip_har_jax.trainer.train import train
from clip_har_jax.training import checkpoint
from clip_har_jax.training.time_account import CATEGORIES
from tests.support.model_folders import write_image, write_images, write_model
from tests.support.runs import StopAt, config_with, params_of

LABELS = ("cycling", "running", "sleeping")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    return write_model(root / "model"), write_images(root / "images", LABELS, per_class=8)


def config_for(folders, num_steps=6, **sections):
    values: dict[str, dict[str, Any]] = {
        "data": {"train": f"folder:{folders[1]}", "val_fraction": 0.25},
        "model": {"name": str(folders[0])},
        "train": {"num_steps": num_steps, "global_batch_size": 8, "log_every_steps": 2},
        "optim": {"learning_rate": 1e-3},
        "eval": {"every_steps": 3, "batch_size": 8},
        "checkpoint": {"every_steps": 2},
    }
    return config_with(values, sections)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Return a whole run, which several tests look at."""
    workdir = tmp_path_factory.mktemp("finished")
    return train(config_for(folders), workdir, quiet=True)


def test_a_run_leaves_what_is_promised(finished, folders):
    workdir = finished.workdir
    assert finished.exit_code == 0
    lines = read_lines(workdir / "metrics.jsonl")
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 3, 4, 6]  # every 2, and before each evaluation
    keys = {"train/loss", "train/images_per_s", "train/data_wait_fraction", "train/mfu", "train/learning_rate"}
    assert all(keys <= set(line) for line in training)
    assert training[0]["train/mfu"] is None  # a CPU's peak isn't known
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 6]
    for step in (3, 6):
        assert json.loads((workdir / "eval" / str(step) / "metrics.json").read_text())["num_examples"] == 6
    record = json.loads((workdir / "run.json").read_text())
    assert record["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert record["num_processes"] == 1
    assert record["data"]["train"]["num_examples"] == 18
    total = sum(value.nbytes for value in flat_params(load(str(folders[0])).model).values())
    assert record["param_bytes_per_device"] == total
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 6


def test_the_model_is_calibrated_before_it_is_sealed(finished):
    model = Path(finished.workdir) / "model"
    told = json.loads((model / "calibration.json").read_text())
    actions = bundle.read_actions(model)
    assert (actions.temperature, actions.thresholds) == (told["temperature"], told["thresholds"])
    assert set(actions.thresholds) == {"abstain", "coverage", "split_conformal", "aps"}
    assert told["num_examples"] == 6  # of the validation data
    assert "calibration.json" in json.loads((model / "manifest.json").read_text())["files"]


def test_the_model_folder_is_sealed_and_predicts(finished):
    from clip_har_jax.inference.predictor import Predictor

    predictor = Predictor(finished.model)
    assert predictor.labels == LABELS
    prediction = predictor.predict([np.zeros((40, 40, 3), np.uint8)])[0]
    assert prediction.label in LABELS
    (finished.workdir / "copy").mkdir()
    for path in finished.model.iterdir():
        (finished.workdir / "copy" / path.name).write_bytes(path.read_bytes())
    with (finished.workdir / "copy" / "actions.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"actions\.json"):
        Predictor(finished.workdir / "copy")


def test_the_best_checkpoint_becomes_the_model(finished):
    with checkpoint.Checkpointer(finished.workdir / "checkpoints", config_for((".", "."), 6).checkpoint) as kept:
        best = kept.best_whole()
    top1 = {
        step: json.loads((finished.workdir / "eval" / str(step) / "metrics.json").read_text())["top1"]
        for step in (3, 6)
    }
    assert finished.steps == best
    assert top1[best] == max(top1.values())


def stop_at(step, workdir, config):
    """Train until the metrics of `step` are known, then stop as SIGTERM does."""
    return train(config, workdir, sinks=[StopAt(step)], quiet=True)


def test_stopped_and_continued_is_bit_equal(folders, finished, tmp_path):
    """SIGTERM after the third step, then the same command again."""

    config = config_for(folders)
    first = stop_at(2, tmp_path, config)
    assert first.exit_code == 128 + signal.SIGTERM
    assert first.model is None
    assert first.steps == 3  # step 2's metrics are read while step 3 is computed
    second = train(config, tmp_path, quiet=True)
    assert second.exit_code == 0
    whole, continued = params_of(finished.model), params_of(second.model)
    assert whole.keys() == continued.keys()
    assert all(np.array_equal(whole[name], continued[name]) for name in whole)

    def deterministic(path):
        return [
            {k: v for k, v in line.items() if k in ("step", "train/loss", "train/grad_norm", "val/top1", "val/nll")}
            for line in read_lines(path)
            if line["step"] != 3 or "val/top1" in line
        ]

    assert deterministic(tmp_path / "metrics.jsonl")[-3:] == deterministic(finished.workdir / "metrics.jsonl")[-3:]
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 6
    record, before = (json.loads((path / "run.json").read_text()) for path in (tmp_path, finished.workdir))
    assert record["run_id"] != before["run_id"]


def test_a_finished_run_started_again_keeps_its_model(folders, tmp_path, capsys):
    config, model = config_for(folders, num_steps=2), tmp_path / "model"
    train(config, tmp_path, quiet=True)
    digest = bundle.verify(model)
    assert train(config, tmp_path).steps == 2
    assert "all 2 steps are done" in capsys.readouterr().out
    assert bundle.verify(model) == digest
    (model / "actions.json").write_text("{}")
    train(config, tmp_path, quiet=True)
    assert bundle.verify(model) != digest  # written anew: its run.json is of the third start
    assert bundle.read_actions(model).labels == tuple(sorted(LABELS))


def test_a_checkpoint_is_not_changed_by_the_steps_after_it(folders, tmp_path):
    """Saves run in the background while the state's buffers are donated and written again."""
    config = config_for(folders, num_steps=2)
    train(config, tmp_path / "two", quiet=True)
    train(
        config_for(folders, num_steps=2, checkpoint={"every_steps": 1, "keep_latest": 5}), tmp_path / "each", quiet=True
    )
    run = setup(config, epath.Path(tmp_path / "x"), load_data(config), make_base(str(folders[0]), []), {})
    target = run.program.abstract_state()
    states = []
    for folder in ("two", "each"):
        with checkpoint.Checkpointer(tmp_path / folder / "checkpoints", config.checkpoint) as kept:
            states.append(kept.restore(target, 2))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    with checkpoint.Checkpointer(tmp_path / "each" / "checkpoints", config.checkpoint) as kept:
        first, position = kept.restore(target, 1), kept.position(1)
    assert int(first.step) == 1
    assert position.items() >= {"step": 1, "examples_seen": 8, "global_batch_size": 8}.items()
    changed = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first.params, states[1].params)), strict=True)
    ]
    assert any(changed)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp", "fsdp_tp"])
def test_all_strategies_give_equal_losses(folders, finished, strategy, tmp_path):
    result = train(config_for(folders, mesh={"strategy": strategy}), tmp_path, quiet=True)
    ours, theirs = (
        [line["train/loss"] for line in read_lines(run.workdir / "metrics.jsonl") if "train/loss" in line]
        for run in (result, finished)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    bytes_of = [
        json.loads((run.workdir / "run.json").read_text())["param_bytes_per_device"] for run in (result, finished)
    ]
    assert bytes_of[0] < bytes_of[1] * (0.2 if strategy == "fsdp" else 0.8)  # tp leaves an odd vocabulary whole


@pytest.mark.parametrize("towers", ["image", pytest.param("text", marks=pytest.mark.slow)])
def test_a_frozen_tower_does_not_change(folders, towers, tmp_path):
    result = train(config_for(folders, num_steps=2, method={"towers": towers}), tmp_path, quiet=True)
    before, after = params_of(folders[0]), params_of(result.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    trained = "text" if towers == "text" else "vis"
    assert changed == {name for name in before if name.startswith(trained) or name == "logit_scale"}


def test_another_config_is_refused_at_resume(folders, finished):
    with pytest.raises(UserError, match=r"method\.towers"):
        train(config_for(folders, method={"towers": "image"}), finished.workdir, quiet=True)


def test_bad_images_are_logged_and_count_nowhere(folders, tmp_path):
    images = write_images(tmp_path / "images", LABELS, per_class=6)
    bad = write_image(images / "running" / "bad.png", seed=1)
    bad.write_bytes(bad.read_bytes()[:60])
    data = {"train": f"folder:{images}", "val": f"folder:{images}", "max_bad_fraction": 0.1}
    result = train(config_for(folders, num_steps=4, data=data), tmp_path / "run", quiet=True)
    lines = read_lines(tmp_path / "run" / "bad_inputs.jsonl")
    assert [line["input"] for line in lines] == [str(bad)]
    assert result.metrics["num_examples"] == 18
    assert result.metrics["num_unreadable"] == 1
    with pytest.raises(UserError, match="max_bad_fraction") as error:
        train(config_for(folders, num_steps=4, data={**data, "max_bad_fraction": 0.0}), tmp_path / "strict", quiet=True)
    assert str(bad) in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"global_batch_size": 9}}, "multiple of 8"),
        ({"eval": {"batch_size": 9}}, "multiple of 8"),
        ({"mesh": {"data": 3}}, "this run has 8"),
        ({"method": {"name": "ful"}}, "did you mean 'full'"),
        ({"model": {"name": "ViT-B/33"}}, "ViT-B/32"),
        ({"text": {"templates": ("a photo",)}}, "needs one {}"),
        ({"text": {"descriptions": {"runing": ("fast",)}}}, "'runing'"),
        ({"data": {"train": "folder:/nowhere"}}, "config.data.train: /nowhere"),
        ({"data": {"val": "synthetic"}}, "config.data.val: "),
        ({"data": {"labels": ("running", "sleeping")}}, "'cycling'"),
    ],
)
def test_mistakes_are_refused_before_any_compute(folders, tmp_path, sections, message):
    with pytest.raises(UserError) as error:
        train(config_for(folders, **sections), tmp_path, quiet=True)
    assert message in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def poisoned(monkeypatch):
    """Make the batches of chosen steps give a loss that isn't finite."""
    steps: set[int] = set()
    place_batches = train_module.prefetch_to_mesh

    def poison(batches, place, size=2):
        for step, batch in enumerate(place_batches(batches, place, size), start=1):
            bad = jax.device_put(np.full(batch.mask.shape, np.nan, np.float32), batch.mask.sharding)
            yield batch._replace(mask=bad) if step in steps else batch

    monkeypatch.setattr(train_module, "prefetch_to_mesh", poison)
    return steps


def test_a_batch_that_is_not_finite_is_skipped_and_counted(folders, poisoned, tmp_path):
    poisoned.add(3)
    result = train(config_for(folders), tmp_path, quiet=True)
    assert result.exit_code == 0
    skipped = {
        line["step"]: line["train/skipped_steps"]
        for line in read_lines(tmp_path / "metrics.jsonl")
        if "train/loss" in line
    }
    assert skipped == {2: 0, 3: 1, 4: 1, 6: 1}
    assert all(np.isfinite(value).all() for value in params_of(result.model).values())


def test_a_run_that_is_not_finite_any_more_ends_with_its_examples(folders, poisoned, tmp_path):
    poisoned.update(range(2, 100))
    config = config_for(folders, num_steps=20, train={"max_skipped_steps": 3}, checkpoint={"every_steps": 1})
    with pytest.raises(UserError, match="wasn't finite 4 times in a row") as error:
        train(config, tmp_path, quiet=True)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "nonfinite_examples.json") in str(error.value)
    written = json.loads((tmp_path / "nonfinite_examples.json").read_text())
    assert [entry["step"] for entry in written] == [2, 3, 4, 5]
    assert all(len(entry["examples"]) == 8 for entry in written)
    assert all(Path(example["input"]).is_file() for entry in written for example in entry["examples"])
    run = setup(config, epath.Path(tmp_path / "x"), load_data(config), make_base(str(folders[0]), []), {})
    with checkpoint.Checkpointer(tmp_path / "checkpoints", config.checkpoint) as kept:
        step = kept.newest_whole()
        assert step is not None
        state = kept.restore(run.program.abstract_state(), step)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_new_batch_size_continues_after_the_examples_seen(folders, tmp_path):
    stop_at(2, tmp_path, config_for(folders, num_steps=6))
    data = {"train": {"global_batch_size": 16}, "checkpoint": {"allow_new_batch_size": True}}
    result = train(config_for(folders, num_steps=6, **data), tmp_path, quiet=True)
    assert result.exit_code == 0
    with checkpoint.Checkpointer(tmp_path / "checkpoints", make_config().checkpoint) as kept:
        position = kept.position(6)
    seen_before = 3 * 8  # step 2's metrics are read while step 3 is computed
    assert position.items() >= {"step": 6, "examples_seen": seen_before + 3 * 16, "global_batch_size": 16}.items()
    changes = json.loads((tmp_path / "run.json").read_text())["config_changes"]
    assert {"step": 3, "key": "train.global_batch_size", "old": 8, "new": 16, "policy": "warned"} in changes


def test_a_trace_of_chosen_steps(folders, tmp_path):
    train(config_for(folders, num_steps=4), tmp_path, quiet=True, profile_steps=(2, 3))
    written = {path.name.partition(".")[2] for path in (tmp_path / "profile").rglob("*") if path.is_file()}
    assert "xplane.pb" in written  # TensorBoard's
    assert any((tmp_path / "profile").rglob("perfetto_trace.json.gz"))


def test_a_trace_of_steps_that_are_not_made_is_refused(folders, tmp_path):
    stop_at(2, tmp_path, config_for(folders))
    for first, last in ((7, 9), (2, 4)):
        with pytest.raises(UserError, match=f"--profile_steps={first}:{last}: this start makes steps 4 to 6"):
            train(config_for(folders), tmp_path, quiet=True, profile_steps=(first, last))


def test_a_trace_is_written_to_a_disk_only(folders):
    data, base = load_data(config_for(folders)), make_base(str(folders[0]), [])
    with pytest.raises(UserError, match="--profile_steps: a trace is written to a disk only, not to gs://bucket/run"):
        setup(config_for(folders), epath.Path("gs://bucket/run"), data, base, {}, (1, 2))


def test_an_array_that_moves_by_accident_ends_the_run(folders, tmp_path):
    class Moving:
        def write(self, step, metrics):
            jnp.add(jnp.ones(2), np.ones(2, np.float32))

        def close(self):
            pass

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config_for(folders), tmp_path, sinks=[Moving()], quiet=True)


def test_other_files_under_the_same_name_are_warned_of(folders, tmp_path, capsys):
    images = write_images(tmp_path / "images", LABELS, per_class=8)
    config = config_for(folders, num_steps=4, data={"train": f"folder:{images}"})
    stop_at(2, tmp_path / "run", config)
    write_image(images / "running" / "new.png", seed=7)
    assert train(config, tmp_path / "run", quiet=True).exit_code == 0
    assert "warning: the files of config.data.train aren't those of the last start" in capsys.readouterr().err
    changes = json.loads((tmp_path / "run" / "run.json").read_text())["config_changes"]
    assert {"step": 3, "key": "data.train", "old": "18 examples", "new": "19 examples", "policy": "warned"} in changes


def test_a_disk_without_space_for_the_metrics_is_one_line_and_costs_no_checkpoint(folders, tmp_path):
    class Full:
        """A file on a device that has no space."""

        def write(self, at, metrics):
            if at == 4:
                with open("/dev/full", "w") as file:
                    file.write("x")

        def close(self):
            pass

    config = config_for(folders)
    with pytest.raises(UserError, match="No space left on device; what was saved stays whole") as error:
        train(config, tmp_path, sinks=[Full()], quiet=True)
    assert "\n" not in str(error.value)
    with checkpoint.Checkpointer(tmp_path / "checkpoints", config.checkpoint) as kept:
        assert (kept.newest_whole() or 0) >= 2
    assert train(config, tmp_path, quiet=True).exit_code == 0


def test_the_time_of_a_run_is_accounted_for(finished):
    record = json.loads((finished.workdir / "run.json").read_text())
    assert set(record["goodput"]) == set(CATEGORIES)
    assert record["last_step"] == 6 and record["finished"]
    assert record["starts"] >= 1
    assert sum(finished.time_spent.values()) == pytest.approx(finished.seconds, rel=0.05)
    assert finished.time_spent["compile"] > 0
    assert finished.time_spent["lost"] == 0


def test_what_a_killed_start_spent_after_its_checkpoint_is_lost():
    saved, last = {"productive": 5.0, "compile": 1.0}, {"productive": 9.0, "compile": 1.0, "evaluation": 2.0}
    record = {"last_step": 30, "goodput": last}
    killed = continue_account(record, {"step": 20, "goodput": saved}, time.monotonic()).seconds()
    assert killed["lost"] == pytest.approx(6.0)
    assert killed["productive"] == pytest.approx(5.0, abs=0.1)
    stopped = continue_account(record, {"step": 30, "goodput": saved}, time.monotonic()).seconds()
    assert stopped["lost"] == 0
    assert stopped["productive"] == pytest.approx(9.0, abs=0.1)
