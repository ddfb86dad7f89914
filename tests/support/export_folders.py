"""Model folders whose parts all count, so that a fault in an exported graph shows."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from clip_har_jax import bundle
from clip_har_jax.inference.runtimes import Graphs
from clip_har_jax.models.head_file import write_head
from clip_har_jax.models.heads import HEADS, init_head
from clip_har_jax.models.params import init_temporal
from clip_har_jax.models.pretrained import read_config, read_params, write_params
from clip_har_jax.text import HAR15_PHRASES
from export.parity import Arrays, run_cases
from tests.support.model_folders import random_params

LABELS = tuple(HAR15_PHRASES)[:5]

# The parameter of each head that a test takes away.
HEAD_FAULTS = {
    "linear": "classes.bias",
    "mlp": "fc2.kernel",
    "cross_attention": "out.kernel",
    "adapter": "up.kernel",
    "tip_adapter": "values.kernel",
}


# What of each kind of model of clips a test takes away: a parameter of its clip graphs, by its beginning.
CLIP_FAULTS = {
    "mean": "head.classes.kernel",
    "head": "time_head.out.kernel",
    "st_adapter": "vision.layers.0.time.up.kernel",
    "divided": "vision.layers.0.time.out.kernel",
    "frame_attention": "head.score.kernel",
    "temporal": "head.out.kernel",
}
NUM_FRAMES = 4


def run_format(folder: Path, name: str, cases: Arrays) -> Arrays:
    """Return the outputs of a format for the cases, from this process; an export runs each in a process of its own."""
    graphs = Graphs(folder, name, threads=1)
    return run_cases(graphs.run, cases, graphs.signatures)


def write_clip_folders(folder: Path, heads: dict[str, Path], root: Path) -> dict[str, Path]:
    """Return models of clips by the names of `CLIP_FAULTS`: of each temporal kind, and with each head over frames."""
    folders = {}
    for name in CLIP_FAULTS:
        source = heads.get(name, folder)
        folders[name] = root / name
        shutil.copytree(source, folders[name], ignore=shutil.ignore_patterns("manifest.json"))
        if name not in heads:
            plain = read_config(folder)
            config = dataclasses.replace(plain, temporal=name)
            rng = np.random.default_rng(6)
            added = {
                key: (0.2 * rng.normal(size=value.shape)).astype(np.float32)
                for key, value in init_temporal(config, 0).items()
            }
            write_params(folders[name], config, read_params(folder, plain) | added)
        actions = bundle.read_actions(source)
        video = {"num_frames": NUM_FRAMES, "sampling": "uniform", "rate_hz": 4.0, "num_views": 1}
        bundle.write_actions(folders[name], dataclasses.replace(actions, video=video))
        bundle.seal(folders[name])
    return folders


def lively(folder: Path) -> Path:
    """Grow the folder's random weights, so that images differ in what the model sees in them."""
    config = read_config(folder)
    params = random_params(config, seed=1)
    params = {
        name: np.asarray(value) * (1.5 if name.endswith("kernel") else 1)
        + (
            (0.5 if "post_norm" in name else 0.1) * np.random.default_rng(len(name)).normal(size=value.shape)
            if name.endswith("bias")
            else 0
        )
        for name, value in params.items()
    }
    params["logit_scale"] = np.asarray(np.log(20.0))
    write_params(folder, config, {name: value.astype(np.float32) for name, value in params.items()})
    (folder / bundle.MANIFEST).unlink(missing_ok=True)
    bundle.seal(folder)
    return folder


def write_heads(folder: Path, root: Path) -> dict[str, Path]:
    """Return the model with each head, all of its parameters lively."""
    classes = np.random.default_rng(3).normal(size=(len(LABELS), 16))
    classes = (classes / np.linalg.norm(classes, axis=-1, keepdims=True)).astype(np.float32)
    folders = {}
    for name in HEADS:
        params = init_head(name, classes, 20.0, seed=4, hidden=6)
        rng = np.random.default_rng(5)
        params = {
            key: value + (0.2 * rng.normal(size=value.shape)).astype(np.float32) if value.ndim else value
            for key, value in params.items()
        }
        folders[name] = root / name
        shutil.copytree(folder, folders[name], ignore=shutil.ignore_patterns("manifest.json"))
        actions = bundle.read_actions(folder)
        bundle.write_actions(folders[name], dataclasses.replace(actions, head=name))
        write_head(folders[name], params)
        bundle.seal(folders[name])
    return folders
