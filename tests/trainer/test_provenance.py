"""Which files make the code differ from its commit, and which distributions make an environment."""

import subprocess
from importlib import metadata

import pytest

from clip_har_jax.trainer import provenance


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Return a clean git repository that stands in for this code's own."""
    (tmp_path / "model.py").write_text("a = 1\n")
    (tmp_path / "notes.md").write_text("first\n")
    (tmp_path / ".gitignore").write_text("*.log\nbuild.py\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model.py", True),  # tracked
        ("notes.md", True),
        ("other.py", True),  # untracked code
        ("configs/mine.py", True),
        ("run.sh", True),
        ("my_images/cycling/1.jpg", False),  # untracked, and no code
        ("my_images/labels.csv", False),
        ("train.log", False),  # ignored
        ("build.py", False),
    ],
)
def test_tracked_files_and_untracked_code_count(code, name, changed):
    assert provenance.has_code_changes() is False
    (code / name).parent.mkdir(parents=True, exist_ok=True)
    (code / name).write_text("changed\n")
    assert provenance.has_code_changes() is changed


def test_code_without_a_repository_has_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.has_code_changes() is None


def test_distributions_are_named_as_their_metadata_do():
    """The fast reading of names and versions equals that of the standard library."""
    for item in metadata.distributions():
        assert provenance._requirement(item) == f"{item.metadata['Name']}=={item.version}"
