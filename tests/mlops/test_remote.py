"""Calls to services: an error is one line, a race is tried again, what doesn't answer is given up in bounded time.

Real processes, a port that nobody listens on, and a server that accepts connections and never answers.
"""

import contextlib
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip_har_jax import remote
from clip_har_jax.errors import UserError
from clip_har_jax.mlops.model_registry import open_registry
from tests.support.model_folders import write_model

ROOT = Path(__file__).parents[2]
LABELS = ("cycling", "running", "sleeping")
SERVICE = remote.RemoteService("the store", "try again", is_race=lambda error: "locked" in str(error))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / str(i) / "model", LABELS, temperature) for i, temperature in enumerate((1.0, 2.0))]


def start_register(model, uri, folder, *more):
    command = [sys.executable, ROOT / "scripts" / "registry.py", "register", f"--model={model}", *more]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def silent_server():
    """Accept connections and never answer."""
    held = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    held.append(listening.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in held:
        connection.close()


def test_two_first_users_of_a_store_both_register(models, tmp_path):
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    both = [start_register(model, uri, tmp_path) for model in models]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {said.split(",")[0] for said, _ in outputs} == {"version 1 of har", "version 2 of har"}
    assert not list(tmp_path.glob(".*.partial*"))


@pytest.mark.slow
def test_two_that_register_the_same_model_make_one_version(models, tmp_path):
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    both = [start_register(models[0], uri, tmp_path) for _ in range(2)]
    said = {process.communicate()[0].split(",")[0] for process in both}
    assert said == {"version 1 of har"}


@pytest.mark.slow
def test_a_first_use_that_is_killed_leaves_no_half_store(models, tmp_path):
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    first = start_register(models[0], uri, tmp_path)
    while not list(tmp_path.glob(".new.db*partial")):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert not (tmp_path / "new.db").exists()
    second = start_register(models[0], uri, tmp_path)
    assert second.communicate()[0].startswith("version 1 of har")
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db")) as store:
        assert store.execute("select count(*) from model_versions").fetchone() == (1,)


@pytest.mark.timeout(60)  # without the bound it would wait for good
@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_server_that_is_down_is_one_line_within_the_bound(kind, monkeypatch):
    with contextlib.ExitStack() as stack:
        if kind == "silent":
            address = stack.enter_context(silent_server())
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UserError, match=r"^the store: .*; try again$") as told:
            SERVICE.check_reachable(f"{address}/health", timeout_s=1.0)
        assert "\n" not in str(told.value)


