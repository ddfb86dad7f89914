"""SigLIP 2 NaFlex and its preprocessing against transformers' in tests/golden; training and evaluation of one."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax import Predictor
from clip_har_jax.config import make_config
from clip_har_jax.data.augment import augment
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.image_files import read_image
from clip_har_jax.models.factory import load, make_base
from clip_har_jax.models.families import NAMED_SIZES, config_from_hf, config_to_hf
from clip_har_jax.models.hf_layout import TABLES, params_from_hf, params_to_hf
from clip_har_jax.models.naflex import FlaxSiglip2Model, Siglip2Config, grid_mask, unpack
from clip_har_jax.models.params import Params, abstract_model, flat_params, init_params, make_model
from clip_har_jax.models.pretrained import load_pretrained, read_preprocess, write_params
from clip_har_jax.models.two_towers import normalize_images
from clip_har_jax.patches import pack_patches, patched_size, unpack_patches
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.trainer.train import train
from export.run import export_model
from tests.support.make_golden import GOLDEN, make_images, make_weight
from tests.support.make_naflex_golden import CASES, GRIDS, PROCESSORS, make_inputs
from tests.support.model_folders import write_image

TABLE, TOLERANCE = TABLES["siglip2"], 1e-5  # largest error over largest value of the reference, in float32
OUTPUTS = ("logits_per_image", "text_embeds", "image_embeds")
LABELS = ("cycling", "running")


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "naflex.npz") as arrays:
        return dict(arrays)


@cache
def case(name: str) -> tuple[Siglip2Config, Params]:
    config = config_from_hf(CASES[name])
    assert isinstance(config, Siglip2Config)
    hf_shapes: dict[str, list[int]] = json.loads((GOLDEN / "naflex_shapes.json").read_text())[name]
    weights = {key: np.asarray(make_weight(key, shape)) for key, shape in hf_shapes.items()}
    shapes = {key: value.shape for key, value in flat_params(abstract_model(config)).items()}
    return config, {key: jnp.asarray(value) for key, value in params_from_hf(weights, shapes, name, TABLE).items()}


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tiny" else pytest.mark.slow) for name in CASES]
)
def test_outputs_equal_hugging_face(name: str) -> None:
    config, params = case(name)
    model = make_model(config, params)
    assert isinstance(model, FlaxSiglip2Model)
    inputs: dict[str, Any] = {key: jnp.asarray(value) for key, value in make_inputs(CASES[name]).items()}
    output = model(**inputs)
    for key in OUTPUTS:
        assert_close(getattr(output, key), golden()[f"{name}|{key}"])
    if name == "tiny":  # the mask follows from the shapes
        without_mask = inputs | {"pixel_attention_mask": None}
        assert_close(model(**without_mask).image_embeds, golden()[f"{name}|image_embeds"])
        with pytest.raises(UserError, match="needs spatial_shapes"):
            model(**inputs | {"spatial_shapes": None})


def test_padding_counts_nothing_and_the_grid_does() -> None:
    """What stands after an image's patches changes nothing; another grid of the same patches does."""
    config, params = case("tiny")
    model, inputs = make_model(config, params), make_inputs(CASES["tiny"])
    pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
    noise = np.where(mask[..., None] > 0, pixels, 7.0).astype(np.float32)

    def embed(pixels: np.ndarray, shapes: Any) -> np.ndarray:
        assert isinstance(model, FlaxSiglip2Model)
        return np.asarray(model.get_patch_features(jnp.asarray(pixels), None, jnp.asarray(shapes, jnp.int32)))

    before = embed(pixels, GRIDS)
    np.testing.assert_allclose(embed(noise, GRIDS), before, atol=1e-5)
    assert np.abs(embed(pixels, [shape[::-1] for shape in GRIDS])[1:] - before[1:]).max() > 1e-3


@pytest.mark.parametrize("name", PROCESSORS)
def test_patches_equal_transformers(name: str, tmp_path: Path) -> None:
    preprocess = Preprocess.from_folder(GOLDEN / f"naflex_{name}", 32)
    packed = np.stack([evaluation_transform(image, preprocess) for image in make_images()])
    assert packed.shape[1:] == preprocess.shape
    patches, grid = unpack(normalize_images(jnp.asarray(packed), preprocess.mean, preprocess.std))
    np.testing.assert_array_equal(grid, golden()[f"{name}|spatial_shapes"])
    mask = grid_mask(grid, patches.shape[1])
    np.testing.assert_array_equal(mask, golden()[f"{name}|pixel_attention_mask"])
    pixels, atol = np.where(mask[..., None], patches, 0), 1e-6
    if name != "tiny":
        pixels, atol = pixels.sum(axis=-1), 1e-3  # of 768 values
    np.testing.assert_allclose(pixels, golden()[f"{name}|pixel_values"], atol=atol)
    preprocess.save(tmp_path)
    assert Preprocess.from_folder(tmp_path, 32) == preprocess


@pytest.mark.parametrize(("height", "width"), [(480, 640), (2, 400), (400, 2), (5, 5), (4000, 3000), (17, 31)])
def test_sizes_are_whole_patches_of_nearly_the_aspect(height: int, width: int) -> None:
    for most in (1, 16, 256):
        down, across = patched_size(height, width, 16, most)
        assert down % 16 == across % 16 == 0 and 1 <= down * across // 256 <= most
    assert patched_size(300, 300, 16, 256) == (256, 256)


