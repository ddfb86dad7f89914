"""configs/motion.py as a whole: its accuracy on held-out clips, and on reversed ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_script(name: str, *arguments: str) -> None:
    # On one device and with optimised code, as a person runs it: 700 steps take too long with the flags of the tests.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_video_model_learns_what_only_the_order_tells(tmp_path: Path) -> None:
    run_script("train.py", f"--config={ROOT / 'configs' / 'motion.py'}", f"--workdir={tmp_path / 'run'}")
    for spec in ("motion?split=test", "motion?split=test&reversed"):
        output = tmp_path / spec[-8:]
        run_script("evaluate.py", f"--model={tmp_path / 'run' / 'model'}", f"--data={spec}", f"--output={output}")
        assert json.loads((output / "metrics.json").read_text())["top1"] >= 0.9, spec