def test_a_certificate_of_an_unknown_authority_is_an_answer(tmp_path):
    """The service's own client may know the authority."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        SERVICE.check_reachable(f"https://127.0.0.1:{listening.getsockname()[1]}/health")
        thread.join()


def test_a_store_that_is_no_store_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'text.db'}")
    with pytest.raises(UserError, match=r"^MLflow at sqlite:///") as told:
        open_registry()
    assert "\n" not in str(told.value)


def test_a_race_is_tried_again_and_other_errors_are_not():
    calls = []

    def flaky(error):
        calls.append(error)
        if len(calls) < 3:
            raise RuntimeError(error)
        return "done"

    assert SERVICE.call(flaky, "database is locked") == "done"
    calls.clear()
    with pytest.raises(UserError, match=r"^the store: broken; try again$"):
        SERVICE.call(flaky, "broken")
    assert calls == ["broken"]


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (
            "NewConnectionError(\"HTTPConnection(host='h', port=1): Failed to establish a new connection: "
            '[Errno 111] Connection refused")',
            "Failed to establish a new connection: Connection refused",
        ),
        (
            "ReadTimeoutError(\"HTTPConnectionPool(host='h', port=1): Read timed out. (read timeout=20)\")",
            "Read timed out. (read timeout=20)",
        ),
    ],
)
def test_the_cause_of_a_failed_request_is_told_not_its_address(cause, line):
    """Such a message holds the whole URL, twice, before its cause: more than a line."""
    url = "/api/2.0/mlflow/runs/log-batch?" + "x" * 200
    error = Exception(
        f"API request failed with exception Pool(host='h'): Max retries exceeded: {url} (Caused by {cause})"
    )
    assert remote.one_line(error) == line


def test_no_secret_of_an_address_is_told():
    error = RuntimeError("GET https://me:hunter2@host/path?token=abc&x=1 failed\nsecond line")
    assert remote.one_line(error) == "GET https://host/path?token=...&x=1 failed"
    assert remote.one_line(RuntimeError("Failures:\nfile a: No space left")) == "file a: No space left (Failures)"
    service = remote.RemoteService("MLflow at postgresql://me:hunter2@host/db", "try again")
    assert "hunter2" not in str(service.failed(error))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("GET /a?access_token=s3cret&x=1", "GET /a?access_token=...&x=1"),
        ("hf_token=s3cret refused", "hf_token=... refused"),
        ("client_secret=s3cret", "client_secret=..."),
        ("PUT /blob?sv=2&sig=s3cret&se=3", "PUT /blob?sv=2&sig=...&se=3"),
        ("?X-Amz-Signature=s3cret&y=2", "?X-Amz-Signature=...&y=2"),
        ("Authorization: Bearer s3cret refused", "Authorization: ... refused"),
        ("{'Authorization': 'Basic s3cret'}", "{'Authorization': '...'}"),
        ("sent Bearer s3cret-s3cret-s3cret", "sent Bearer ..."),
        ("Bearer authentication failed; num_tokens=77", "Bearer authentication failed; num_tokens=77"),
    ],
)
def test_no_secret_of_a_query_or_header_is_told(text, told):
    assert remote.one_line(RuntimeError(text)) == told


@pytest.mark.timeout(60)  # its client's own tries take minutes
@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_an_object_store_that_is_down_is_one_line_within_the_bound(kind, monkeypatch):
    from clip_har_jax.trainer.workdir import make_workdir

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(silent_server()) if kind == "silent" else "http://127.0.0.1:9"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(UserError, match=r"^gs://bucket/run: .*; check the network, the bucket's name .* whole$"):
            make_workdir("gs://bucket/run")


@pytest.mark.parametrize("workdir", ["gopher://bucket/run", "gs:/bucket/run"])
def test_an_address_of_no_store_is_one_line(workdir, tmp_path, monkeypatch):
    from clip_har_jax.trainer.workdir import make_workdir

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^--workdir={workdir}: "):
        make_workdir(workdir)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError("Forbidden: bucket/run"), ValueError("UNAVAILABLE: CURL error[7]: Couldn't connect")]
)
def test_what_an_object_store_raises_in_a_run_is_one_line(error):
    with (
        pytest.raises(UserError, match=r"^gs://bucket/run: .*stays whole$"),
        remote.store_faults("gs://bucket/run"),
    ):
        raise error
    with pytest.raises(ValueError, match="a program's own"), remote.store_faults("gs://bucket/run"):
        raise ValueError("a program's own")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_hub_that_is_down_gives_what_is_here_or_one_line(kind, tmp_path, monkeypatch):
    """The model that was downloaded before still opens."""
    from huggingface_hub import constants

    from clip_har_jax.models.resolve import resolve_folder

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(silent_server()) if kind == "silent" else "http://127.0.0.1:9"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(UserError, match=f"^owner/name: the Hub at {address}: .*; check the name and the network"):
            resolve_folder("owner/name")
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        assert resolve_folder("owner/name") == snapshot


@pytest.mark.timeout(60)  # its client would go on for minutes, or for good
def test_a_store_that_answers_no_longer_during_a_call_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "OUTAGE_S", 0.3)
    monkeypatch.setattr(remote, "ASK_S", 0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{probe.getsockname()[1]}")
        hang = threading.Event()
        with pytest.raises(UserError, match=r"^gs://bucket/run: Connection refused; .*what was saved stays whole$"):
            remote.while_reachable("gs://bucket/run", hang.wait)
        hang.set()
        assert remote.while_reachable("gs://bucket/run", lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            remote.while_reachable("gs://bucket/run", lambda: 1 // 0)


@pytest.mark.timeout(60)  # the wait for the hanging call would never end
def test_after_an_error_a_store_is_left_in_bounded_time(monkeypatch):
    monkeypatch.setattr(remote, "CLOSE_S", 0.1)
    hang, closed = threading.Event(), []
    remote.leave("gs://bucket/run", OSError("broken"), hang.wait)
    hang.set()
    for address, error in (("gs://bucket/run", None), ("runs/mine", OSError("broken"))):
        with pytest.raises(ZeroDivisionError):  # only a store's closing may be cut short
            remote.leave(address, error, lambda: 1 // 0)
    remote.leave("gs://bucket/run", OSError("broken"), lambda: closed.append(1))
    assert closed == [1]
