"""Trackers: what each of them holds of a real run, and that none of them can hold it up or end it."""

import http.server
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from etils import epath

from clip_har_jax.config import TRACKERS, make_config
from clip_har_jax.errors import UserError
from clip_har_jax.mlops import tracking
from clip_har_jax.mlops.sync import sync
from clip_har_jax.mlops.tracking import FINISHED, STOPPED, BackgroundTracker, RunInfo, State, Trackers
from clip_har_jax.trainer.train import train
from tests.support.model_folders import write_images, write_model

ROOT = Path(__file__).parents[2]
LABELS = ("cycling", "running", "sleeping")
# MLflow's own query of its database.
TRACKER_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    images = write_images(root / "images", LABELS, per_class=8)
    for path in list(images.rglob("*.png")):
        path.rename(path.with_name(f"ü {path.name}"))  # a name that must be quoted and encoded
    return write_model(root / "model"), images


def config_for(folders, trackers, num_steps=4):
    return make_config(
        {
            "data": {"train": f"folder:{folders[1]}", "val_fraction": 0.25},
            "model": {"name": str(folders[0])},
            "train": {"num_steps": num_steps, "global_batch_size": 8, "log_every_steps": 1},
            "optim": {"learning_rate": 1e-3},
            "eval": {"every_steps": 2, "batch_size": 8},
            "checkpoint": {"every_steps": 2},
            "trackers": trackers,
        }
    )


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a folder of this module's own, and a MLflow store in it."""
    for name in TRACKERS:  # before threads do it at once, which Python 3.11's parser, behind the import hook, can't
        importlib.import_module(f"clip_har_jax.mlops.{name}")
    root = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for name in TRACKER_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        patch.setenv("WANDB_DATA_DIR", str(root / "wandb"))
        patch.setenv("NETRC", str(root / "netrc"))
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def tracked(environment, folders):
    """Return a run with all trackers, stopped in the middle and continued."""
    import signal

    class StopAt:
        def write(self, step, metrics):
            if step == 2 and "val/top1" in metrics:
                signal.raise_signal(signal.SIGTERM)

        def close(self):
            pass

    config, workdir = config_for(folders, ("tensorboard", "mlflow", "wandb")), environment / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundTracker, "STOPPED_S", 300.0)  # a busy machine may take longer to import a tracker
        first = train(config, workdir, sinks=[StopAt()], quiet=True)
    assert first.exit_code == 143
    return train(config, workdir, quiet=True)


def test_mlflow_holds_one_run_with_all_of_it(tracked):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("clip_har_jax")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])  # the continued run is the same one
    assert run.info.status == "FINISHED"
    record = json.loads((tracked.workdir / "run.json").read_text())
    manifest = json.loads((tracked.model / "manifest.json").read_text())
    assert run.data.tags["run_id"] == record["run_id"]
    assert run.data.tags["git_dirty"] == str(record["git_dirty"])
    assert run.data.tags["model_digest"] == manifest["digest"]
    assert run.data.params["optim.learning_rate"] == "0.001"
    for name in ("train/loss", "val/top1", "system/memory_bytes"):
        history = {(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, name)}
        assert history == {(line["step"], line[name]) for line in lines_of(tracked.workdir) if name in line}
    files = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {"report.html", "confusion_matrix.png", "metrics.json"} <= files
    folder = tracked.workdir / "eval" / str(tracked.steps)
    assert "How it was trained" in (folder / "report.html").read_text(encoding="utf-8")
    names = pq.read_table(str(folder / "predictions.parquet"))["input"].to_pylist()
    assert all("/ü " in name for name in names)
    assert "model.safetensors" in {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "model")}


def test_tensorboard_reads_the_event_files(tracked, monkeypatch):
    # Its own stub in TensorFlow's place, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(os.fspath(tracked.workdir / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert {entry.step for entry in events.Scalars("train/loss")} == {1, 2, 3, 4}
    by_step = {line["step"]: line["train/loss"] for line in lines_of(tracked.workdir) if "train/loss" in line}
    for entry in events.Scalars("train/loss"):
        assert entry.value == pytest.approx(by_step[entry.step])
    assert events.Images("evaluation/confusion_matrix")[0].encoded_image_string.startswith(b"\x89PNG")
    assert b"optim.learning_rate" in events.Tensors("config")[0].tensor_proto.string_val[0]


def test_wandb_wrote_offline_under_one_id(tracked):
    handle = json.loads((tracked.workdir / "trackers.json").read_text())["wandb"]["handle"]
    record = json.loads((tracked.workdir / "run.json").read_text())
    assert handle["id"] == record["run_id"]
    assert len(handle["folders"]) == 2  # of two starts
    for folder in map(Path, handle["folders"]):
        assert folder.parent == Path(tracked.workdir) / "wandb"
        (log,) = folder.glob("*.wandb")
        assert b"train/loss" in log.read_bytes()
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        sync(tracked.workdir, ["wandb"])


