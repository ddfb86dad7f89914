"""Folders in open_clip's layout against what open_clip_torch gives for them in tests/golden."""

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_har_jax import load_model
from clip_har_jax.errors import UserError
from clip_har_jax.models.factory import load
from clip_har_jax.models.families import NAMED_SIZES, config_to_hf
from clip_har_jax.models.pretrained import load_pretrained, read_config, read_params, read_preprocess, write_params
from clip_har_jax.preprocess import evaluation_transform
from export.formats import check_torchscript
from tests.support.make_golden import GOLDEN, edit_json, make_images
from tests.support.make_open_clip_golden import CASES, FOLDERS, PROMPTS, make_inputs, write_config
from tests.support.normalization import normalize
from tests.support.open_clip_folders import WEIGHTS, write_case

TOLERANCE = 1e-5  # largest error over largest value of the reference, in float32


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "open_clip.npz") as arrays:
        return dict(arrays)


def errors(folder: Path, name: str) -> dict[str, float]:
    output = load_model(str(folder))(**make_inputs(CASES[name]))
    expected = {key: golden()[f"{name}|{key}"] for key in ("image_embeds", "text_embeds", "logits_per_image")}
    return {
        key: float(np.abs(np.asarray(getattr(output, key)) - value).max() / np.abs(value).max())
        for key, value in expected.items()
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a case, which is written once: the largest has 380 MB."""
    root = tmp_path_factory.mktemp("theirs")
    return cache(lambda name: write_case(root / name, name))


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_open_clip_and_go_back(name: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    """Read, written in the layout that fits, and written in open_clip's again: the same outputs, the same weights."""
    folder = theirs(name)
    found = errors(folder, name)
    print(f"{name}: {found}")
    assert max(found.values()) < TOLERANCE, found
    model, config = load_pretrained(str(folder)), read_config(folder)
    params = read_params(folder, config)
    write_params(tmp_path / "ours", config, params)
    assert (tmp_path / "ours" / ("open_clip_config.json" if name == "clipa" else "config.json")).is_file()
    model.save_pretrained(str(tmp_path / "back"), "open_clip")
    for written in (tmp_path / "ours", tmp_path / "back"):  # of one configuration, equal weights give equal outputs
        assert read_config(written) == config
        again = read_params(written, config)
        assert again.keys() == params.keys()
        for key, value in params.items():
            np.testing.assert_array_equal(again[key], value, err_msg=key)
    if name != "custom_text":  # which is written as one without
        from safetensors.numpy import load_file

        tensors, back = load_file(folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
        assert tensors.keys() == back.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(value, back[key], err_msg=key)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_and_pixels_equal_open_clip(name: str, theirs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / FOLDERS[name], tmp_path / "model"))
    write_config(folder, name)
    (folder / WEIGHTS).symlink_to(theirs(name) / WEIGHTS)
    loaded = load(str(folder))
    expected, length = golden()[f"{name}|tokens"], loaded.model.config.text.context_length
    np.testing.assert_array_equal(loaded.tokenizer(PROMPTS, length)[0], expected)
    if name == "gelu":  # open_clip's own tokenizer, which is used without a name of another, pads with zeros
        edit_json(
            folder / "open_clip_config.json", lambda values: values["model_cfg"]["text_cfg"].pop("hf_tokenizer_name")
        )
        ids, mask = load(str(folder)).tokenizer(PROMPTS, length)
        np.testing.assert_array_equal(ids, np.where(mask, expected, 0))
    if name != "siglip":
        ours = np.stack([evaluation_transform(image, loaded.preprocess) for image in make_images()])
        pixels = normalize(ours, loaded.preprocess.mean, loaded.preprocess.std).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(pixels, golden()[f"{name}|pixels"], atol=1e-6)
    loaded.preprocess.save(folder)
    loaded.tokenizer.save(tmp_path / "saved")
    assert load(str(folder)).preprocess == loaded.preprocess


def change_model(**changes: Any) -> dict[str, Any]:
    model = copy.deepcopy(CASES["gelu"])
    for tower in ("vision_cfg", "text_cfg"):
        model[tower] |= changes.pop(tower, {})
    return {"model_cfg": model | changes, "preprocess_cfg": {}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (change_model(vision_cfg={"timm_model_name": "eva02_base_patch16_clip_224"}), "'eva02_base_patch16_clip_224'"),
        (change_model(vision_cfg={"timm_model_name": "convnext_base", "timm_pool": ""}), "tower 'convnext_base'"),
        (change_model(vision_cfg={"layers": [3, 4, 6, 3]}), "a ResNet as image tower"),
        (change_model(text_cfg={"hf_model_name": "xlm-roberta-base"}), "text_cfg.hf_model_name is 'xlm-roberta-base'"),
        (change_model(vision_cfg={"attentional_pool": True}), "vision_cfg.attentional_pool is True"),
        (change_model(multimodal_cfg={}), "a CoCa with a text decoder"),
        (change_model(vision_cfg={"image_size": [32, 48]}), "size [32, 48]; a whole number"),
        (change_model(vision_cfg={"width": "64"}), "not a configuration of open_clip"),
        ({"preprocess_cfg": {}}, "key 'model_cfg' is missing"),
        ([], "not an object of settings"),
    ],
)
def test_bad_config_is_refused_in_one_line(values: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert message in str(caught.value) and "open_clip_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [[1], {"mean": [1, 2]}, {"std": [0, 1, 1]}, {"std": "x"}, {"resize_mode": "longest"}]
)
def test_bad_image_settings_are_refused_in_one_line(settings: object, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(change_model() | {"preprocess_cfg": settings}))
    with pytest.raises(UserError, match="preprocess_cfg") as caught:
        read_preprocess(tmp_path, 32)
    assert "\n" not in str(caught.value)


def test_torchscript_of_other_families_and_layouts_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "gelu")
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(config_to_hf(NAMED_SIZES["siglip-tiny"])))
    for folder in (tmp_path, tmp_path / "siglip"):
        check_torchscript(folder, False, ["onnx"])
        with pytest.raises(UserError, match="only CLIPs in the Hugging Face layout"):
            check_torchscript(folder, False, ["onnx", "torchscript"])
    check_torchscript(GOLDEN / "gelu", False, ["torchscript"])


def test_missing_pickled_and_contradicting_weights_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "gelu")
    config = read_config(tmp_path)
    with pytest.raises(UserError, match=f"{WEIGHTS} is missing"):
        read_params(tmp_path, config)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights can run code"):
        read_params(tmp_path, config)
    write_case(tmp_path, "clipa")
    write_config(tmp_path, "gelu")
    with pytest.raises(UserError, match=r"missing visual\.ln_pre"):
        read_params(tmp_path, config)


def test_force_quick_gelu_is_read_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(change_model(force_quick_gelu=True)))
    assert read_config(tmp_path).vision.hidden_act == "quick_gelu"
