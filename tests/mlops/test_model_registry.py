"""The registry on a real MLflow store: what goes in comes out, gates refuse, and what was tampered with is refused."""

import json
import runpy
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.significance import mean_interval
from clip_har_jax.files import write_json
from clip_har_jax.mlops.card import check_card, make_card
from clip_har_jax.mlops.gates import Gates
from clip_har_jax.mlops.model_registry import open_registry
from clip_har_jax.text import make_prompts
from tests.support.model_folders import write_model
from tests.support.registry_versions import LABELS, make_version

ROOT = Path(__file__).parents[2]
# MLflow's own query of its database.


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        patch.chdir(root)
        yield root


@pytest.fixture
def registry(store, request):
    return open_registry(f"har-{request.node.name}")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_version(tmp_path_factory.mktemp("good"), 1.0, right=120)


@pytest.fixture(scope="module")
def better(tmp_path_factory):
    return make_version(tmp_path_factory.mktemp("better"), 2.0, right=150)


def artifact(version, name):
    """Where the registry keeps a file."""
    return Path(version.source.removeprefix("file://")) / name


def test_a_version_goes_round(registry, good, better, tmp_path):
    first = registry.register(**good)
    assert first.number == 1
    assert first.digest == json.loads((good["model"] / "manifest.json").read_text())["digest"]
    assert first.tags["top1"] == "0.6000"
    assert registry.register(**good) == first  # the same again is the same version
    second = registry.register(**better)
    assert all(check.passed for check in registry.promote("1", "champion", Gates()))
    checks = registry.promote("2", "champion", Gates())
    assert [(check.name, check.passed) for check in checks] == [("parity", True), ("gain", True)]
    assert registry.find("champion") == registry.find("2")
    pulled = registry.pull("champion", "export", tmp_path / "served")
    assert pulled.digest == second.digest
    assert bundle.verify(tmp_path / "served") == second.tags["export_digest"]
    assert json.loads((tmp_path / "served" / "manifest.json").read_text())["source"] == second.digest

    assert registry.rollback("champion").number == 1
    registry.pull("champion", "export", tmp_path / "served")
    assert bundle.verify(tmp_path / "served") == first.tags["export_digest"]
    with pytest.raises(UserError, match="no way back"):
        registry.rollback("champion")


def test_gates_refuse(registry, good, better, tmp_path):
    registry.register(**better)
    registry.register(**good)
    registry.register(**make_version(tmp_path / "odd", 3.0, right=190, fingerprint="other"))
    registry.register(**make_version(tmp_path / "inexact", 4.0, right=190, parity=False))
    registry.promote("1", "champion", Gates())

    def refused(version, gates=Gates()):  # noqa: B008
        return {check.name: check.detail for check in registry.promote(version, "champion", gates) if not check.passed}

    assert "-0.15" in refused("2")["gain"]
    assert "other data" in refused("3")["gain"]
    assert refused("4") == {"parity": "onnx failed"}
    assert refused("4", Gates(min_retention=0.9))["retention"].startswith("the training measured none")
    assert registry.find("champion").number == 1
    with pytest.raises(UserError, match="champion already"):
        registry.promote("1", "champion", Gates())

    kept = make_version(tmp_path / "kept", 5.0, right=190)
    write_json(tmp_path / "kept" / "retention.json", {"before": 0.8, "after": 0.72})
    registry.register(**kept)
    assert "0.900 is left" in refused("5", Gates(min_retention=0.95))["retention"]
    assert not refused("5", Gates(min_retention=0.85))


def test_the_interval_of_a_gain():
    """Against the formula: mean and standard error of paired differences."""
    gains = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 160)
    low, high = mean_interval(gains)
    error = gains.std() / np.sqrt(len(gains))
    assert low == pytest.approx(gains.mean() - 1.96 * error, abs=0.01)
    assert high == pytest.approx(gains.mean() + 1.96 * error, abs=0.01)


