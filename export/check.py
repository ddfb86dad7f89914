"""Runs a format as its users will: in a fresh process, from the files alone, with the check of a server's load.

python -m export.check FOLDER FORMAT INPUTS.npz OUTPUTS.npz
"""

import sys
from pathlib import Path

import numpy as np

from clip_har_jax import cli
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import ExportedBackend
from export.parity import run_cases


def main() -> int:
    folder, name, inputs, outputs = sys.argv[1:]
    backend = ExportedBackend(Path(folder), name)
    golden.check(backend)
    with np.load(inputs) as given:
        np.savez(outputs, **run_cases(backend.graphs.run, dict(given)))  # type: ignore[arg-type]  # as in run.py
    return 0


if __name__ == "__main__":
    cli.run(main)
