"""The benchmark of reading pairs runs, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pair_shards import write_shards

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_sides_read_the_same_shards(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.pair_shards",
        f"--data={write_shards(tmp_path, (30, 20))}",
        "--rounds=1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "50 pairs in 2 shards" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "pair_shards" and result["ratio"] > 0
    assert set(result["pairs_per_cpu_s"]) == {"read", "shuffled"}
