"""Files are written whole or not at all, digests don't depend on how the bytes are given, bad JSON is one line."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from etils import epath

from clip_har_jax import files
from clip_har_jax.errors import UserError
from clip_har_jax.trainer.features import cached_features
from clip_har_jax.training.probe import LabeledFeatures
from tests.support.batches import ArraySource


def test_json_keeps_its_old_contents_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": "é"})
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_object(path) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with files.atomic(path) as first, files.atomic(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # the one that ended last
    assert list(tmp_path.iterdir()) == [path]


def write_number(folder: Path, value: int) -> None:
    files.write_text(folder / "x", str(value))


def write_features(folder: Path, value: int) -> None:
    """Keep features under one name for all values, as of two runs that compute the same."""
    found = LabeledFeatures(np.full((1, 2), value, np.float32), np.array([0], np.int32))
    cached_features(ArraySource(1), "digest", {"folder": str(folder)}, lambda: found)


@pytest.mark.parametrize("write", [write_number, write_features])
def test_a_file_is_locked_until_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, int], None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fsync = os.fsync

    def write_meanwhile(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write(tmp_path, 2)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    write(tmp_path, 1)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    ended_last = path.read_bytes()
    path.unlink()
    write(tmp_path, 1)
    assert path.read_bytes() == ended_last


def test_a_scratch_file_removed_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer takes it for a killed writer's, unless it holds the lock."""
    path, flock = tmp_path / "x", fcntl.flock

    def write_before(file: IO[bytes], operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        files.write_text(path, "before the lock")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", write_before)
    with files.atomic(path) as partial:
        assert path.read_text() == "before the lock"
        assert partial.exists()
        files.write_text(path, "after the lock")
        partial.write_text("last")
    assert path.read_text() == "last"


def test_a_failed_write_leaves_nothing_beside_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic(path) as partial:
        partial.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_is_of_the_bytes_however_they_come(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("aé".encode() * 1000)
    expected = hashlib.sha256("aé".encode() * 1000).hexdigest()
    assert files.sha256("aé" * 1000) == files.sha256(path.read_bytes()) == files.sha256(["aé"] * 1000) == expected
    assert {files.sha256_file(kind(path)) for kind in (str, Path, epath.Path)} == {expected}


@pytest.mark.parametrize(
    ("content", "reason"), [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "a JSON object is needed, not a list")]
)
def test_bad_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json: {reason}") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_none_or_an_error_as_asked(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "none") is None
    with pytest.raises(UserError, match="none: no such file"):
        files.read_object(tmp_path / "none")
