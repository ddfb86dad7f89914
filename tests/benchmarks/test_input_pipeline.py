"""The input benchmark runs, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.model_folders import write_images

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_measures_files_and_names_the_peers_that_are_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ("run", "sit"), 40)
    flags = [f"--data=folder:{tmp_path}/photos", "--rounds=1", "--epochs=2", f"--torch_python={tmp_path}/none"]
    command = [sys.executable, "-m", "benchmarks.input_pipeline", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "input_pipeline"
    assert result["ratio"] is None
    assert set(result["sides"]) == {"ours", "ours, 1 core", "1 core, a thread", "ours, threads", "ours, float"}
    for row in result["sides"].values():
        assert row["images_per_s"] > 0 and row["images_per_cpu_s"] > 0 and 20 < row["memory_mb"] < 1024
    assert "no torch to compare with" in done.stdout
