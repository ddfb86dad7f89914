"""Folders of an image tower alone, as transformers saves CLIPVisionModelWithProjection and SiglipVisionModel."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clip_har_jax import Predictor, bundle
from clip_har_jax.config import make_config
from clip_har_jax.errors import UserError
from clip_har_jax.models.factory import load
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.params import flat_params, init_params
from clip_har_jax.models.pretrained import load_pretrained, read_config, write_params
from clip_har_jax.models.two_towers import l2_normalize
from clip_har_jax.trainer.train import train
from export.run import export_model
from tests.support.make_golden import GOLDEN, make_inputs
from tests.support.model_folders import write_images

LABELS = ("cycling", "running", "sleeping")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image tower of a golden CLIP, in the layout of CLIPVisionModelWithProjection."""
    folder = tmp_path_factory.mktemp("alone")
    whole: dict[str, Any] = json.loads((GOLDEN / "quick_gelu" / "config.json").read_text())
    own = {"model_type": "clip_vision_model", "projection_dim": whole["projection_dim"]}
    (folder / "config.json").write_text(json.dumps(whole["vision_config"] | own))
    tensors = load_file(GOLDEN / "quick_gelu" / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name.startswith("vis")}, folder / "model.safetensors")
    return folder


def test_images_are_embedded_as_by_the_whole_model(folder: Path, tmp_path: Path) -> None:
    with np.load(GOLDEN / "torch.npz") as arrays:
        expected = arrays["quick_gelu|image_embeds"]
    pixels = jnp.asarray(make_inputs(json.loads((GOLDEN / "quick_gelu" / "config.json").read_text()))["pixel_values"])
    model = load_pretrained(str(folder))
    found = l2_normalize(model.get_image_features(pixels))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    model.save_pretrained(str(tmp_path))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_vision_model"
    assert read_config(tmp_path) == read_config(folder)


def test_texts_are_refused_in_one_line(folder: Path) -> None:
    loaded = load(str(folder))
    with pytest.raises(UserError, match="an image tower alone; use a model with a text tower"):
        loaded.model.encode_text(jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(UserError, match=f"^{folder}: an image tower alone, which knows no texts"):
        Predictor(str(folder), classes=LABELS)


def test_the_tower_of_a_siglip_is_read_and_written(tmp_path: Path) -> None:
    whole = NAMED_SIZES["siglip-tiny"]
    write_params(tmp_path / "whole", whole, params := init_params(whole, 0))
    values = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    (tmp_path / "alone" / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    vision = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    save_file(vision, tmp_path / "alone" / "model.safetensors")
    for name, value in flat_params(load_pretrained(str(tmp_path / "alone"))).items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)


def config_for(folder: Path, photos: Path, name: str, head: str = "") -> Any:
    return make_config(
        {
            "data": {"train": f"folder:{photos}", "val_fraction": 0.25, "augment": {"crop_scale_min": 1.0}},
            "model": {"name": str(folder)},
            "method": {"name": name, "head": head, "lora_rank": 2},
            "train": {"num_steps": 2, "global_batch_size": 8},
            "eval": {"batch_size": 8},
        }
    )


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("linear_probe", ""),
        *(pytest.param(name, "linear", marks=pytest.mark.slow) for name in ("full", "lp_ft", "lora", "bitfit")),
    ],
)
def test_a_linear_head_is_trained_and_answers(method: str, head: str, folder: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", LABELS, per_class=4)
    result = train(config_for(folder, photos, method, head), tmp_path / "run", quiet=True)
    assert result.model is not None and bundle.read_actions(Path(result.model)).head == "linear"
    assert read_config(Path(result.model)) == read_config(folder)
    photo = str(photos / LABELS[0] / "0.png")
    again = Predictor(str(result.model)).predict([photo])[0]
    assert {label for label, _ in again.top} <= set(LABELS)
    assert again.top == Predictor(str(result.model)).predict([photo])[0].top  # the second reads the kept program
    with pytest.raises(UserError, match="exports have a text encoder"):
        export_model(str(result.model), ["stablehlo"], tmp_path / "export")
    with pytest.raises(UserError, match=r"linear"):
        Predictor(str(result.model), classes=("dancing", "eating"))


@pytest.mark.parametrize("method", ["zero_shot", "full", "flyp", "prompt", "adapter", "tip_adapter"])
def test_methods_that_start_from_texts_are_refused(method: str, folder: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", LABELS, per_class=4)
    with pytest.raises(UserError, match="the model has an image tower alone; use method"):
        train(config_for(folder, photos, method), tmp_path / "run", quiet=True)


def test_a_folder_of_checkpoints_names_one(tmp_path: Path) -> None:
    """The output folder of `transformers.Trainer`: the models are in its folders, beside the optimiser's files."""
    (tmp_path / "checkpoint-of-1").mkdir()  # a person's own
    (tmp_path / "checkpoint-of-1" / "config.json").write_text("{}")
    for step in (500, 1500, 1000):
        shutil.copytree(GOLDEN / "quick_gelu", tmp_path / f"checkpoint-{step}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(b"\0")
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no config.json; it holds the checkpoints of a training; name one of them, such as "
        f"{tmp_path / 'checkpoint-1500'}"
    )
    jax.block_until_ready(flat_params(load_pretrained(str(tmp_path / "checkpoint-500"))))
