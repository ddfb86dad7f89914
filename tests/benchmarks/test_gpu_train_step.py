"""The GPU benchmark: its code path on a CPU with a very small model, and that it claims nothing without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from PIL import Image

from benchmarks.gpu import Child
from benchmarks.gpu_train_step import BATCH_SIZES, measure, print_table, write_photographs
from clip_har_jax.data.sources import make_source
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.families import NAMED_SIZES

ROOT = Path(__file__).resolve().parents[2]
CLIP = CLIPConfig(
    TextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, context_length=6),
    VisionConfig(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, image_size=16, patch_size=8),
    projection_dim=8,
)


def test_measure(tmp_path, capsys):
    write_photographs(tmp_path, count=6, size=(60, 40))
    source = make_source(f"folder:{tmp_path}", "train", (), several_classes=True)
    assert len(source) == 6
    values = measure(jax.devices()[1], CLIP, source, batch_size=4, steps=3, num_workers=0)
    assert values["batch_size"] == 4
    assert values["images_per_s"] > 0 and values["resident_images_per_s"] > 0
    assert 0 <= values["data_wait_fraction"] < 1
    assert values["mfu"] is None and values["mfu_resident"] is None  # a CPU's peak isn't known
    assert values["skipped_steps"] == 0  # bfloat16 stays finite
    print_table({"tiny": values})
    assert "tiny" in capsys.readouterr().out


def test_photographs_weigh_as_much_as_real_ones(tmp_path):
    write_photographs(tmp_path, count=2)
    for path in tmp_path.rglob("*.jpg"):
        assert 40_000 < path.stat().st_size < 160_000  # of 500 x 375 px
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))


def test_all_models_are_named_sizes():
    assert set(BATCH_SIZES) <= set(NAMED_SIZES)


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--models=ViT-B/17"], 2)])
def test_the_command_without_a_gpu(flags, code):
    command = [sys.executable, "-m", "benchmarks.gpu_train_step", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == code
    if code == 0:
        said, result = done.stdout.splitlines()
        assert said.startswith("no GPU here")
        assert json.loads(result) == {"benchmark": "gpu_train_step", "ratio": None, "device": None, "models": {}}
    else:
        assert done.stderr.splitlines() == ["error: --models=ViT-B/17: did you mean 'ViT-B/16'?"]


@pytest.mark.slow
def test_all_of_the_gpu_benchmark_on_a_cpu(tmp_path):
    """With very small models; torch's side only where this environment has torch, and the result says so."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    flags = ["--tiny", f"--output={tmp_path}", "--steps=2", "--rounds=2", "--budget_s=1800"]  # GPUs are faster
    command = ["bash", "benchmarks/gpu.sh", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parity"]["passed"], done.stdout
    values = result["models"]["tiny"]
    assert set(values["errors"]) <= {"torch"}, values["errors"]
    assert ("torch" in values["errors"]) == (values["ratio"] is None)
    assert done.returncode == 0, done.stdout
    assert values["images_per_s"] > 0 and values["fed_images_per_s"] > 0 and values["compile_s"] > 0
    assert 0 <= values["data_wait_fraction"] < 1
    assert values["mfu"] is None and values["flash_attention"] is None  # nothing is claimed on a CPU
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    assert "| tiny |" in (tmp_path / "gpu.md").read_text()


def test_the_gpu_benchmark_without_a_gpu(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", f"--output={tmp_path}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.startswith("no GPU here")
    assert json.loads(done.stdout.splitlines()[-1])["models"] == {}


def test_a_part_ends_at_its_deadline(tmp_path):
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", time.monotonic() + 0.5, {})
    with pytest.raises(RuntimeError, match="time was over"):
        child.ask("")
    child.close()


def test_a_part_that_fails_says_why(tmp_path):
    child = Child([sys.executable, "-c", "raise SystemExit('no kernel')"], tmp_path / "log", time.monotonic() + 60, {})
    with pytest.raises(RuntimeError, match="exit code 1: no kernel"):
        child.ask("")
    child.close()


# Imports the benchmark's way where only these packages, what they require, and the wheels of gpu.sh can be found.
ON_THE_MACHINE = """
import re, sys
from importlib import metadata
from packaging.requirements import Requirement

known, open_ = set(), [(name, "") for name in "MACHINE".split()]
while open_:
    name, extra = open_.pop()
    if (name, extra) in known:
        continue
    known.add((name, extra))
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    for requirement in map(Requirement, requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            needed = re.sub("[-_.]+", "-", requirement.name).lower()
            open_ += [(needed, each) for each in ("", *requirement.extras)]
found = {name for name, _ in known} | set("WHEELS".split())
tops = {
    top for top, names in metadata.packages_distributions().items()
    if not {re.sub("[-_.]+", "-", name).lower() for name in names} & found
} - {"clip_har_jax", "benchmarks", "tests"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in tops and "jaxtyping" not in sys._getframe(2).f_globals.get("__name__", ""):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
import benchmarks.gpu
import benchmarks.gpu_train_step
import clip_har_jax.data.batch_workers, clip_har_jax.data.pipeline, clip_har_jax.data.sources
import clip_har_jax.parallel.topology, clip_har_jax.parallel.xla_flags, clip_har_jax.training.program
from clip_har_jax.config import make_config
make_config({"model": {"compute_dtype": "bfloat16"}})
import tests.models.test_parity
print("all found")
"""
MACHINE = (
    "jax flax optax orbax-checkpoint transformers onnx onnxruntime safetensors tokenizers opencv-python-headless "
    "pyarrow etils jaxtyping numpy pillow pip setuptools packaging"
)


def test_the_gpu_benchmark_needs_no_more_than_the_machine_and_the_wheels_have():
    (wheels,) = re.findall(r'^packages="(.*)"$', (ROOT / "benchmarks" / "gpu.sh").read_text(), re.MULTILINE)
    program = ON_THE_MACHINE.replace("MACHINE", MACHINE).replace("WHEELS", wheels)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("all found"), done.stderr[-1500:]
