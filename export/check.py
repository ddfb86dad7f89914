"""Run a format as its users will: in a new process, with only the exported files.

python -m export.check FOLDER FORMAT INPUTS.npz OUTPUTS.npz
"""

import sys
from pathlib import Path

import numpy as np

from clip_har_jax import cli
from clip_har_jax.errors import UserError
from clip_har_jax.inference import golden
from clip_har_jax.inference.exported import ExportedBackend
from clip_har_jax.inference.runtimes import Graphs
from export.parity import run_cases

LARGE_BYTES = 2 * 10**9  # size of a format's files from which its graphs are opened one at a time


def main() -> int:
    folder, name, inputs, outputs = sys.argv[1:]
    graphs, fault = Graphs(Path(folder), name), ""
    if (Path(folder) / golden.FILE).is_file():
        backend = ExportedBackend(Path(folder), name, multi_label=True)
        graphs = backend.graphs
        graphs.one_at_a_time = sum(path.stat().st_size for path in graphs.folder.iterdir()) > LARGE_BYTES
        try:
            golden.check(backend)
        except UserError as error:  # reported by the parent, with the difference to the model
            fault = str(error)
    with np.load(inputs) as given:
        np.savez(outputs, fault=fault, **run_cases(graphs.run, dict(given), graphs.signatures))  # type: ignore[arg-type]  # as in run.py
    return 0


if __name__ == "__main__":
    cli.run(main)