@pytest.mark.parametrize("change", ["a byte", "the manifest too"])
def test_a_tampered_folder_is_refused(registry, good, tmp_path, change):
    version = registry.register(**good)
    registry.promote("1", "champion", Gates())
    registry.pull("champion", "export", tmp_path / "served")
    before = bundle.verify(tmp_path / "served")
    victim = artifact(version, "export")
    (victim / "actions.json").write_text((victim / "actions.json").read_text().replace("cycling", "boxing"))
    if change == "the manifest too":
        (victim / "manifest.json").unlink()
        bundle.seal(victim, version.digest)
    with pytest.raises(UserError, match=r"version 1 .* tampered with"):
        registry.pull("champion", "export", tmp_path / "served")
    assert bundle.verify(tmp_path / "served") == before  # what is served stays


def test_mistakes_are_one_line(registry, good, better, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        registry.find("champion")
    registry.register(**good)
    with pytest.raises(UserError, match=r"no alias or version 'champion'; accepted: '1'"):
        registry.pull("champion", "export", tmp_path / "served")
    registry.promote("1", "champion", Gates())
    with pytest.raises(UserError, match="did you mean 'champion'"):
        registry.find("champoin")
    with pytest.raises(UserError, match="made from the model"):
        registry.register(good["model"], better["export"], None)
    with pytest.raises(UserError, match="evaluate this one"):
        registry.register(good["model"], None, better["evaluation"])
    with pytest.raises(UserError, match="not sealed"):
        registry.register(write_model(tmp_path / "plain"), None, None)


def run_script(monkeypatch, *arguments):
    """Return a script in this process, since MLflow takes seconds to import; gives the exit code."""
    monkeypatch.setattr(sys, "argv", ["registry.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "registry.py"), run_name="__main__")
    return ended.value.code


def test_a_watch_follows_the_alias_and_tells_the_server(registry, good, better, tmp_path):
    told = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append((self.path, bundle.verify(tmp_path / "served")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    first, second = registry.register(**good), registry.register(**better)
    registry.promote("1", "champion", Gates())
    url = f"http://127.0.0.1:{server.server_address[1]}/reload"
    command = [sys.executable, str(ROOT / "scripts" / "registry.py"), "pull", f"--name={registry.name}", "--watch"]
    command += [f"--output={tmp_path / 'served'}", "--every_s=0.1", f"--reload_url={url}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert first.digest in watch.stdout.readline()
        while not told:
            time.sleep(0.01)
        registry.promote("2", "champion", Gates())
        assert second.digest in watch.stdout.readline()
        registry.rollback("champion")
        assert first.digest in watch.stdout.readline()
        while len(told) < 3:
            time.sleep(0.01)
        watch.terminate()
    server.shutdown()
    server.server_close()
    thread.join()
    assert told == [("/reload", v.tags["export_digest"]) for v in (first, second, first)]


def test_the_command_line(registry, good, monkeypatch, capsys):
    names = [f"--{name}={folder}" for name, folder in good.items()]
    assert run_script(monkeypatch, "list", f"--name={registry.name}") == 0
    assert "no version of" in capsys.readouterr().out
    assert run_script(monkeypatch, "register", f"--name={registry.name}", *names) == 0
    assert "version 1" in capsys.readouterr().out
    assert run_script(monkeypatch, "promote", f"--name={registry.name}", "--version=1", "--min_retention=0.9") == 1
    assert "REFUSED  retention" in capsys.readouterr().out
    assert run_script(monkeypatch, "list", f"--name={registry.name}") == 0
    assert registry.find("1").digest[:12] in capsys.readouterr().out
    assert run_script(monkeypatch, "pull", f"--name={registry.name}", "--output=served") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_the_card_says_what_was_measured(good):
    digest = json.loads((good["model"] / "manifest.json").read_text())["digest"]
    metrics = {
        "top1": 0.6,
        "top5": 1.0,
        "macro_f1": 0.5,
        "num_examples": 200,
        "data": "folder:/home/somebody/photos?split=test",
        "model_digest": digest,
        "per_class": {label: {"f1": 0.5} for label in LABELS},
    }
    card = make_card(good["model"], metrics, "me/har")
    check_card(card)
    assert "`folder:photos?split=test`" in card and "somebody" not in card
    assert "| top-1 | 0.600 |" in card and digest in card and "200 examples" in card
    tricky = metrics | {"per_class": {"<script>alert(1)</script> [x](y)": {"f1": 0.1}}}
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \[x\](y)" in make_card(good["model"], tricky, "me/har")
    with pytest.raises(UserError, match="are of the model"):
        make_card(good["model"], metrics | {"model_digest": "f" * 64}, "me/har")
    with pytest.raises(UserError, match="lacks ## Limits"):
        check_card(card.replace("## Limits", "## Other"))
    with pytest.raises(UserError, match="metadata lacks license"):
        check_card(card.replace("license: apache-2.0\n", ""))


def test_a_dry_run_writes_what_would_be_pushed(good, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), f"--model={good['model']}"]
    done = subprocess.run(
        [*command, "--repository=me/har", f"--dry_run={tmp_path / 'hub'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert bundle.verify(tmp_path / "hub") == bundle.verify(good["model"])
    check_card((tmp_path / "hub" / "README.md").read_text())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hub").vocab_size > 0
    done = subprocess.run([*command, "--repository=no name"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --repository=") and done.stderr.count("\n") == 1


def test_the_card_says_what_the_model_was_made_from(tmp_path):
    """A model like the demo's, trained on drawings from random weights, and a fine-tuned one."""
    data = {"train": {"spec": "synthetic", "num_examples": 100, "fingerprint": "a" * 64}}
    drawn = write_model(tmp_path / "drawn")
    bundle.write_actions(drawn, bundle.Actions(LABELS, make_prompts(LABELS)))
    write_json(drawn / "run.json", {"data": data, "start": {"model": "tiny", "weights": "random"}, "method": "full"})
    bundle.seal(drawn)
    metrics = {
        "top1": 0.033,
        "top1_interval": [0.006, 0.167],
        "baselines": {"chance": 1 / 3, "majority": 0.4},
        "num_examples": 30,
        "data": "synthetic",
        "model_digest": bundle.verify(drawn),
        "per_class": {label: {"f1": 0.5} for label in LABELS},
    }
    card = make_card(drawn, metrics, "me/drawn")
    assert "in drawings made by a program" in card and "from random weights (model size `tiny`)" in card
    assert "photo" not in card.lower() and "don't use it on pictures of real people" in card
    assert "It is worse than guessing (0.333) and the most frequent class (0.400)." in card

    tuned = write_model(tmp_path / "tuned")
    bundle.write_actions(tuned, bundle.Actions(LABELS, make_prompts(LABELS)))
    data["train"]["spec"] = "folder:/home/somebody/images"
    start = {"model": "openai/clip-vit-base-patch32", "weights": "pretrained"}
    write_json(
        tuned / "run.json",
        {"data": data, "start": start, "method": "lora", "baselines": {"zero_shot": 0.5, "data": "synthetic"}},
    )
    bundle.seal(tuned)
    better = metrics | {"top1": 0.9, "top1_interval": [0.85, 0.93], "model_digest": bundle.verify(tuned)}
    card = make_card(tuned, better, "me/tuned")
    assert "from the pretrained weights of `openai/clip-vit-base-patch32`, by the method `lora`" in card
    assert "drawings" not in card and "somebody" not in card
    other = make_card(tuned, better | {"data": "folder:other"}, "me/tuned")
    assert "the start without training" not in other  # it was measured on other images
    assert "It is better than guessing (0.333), the most frequent class (0.400) and the start without training" in card
