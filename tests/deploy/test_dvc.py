"""`dvc repro` in a copy of the project: it runs, runs once, continues what was killed, and one digest goes through."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clip_har_jax import bundle

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = {"num_steps": 8, "global_batch_size": 16, "eval_every_steps": 4}


class Project:
    """A copy of the project, in a git repository of its own, with small settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.set_params(TINY)
        self.run("git", "init", "-q")
        self.commit()

    @property
    def environment(self):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "PYTHONPATH": str(self.folder), "DVC_NO_ANALYTICS": "1"}

    def set_params(self, values):
        params = yaml.safe_load((self.folder / "params.yaml").read_text())
        params["train"] |= values
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def run(self, *command):
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def commit(self):
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "state")

    def json(self, name):
        return json.loads((self.folder / "runs" / "dvc" / name).read_text())

    @property
    def digest(self):
        return self.json("train/model/manifest.json")["digest"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Reproduced once, and committed."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.run("dvc", "repro")
    project.commit()
    return project


def test_the_second_repro_does_nothing(project):
    said = project.run("dvc", "repro")
    assert "Running stage" not in said and "up to date" in said


def test_the_remote_keeps_data_and_models(project, tmp_path):
    done = subprocess.run(["dvc", "push"], cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode != 0 and "no remote" in done.stderr  # it says so, and nothing is lost
    project.run("dvc", "remote", "add", "-d", "local", str(tmp_path / "store"))
    project.run("dvc", "push")
    digest = project.digest
    shutil.rmtree(project.folder / ".dvc" / "cache")
    shutil.rmtree(project.folder / "runs" / "dvc" / "train" / "model")
    project.run("dvc", "pull")
    assert bundle.verify(project.folder / "runs" / "dvc" / "train" / "model") == digest


def test_one_digest_goes_through(project, tmp_path, monkeypatch):
    """In the model folder, DVC's lock, the registry, the model card and the server."""
    from fastapi.testclient import TestClient

    from clip_har_jax.mlops.card import make_card
    from clip_har_jax.mlops.model_registry import open_registry
    from serving.app import make_app
    from serving.settings import Settings

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    runs = project.folder / "runs" / "dvc"
    digest = bundle.verify(runs / "train" / "model")
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())
    for stage in ("evaluate", "export"):
        assert lock["stages"][stage]["params"]["runs/dvc/train/model/manifest.json"] == {"digest": digest}
    assert project.json("test/metrics.json")["model_digest"] == digest
    assert project.json("export/manifest.json")["source"] == digest

    registry = open_registry("har")
    version = registry.register(runs / "train" / "model", runs / "export", runs / "test")
    assert version.tags["digest"] == digest
    assert version.tags["run_id"] == project.json("train/run.json")["run_id"]
    assert f"`{digest}`" in make_card(runs / "train" / "model", project.json("test/metrics.json"), "me/har")

    from clip_har_jax.mlops.gates import Gates

    checks = registry.promote("1", "champion", Gates(max_latency_ms=60_000.0))
    assert [(check.name, check.passed) for check in checks] == [("parity", True), ("latency", True)]
    registry.pull("champion", "export", tmp_path / "served")
    settings = Settings(model=tmp_path / "served", name="har", decode_processes=1)
    with TestClient(make_app(settings), base_url="http://127.0.0.1") as client:
        deadline = time.monotonic() + 60
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        said = client.get("/v2/models/har").json()["parameters"]
    assert said["model_digest"] == digest
    assert said["digest"] == version.tags["export_digest"]


def test_an_experiment_changes_what_its_parameter_says(project):
    before, metrics = project.digest, project.json("test/metrics.json")
    project.run("dvc", "exp", "run", "-S", "train.learning_rate=0.0005")
    assert project.digest != before
    changed = json.loads(project.run("dvc", "metrics", "diff", "--json"))["runs/dvc/test/metrics.json"]
    assert changed["nll"]["old"] == metrics["nll"] and changed["nll"]["new"] == project.json("test/metrics.json")["nll"]
    project.run("dvc", "plots", "diff")
    page = (project.folder / "dvc_plots" / "index.html").read_text()
    assert "train/loss" in page and "confusion_matrix" in page


def test_a_killed_training_continues_under_repro(project):
    """SIGKILL to all of `dvc repro` while it trains; the next one goes on in the same run."""
    project.set_params({"num_steps": 4000, "learning_rate": 0.003})
    workdir = project.folder / "runs" / "dvc" / "train"

    def record():
        path = workdir / "run.json"
        return json.loads(path.read_text()) if path.exists() else {"run_id": old, "starts": 0}

    def repro_until(reached):
        with subprocess.Popen(
            ["dvc", "repro", "train"],
            cwd=project.folder,
            env=project.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            while not reached():
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)

    old = project.json("train/run.json")["run_id"]

    def has_checkpoint():
        """Whole is what has its final name; the manifest comes before."""
        return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))

    repro_until(lambda: record()["run_id"] != old and has_checkpoint())
    killed = record()
    assert killed["starts"] == 1
    repro_until(lambda: record()["starts"] == 2)
    assert record()["run_id"] == killed["run_id"] and record()["last_step"] >= TINY["eval_every_steps"]