def test_packed_images_are_told_apart_from_missing_ones() -> None:
    image = np.arange(32 * 16 * 3).reshape(32, 16, 3).astype(np.uint8)
    packed = np.stack([pack_patches(image, 8, 20), np.zeros((21, 64, 3), np.uint8)])
    np.testing.assert_array_equal(unpack_patches(packed[0]), image)
    patches, grid = unpack(normalize_images(jnp.asarray(packed), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    np.testing.assert_array_equal(grid, [[4, 2], [1, 1]])
    assert patches.shape == (2, 20, 192)


def test_training_keeps_the_aspect_of_a_crop() -> None:
    preprocess = Preprocess(64, patch_size_px=16, max_num_patches=16)
    config = make_config(
        {"data": {"augment": {"crop_scale_min": 1.0, "flip": False, "color_jitter": 0.0}}}
    ).data.augment
    wide = np.zeros((20, 80, 3), np.uint8)
    packed = augment(wide, preprocess, config, np.random.default_rng(0))
    _, grid = unpack(jnp.asarray(packed, jnp.float32)[None])
    np.testing.assert_array_equal(grid, [[2, 8]])


def test_config_and_weights_go_back() -> None:
    for name in ("siglip2-base-patch16-naflex", "siglip2-naflex-tiny"):
        assert config_from_hf(config_to_hf(NAMED_SIZES[name])) == NAMED_SIZES[name]
    config, params = case("tiny")
    for key, value in params_to_hf(params, TABLE).items():
        np.testing.assert_array_equal(value, make_weight(key, value.shape), err_msg=key)
    with pytest.raises(UserError, match="num_patches is 15"):
        config_from_hf({"model_type": "siglip2", "vision_config": {"num_patches": 15}})
    assert config.vision.num_patches == 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naflex")
    base = make_base("siglip2-naflex-tiny", [f"a person {label}" for label in LABELS])
    write_params(folder, base.config, init_params(base.config, 0))
    base.tokenizer.save(folder)
    base.preprocess.save(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return images of many aspects."""
    root = tmp_path_factory.mktemp("photos")
    sizes = ((48, 40), (90, 30), (30, 90), (16, 120), (64, 64), (33, 57))
    for i, label in enumerate(LABELS):
        for j, size in enumerate(sizes):
            write_image(root / label / f"{j}.png", seed=100 * i + j, size=size)
    return root


def config_for(folder: Path, photos: Path, **method: Any) -> Any:
    return make_config(
        {
            "data": {"train": f"folder:{photos}", "val_fraction": 0.25},
            "model": {"name": str(folder)},
            "method": {"name": "full", "lora_rank": 4, **method},
            "train": {"num_steps": 2, "global_batch_size": 8},
            "optim": {"learning_rate": 1e-3},
            "eval": {"batch_size": 8},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "lora"}, {"loss": "sigmoid"}])
def test_a_folder_is_trained_evaluated_and_predicts(
    method: dict[str, Any], folder: Path, photos: Path, tmp_path: Path
) -> None:
    config = config_for(folder, photos, **method)
    result = train(config, tmp_path / "run", quiet=True)
    assert result.model is not None and result.uses == ("evaluate", "predict")  # exports are refused
    before, after = (flat_params(load(str(path)).model) for path in (folder, result.model))
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert any(name.startswith("vision.") for name in moved)
    found_on = evaluate_model(str(result.model), f"folder:{photos}", tmp_path / "report")
    assert 0 <= found_on.metrics["top1"] <= 1 and (tmp_path / "report" / "report.html").is_file()
    assert isinstance(found_on, EvalResult)
    shown = {one.image.shape[:2] for one in (*found_on.sample, *found_on.mistakes)}
    assert len(shown) > 1 and all(height % 16 == width % 16 == 0 for height, width in shown)  # pictures of many aspects
    photo = photos / LABELS[0] / "3.png"
    loaded = load(str(result.model))
    assert isinstance(loaded.model, FlaxSiglip2Model)
    found = Predictor(str(result.model)).predict([str(photo)])[0].top
    packed = jnp.asarray(evaluation_transform(read_image(photo), loaded.preprocess))[None]
    image = loaded.model.encode_image(normalize_images(packed, loaded.preprocess.mean, loaded.preprocess.std))
    patches, grid = unpack(normalize_images(packed, loaded.preprocess.mean, loaded.preprocess.std))
    assert grid.tolist() == [[8, 2]]  # 16 x 120 px, enlarged by 16 / 15: the largest factor with 16 patches of 16 px
    same = loaded.model.get_patch_features(patches, None, grid)
    np.testing.assert_allclose(image, same / jnp.linalg.norm(same, axis=-1, keepdims=True), atol=1e-6)
    assert {label for label, _ in found} == set(LABELS)
    with pytest.raises(UserError, match="exports take square images"):
        export_model(str(result.model), ["stablehlo"], tmp_path / "export")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"head": "cross_attention"}, "head=cross_attention needs a fixed grid"),
        ({"cutmix": 1.0}, "cutmix mixes images of one grid"),
        ({"mixup": 0.2}, "mixup mixes images of one grid"),
    ],
)
def test_what_needs_squares_is_refused(
    method: dict[str, Any], message: str, folder: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(config_for(folder, photos, **method), tmp_path, quiet=True)


def test_settings_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes images of any size; set max_num_patches"):
        make_base(str(folder), (), 128)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    own = read_preprocess(tmp_path, 64)
    assert own == make_base("siglip2-naflex-tiny", ["a"]).preprocess  # without settings: the family's
    dataclasses.replace(own, patch_size_px=8).save(tmp_path)
    with pytest.raises(UserError, match="patches of 16 px, but the image settings are for 8 px"):
        read_preprocess(tmp_path, 64)
    with pytest.raises(UserError, match="no fixed grid of patches"):
        load_pretrained(str(folder)).vision.tokens(jnp.zeros((1, 17, 256, 3)))
