"""Other families of models and layouts, from a folder to a trained, exported and served model."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from clip_har_jax import Predictor, load_config, train
from clip_har_jax.models.factory import load, make_base
from clip_har_jax.models.params import init_params
from clip_har_jax.models.pretrained import read_config, write_params
from clip_har_jax.models.siglip import FlaxSiglipModel
from export.run import ExportOptions, export_model
from tests.support.make_golden import GOLDEN
from tests.support.model_folders import write_images
from tests.support.open_clip_folders import write_case
from tests.support.runs import LABELS, write_config
from tests.support.serving_setup import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def write_siglip(folder: Path) -> Path:
    base = make_base("siglip-tiny", [f"a person {label}" for label in LABELS])
    write_params(folder, base.config, init_params(base.config, 0))
    base.tokenizer.save(folder)
    base.preprocess.save(folder)
    return folder


def write_open_clip(folder: Path, name: str) -> Path:
    return write_case(shutil.copytree(GOLDEN / f"open_clip_{name}", folder), {"clip": "gelu"}.get(name, name))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("siglip", ("flyp", "sigmoid")), ("clip", ("full", "")), ("clipa", ("full", "")), ("siglip", ("lora", ""))],
)
def test_folder_is_trained_exported_and_served(kind: str, method: tuple[str, str], tmp_path: Path) -> None:
    folder = write_siglip(tmp_path / "base") if kind == "siglip" else write_open_clip(tmp_path / "base", kind)
    photos = write_images(tmp_path / "photos", LABELS, per_class=8)
    config = write_config(tmp_path, (folder, photos), num_steps=4)
    overrides = [f"--config.method.name={method[0]}", *([f"--config.method.loss={method[1]}"] if method[1] else [])]
    train(load_config(str(config), overrides), tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert read_config(model).vision == read_config(folder).vision
    if kind == "siglip":
        before, after = (load(str(path)).model for path in (folder, model))
        assert isinstance(before, FlaxSiglipModel) and isinstance(after, FlaxSiglipModel)
        if method[1] == "sigmoid":
            assert float(before.logit_bias[...]) != float(after.logit_bias[...])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax2onnx warns of what it uses itself
        options = ExportOptions(f"folder:{photos}", num_examples=8)
        parity = export_model(str(model), ("onnx", "stablehlo"), tmp_path / "export", options)
    assert all(of["passed"] for of in parity.values()), parity
    photo = next((photos / LABELS[0]).iterdir())
    expected = Predictor(str(model)).predict([str(photo)])[0]
    with running(tmp_path / "export") as (client, _):
        answer = client.post("/v1/predict", files={"image": photo.read_bytes()})
        assert answer.status_code == 200, answer.text
        scores = {one["label"]: one["score"] for one in answer.json()["top"]}
        assert scores.keys() <= set(LABELS)
        for label, score in expected.top:
            np.testing.assert_allclose(scores[label], score, atol=1e-4)
        assert client.post("/v1/explain", files={"image": photo.read_bytes()}).status_code == 200
