"""Two processes that promote at once: a champion has always passed its gates against the one that it replaces."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_har_jax.mlops import model_registry
from clip_har_jax.mlops.gates import Gates, check_gates
from clip_har_jax.mlops.model_registry import open_registry
from tests.support.registry_versions import make_version

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Return a registry whose champion has 120 of 200 right, with two challengers that have 150 right each."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    registry = open_registry("har")
    for i, right in enumerate((120, 150, 150)):
        registry.register(**make_version(tmp_path / str(i), 1.0 + i, right))
    registry.promote("1", "champion", Gates())
    return registry


@pytest.mark.slow
def test_of_two_equal_challengers_one_is_promoted(registry, tmp_path):
    both = [
        subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "registry.py", "promote", f"--version={version}"],
            cwd=tmp_path,
            env=os.environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in (2, 3)
    ]
    said = [process.communicate()[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    promoted = 2 if both[0].returncode == 0 else 3
    assert registry.find("champion").number == promoted
    assert "REFUSED  gain: top-1 +0.0000" in "".join(said)


def test_a_champion_that_changes_during_the_checks_is_checked_against(registry, monkeypatch):
    """The alias moves between the checks and the promotion, as by another process."""
    moved: list[Path | None] = []

    def check_slowly(gates, candidate, champion):
        checks = check_gates(gates, candidate, champion)
        if not moved:
            moved.append(champion)
            registry.point("champion", registry.find("2"))
        return checks

    monkeypatch.setattr(model_registry, "check_gates", check_slowly)
    checks = registry.promote("3", "champion", Gates())
    assert {each.name: each.passed for each in checks} == {"parity": True, "gain": False}
    assert registry.find("champion").number == 2
