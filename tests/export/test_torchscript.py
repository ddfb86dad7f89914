"""TorchScript of every head, proven in an environment that has torch beside the project's own packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.export_folders import HEAD_FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]

# Exports a model as it is and with each fault in what TorchScript is made of; prints which passed.
SIDE = """
import dataclasses, json, sys
from pathlib import Path
from export.model import open_model, read_images, write_contract
from export.run import make_proof, prove
from export.parity import FLOAT32, check_parity
from export.to_torch import TorchGraphs, write_torchscript

folder, photos, lost, scratch = sys.argv[1:]
model = open_model(folder)
proof = make_proof(model, *read_images(model, f"folder:{photos}", 8))
preprocess, params = model.backend.preprocess, model.head_params
backwards = {"mean": preprocess.mean[::-1], "std": preprocess.std[::-1]}
made_of = {
    "none": (preprocess, params),
    "changed mean": (dataclasses.replace(preprocess, mean=(0.0, 0.0, 0.0)), params),
    "swapped channel": (dataclasses.replace(preprocess, **backwards), params),
    "lost " + lost: (preprocess, params | {lost: -2 * params[lost]}),
}
passed = {}
for i, (fault, (settings, head_params)) in enumerate(made_of.items()):
    target = Path(scratch) / str(i)
    (target / "torchscript").mkdir(parents=True)
    write_contract(model, target)
    graphs = TorchGraphs(model.folder, settings, model.head, head_params, model.temperature)
    write_torchscript(graphs, [graph.name for graph in model.graphs], target / "torchscript")
    outputs = prove(target, "torchscript", proof.cases)
    passed[fault] = check_parity(proof.expected, outputs, FLOAT32, model.actions.labels, proof.true)["passed"]
print(json.dumps(passed))
"""


@pytest.fixture(scope="module")
def both_python(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Python that finds the project's packages first, and torch behind them."""
    root = tmp_path_factory.mktemp("both")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    paths = [path for path in sys.path if "site-packages" in path] + [str(Path(__file__).parents[2])]
    paths.append(str(next(Path(torch_python).parents[1].glob("lib/python*/site-packages"))))
    (next(root.glob("lib/python*/site-packages")) / "both.pth").write_text("\n".join(paths))
    return str(root / "bin" / "python")


@pytest.mark.parametrize("head", ["linear", "mlp", "cross_attention", "adapter", "tip_adapter"])
def test_torchscript_is_the_model_and_its_faults_are_caught(
    both_python: str,
    head_folders: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    head: str,
) -> None:
    command = [both_python, "-c", SIDE, str(head_folders[head]), str(photos), HEAD_FAULTS[head], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    passed = json.loads(done.stdout.splitlines()[-1])
    assert passed.pop("none") and passed and not any(passed.values()), passed
