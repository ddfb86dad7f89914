"""Metrics of a run whose work folder is in an object store."""

import socket
from pathlib import Path

import pytest
from etils import epath

from clip_har_jax import remote
from clip_har_jax.errors import UserError
from clip_har_jax.training.sinks import JsonlSink


@pytest.mark.timeout(60)
def test_metrics_give_up_a_store_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_S", 0.3)
    monkeypatch.setattr(remote, "ASK_S", 0.1)
    monkeypatch.setattr(JsonlSink, "UPLOAD_EVERY_S", 0.0)
    monkeypatch.setenv("EPATH_USE_TF", "false")  # as in a run
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with socket.socket() as probe, monkeypatch.context() as started:
        started.setattr(sink, "_remote", epath.Path("gs://bucket/run/metrics.jsonl"))  # the store answered at the start
        probe.bind(("127.0.0.1", 0))  # and doesn't listen
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(UserError, match=r"^gs://bucket/run/metrics.jsonl: Connection refused; .* stays whole$"):
            sink.write(1, {"train/loss": 0.5})
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'