def test_nothing_is_handed_in_twice(tracked):
    assert sync(tracked.workdir, ["mlflow"])["mlflow"].startswith("0 values and 0 folders")


def test_training_imports_no_tensorflow_for_its_trackers(folders, tmp_path):
    code = (
        "import sys; from pathlib import Path; from clip_har_jax.mlops import tracking;"
        "facts = tracking.RunInfo(__import__('etils.epath').epath.Path(sys.argv[1]), 'id', {}, {});"
        "[tracking.open_tracker(name, facts, None) for name in ('tensorboard',)];"
        "import clip_har_jax.mlops.mlflow, clip_har_jax.mlops.wandb;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT).returncode == 0


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def refusing_server():
    """Answers 401 to everything, as a service does to a wrong key."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b'{"error_code": "UNAUTHENTICATED", "message": "wrong credentials"}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_dead_mlflow_server_stops_nothing_and_gets_everything_later(
    environment, folders, tmp_path, monkeypatch, capsys
):
    store = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    result = train(config_for(folders, ("mlflow",)), tmp_path / "run", quiet=True)
    assert result.exit_code == 0
    said = capsys.readouterr().err
    assert "warning: mlflow: " in said and "the run goes on" in said
    assert "scripts/sync.py" in said
    with pytest.raises(UserError, match=r"^MLflow at http.*Connection refused"):
        sync(result.workdir)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    values = sum(
        value is not None for line in lines_of(result.workdir) for name, value in line.items() if name != "step"
    )
    assert sync(result.workdir)["mlflow"].startswith(f"{values} values and 2 folders")
    assert sync(result.workdir)["mlflow"].startswith("0 values and 0 folders")


def test_wrong_credentials_stop_nothing(environment, folders, tmp_path, monkeypatch, capsys, refusing_server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing_server)
    monkeypatch.setenv("WANDB_BASE_URL", refusing_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("clip_har_jax.mlops.wandb.INIT_TIMEOUT_S", 4.0)
    result = train(config_for(folders, ("mlflow", "wandb")), tmp_path / "run", quiet=True)
    assert result.exit_code == 0
    said = capsys.readouterr().err
    assert "warning: mlflow: " in said and "going on offline" in said
    assert "0" * 40 not in said
    state = json.loads((result.workdir / "trackers.json").read_text())
    assert state["wandb"]["missed"] == 0  # it is on the disk
    assert state["mlflow"]["missed"] > 0


def facts_of(tmp_path):
    return RunInfo(epath.Path(tmp_path), "id", {}, {})


class Recorder:
    """Remembers what it was given."""

    def __init__(self, seen):
        self.handle, self.seen = {"id": 1}, seen

    def write(self, records):
        self.seen += [step for step, _ in records]

    def tag(self, tags):
        self.seen.append(dict(tags))

    def log_folder(self, name, folder):
        self.seen.append(name)

    def close(self, status):
        self.seen.append(status)


def test_a_disk_that_is_full_costs_only_that_tracker(tmp_path, monkeypatch, capsys):
    """After its first records TensorBoard's file has no more room: they go to /dev/full."""
    from clip_har_jax.mlops import tensorboard

    seen: list[Any] = []

    class OnDiskThatFills(tensorboard.RecordWriter):
        room = 3  # records: the version, the config, the tags

        def write(self, data):
            self.room -= 1
            if self.room < 0:
                with open("/dev/full", "wb", buffering=0) as full:
                    full.write(data)
            super().write(data)

    monkeypatch.setattr(tensorboard, "RecordWriter", OnDiskThatFills)

    def make(name, facts, handle):
        if name != "tensorboard":
            return Recorder(seen)
        return tensorboard.open_tracker(facts, handle)

    trackers = Trackers(("tensorboard", "mlflow"), facts_of(tmp_path), make)
    for step in range(10):
        trackers.write(step, {"train/loss": 1.0})
    trackers.status = FINISHED
    trackers.close()
    assert seen == [*range(10), FINISHED]
    state = json.loads((tmp_path / "trackers.json").read_text())
    assert state["tensorboard"]["missed"] == 11 and state["mlflow"]["missed"] == 0
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.timeout(60)  # a wait for it would never end
def test_a_tracker_that_hangs_is_never_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(BackgroundTracker, "QUEUE", 5)
    monkeypatch.setattr(BackgroundTracker, "STOPPED_S", 0.3)
    hang = threading.Event()

    class Hanging(Recorder):
        def write(self, records):
            hang.wait()

    trackers = Trackers(("mlflow",), facts_of(tmp_path), lambda *_: Hanging([]))
    for step in range(1000):
        trackers.write(step, {"train/loss": 1.0})
    trackers.status = STOPPED
    trackers.close()
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"]["missed"] >= 995
    hang.set()


def test_records_that_wait_for_a_slow_tracker_are_written_together(tmp_path):
    calls: list[int] = []
    seen: list[Any] = []
    first, go = threading.Event(), threading.Event()

    class Slow(Recorder):
        def write(self, records):
            calls.append(len(records))
            first.set()
            go.wait()
            super().write(records)

    trackers = Trackers(("mlflow",), facts_of(tmp_path), lambda *_: Slow(seen))
    trackers.write(0, {})
    first.wait()
    for step in range(1, 500):
        trackers.write(step, {})
    trackers.tag({"a": "b"})
    trackers.write(500, {})
    go.set()
    trackers.status = FINISHED
    trackers.close()
    assert calls == [1, 499, 1]
    assert seen == [*range(500), {"a": "b"}, 500, FINISHED]


@pytest.mark.timeout(60)  # each bound alone would be longer
@pytest.mark.parametrize("kind", ["answers late", "fails late"])
def test_the_end_of_a_run_waits_for_all_trackers_within_one_bound(kind, tmp_path, monkeypatch):
    """Every call makes progress, but the queue would take hours."""
    monkeypatch.setattr(BackgroundTracker, "END_S", 1.0 if kind == "answers late" else 3600.0)
    monkeypatch.setattr(BackgroundTracker, "FAILED_S", 0.3)
    monkeypatch.setattr(BackgroundTracker, "FAILURES", 10**6)

    class Late(Recorder):
        def log_folder(self, name, folder):
            time.sleep(0.2)
            if kind == "fails late":
                time.sleep(0.4)
                raise ConnectionError("read timed out")

    trackers = Trackers(("tensorboard", "mlflow", "wandb"), facts_of(tmp_path), lambda *_: Late([]))
    for _ in range(1000):
        trackers.log_folder("model", tmp_path)
    trackers.status = FINISHED
    trackers.close()
    assert State(tmp_path).get("wandb")["missed"] > 900


def test_the_circuit_opens_after_failures_and_closes_after_the_pause(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(BackgroundTracker, "PAUSE_S", 0.2)
    tried: list[int] = []
    seen: list[Any] = []

    class Flaky(Recorder):
        def write(self, records):
            tried.append(records[0][0])
            if records[0][0] < 100:
                raise ConnectionError("no route to host")
            super().write(records)

    trackers = Trackers(("mlflow",), facts_of(tmp_path), lambda *_: Flaky(seen))
    for step in range(3):
        trackers.write(step, {})
        while len(tried) <= step:
            time.sleep(0.01)
    for step in range(3, 20):
        trackers.write(step, {})
    time.sleep(0.3)
    assert tried == [0, 1, 2]  # the rest came while the circuit was open
    trackers.write(100, {})
    trackers.status = FINISHED
    trackers.close()
    assert seen == [100, FINISHED]
    assert State(tmp_path).get("mlflow")["missed"] == 20
    assert capsys.readouterr().err.count("no route to host") == 1


def test_a_tracker_that_cannot_be_opened_is_left_alone_for_a_while(tmp_path, capsys):
    opened = []

    def make(*_):
        opened.append(1)
        raise SystemExit("wandb: no")

    trackers = Trackers(("wandb",), facts_of(tmp_path), make)
    for step in range(20):
        trackers.write(step, {})
    trackers.close()
    assert len(opened) == 1
    assert State(tmp_path).get("wandb")["missed"] == 20


def test_mistakes_are_said_before_any_compute(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"trackers.*did you mean 'mlflow'"):
        config_for(folders, ("mlfow",))
    assert make_config({}, ["--config.trackers=mlflow,wandb"]).trackers == ("mlflow", "wandb")
    with pytest.raises(UserError, match="tensorboard appends to files"):
        tracking.check_trackers(("tensorboard",), "gs://bucket/run")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb isn't installed; pip install"):
        train(config_for(folders, ("wandb",)), tmp_path, quiet=True)
    with pytest.raises(UserError, match="holds no run"):
        sync(tmp_path)


def test_a_dirty_work_tree_is_recorded_and_warned_of(folders, tmp_path, monkeypatch, capsys):
    """In a git repository of the test's own: clean, then with a change that no commit holds."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "model.py").write_text("a = 1\n")
    git = ["git", "-C", str(code), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr("clip_har_jax.trainer.provenance.ROOT", code)
    warned = []
    for name in ("clean", "dirty"):
        result = train(config_for(folders, (), num_steps=1), tmp_path / name)
        warned.append("uncommitted changes" in capsys.readouterr().err)
        assert result.model is not None
        record = json.loads((result.model / "run.json").read_text())
        assert record["git_dirty"] is (name == "dirty") and len(record["git_sha"]) == 40
        (code / "model.py").write_text("a = 2\n")
    assert warned == [False, True]


def test_sync_on_the_command_line(tmp_path):
    command = [sys.executable, "scripts/sync.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir=") and done.stderr.count("\n") == 1


def test_wandb_says_in_one_line_why_it_took_nothing(environment, tracked, monkeypatch, refusing_server):
    monkeypatch.setenv("WANDB_BASE_URL", refusing_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(UserError, match=r"^wandb: offline-run-\S+ wasn't uploaded: ") as refused:
        sync(tracked.workdir, ["wandb"])
    assert "\n" not in str(refused.value) and "0" * 40 not in str(refused.value)
