"""Model folders as published: the quirks that transformers reads, and the faults that are refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clip_har_jax import load_model
from clip_har_jax.errors import UserError
from clip_har_jax.models import factory
from clip_har_jax.models.clip import CLIPConfig, FlaxCLIPModel
from clip_har_jax.models.factory import load
from clip_har_jax.models.families import config_from_hf, config_to_hf
from clip_har_jax.models.hf_layout import SHOWN
from clip_har_jax.models.pretrained import read_config, read_params, resize_positions
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.models.two_towers import TwoTowersOutput
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.text import Tokenizer
from tests.support.make_golden import GOLDEN, PROMPTS, edit_json, make_images, make_inputs, small
from tests.support.normalization import normalize

TOLERANCE = 1e-5
FOLDERS = [
    "quick_gelu",
    "gelu",
    "eos_token_id_2",
    "position_ids",
    "float16",
    "bfloat16",
    "sharded",
    "missing_keys",
    "config_dict",
]


def golden(source: str, folder: str) -> dict[str, np.ndarray]:
    """What transformers computed with this folder."""
    with np.load(GOLDEN / f"{source}.npz") as arrays:
        return {key.split("|")[1]: arrays[key] for key in arrays.files if key.startswith(f"{folder}|")}


def assert_equal_outputs(output: TwoTowersOutput, expected: dict[str, np.ndarray]) -> None:
    for key in TwoTowersOutput._fields:
        value = np.asarray(getattr(output, key))
        assert value.shape == expected[key].shape
        assert np.abs(value - expected[key]).max() < TOLERANCE * np.abs(expected[key]).max(), key


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_gives_transformers_outputs(name: str) -> None:
    model = load_model(str(GOLDEN / name))
    assert_equal_outputs(model(**make_inputs(config_to_hf(model.model.config))), golden("torch", name))


@pytest.mark.parametrize(("source", "name"), [("torch", "shortest_edge"), ("flax", "vocabulary_size_int")])
def test_texts_and_images_give_transformers_outputs(source: str, name: str) -> None:
    """From typed text and raw pixels; the second folder is as of 2021: msgpack, vocab and merges, size as a number."""
    folder, expected = GOLDEN / name, golden(source, name)
    model = FlaxCLIPModel.from_pretrained(str(folder))
    preprocess = Preprocess.from_folder(folder, model.config.vision.image_size)
    ids, mask = Tokenizer.from_folder(folder)(PROMPTS, model.config.text.context_length)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    images = np.stack([evaluation_transform(image, preprocess) for image in make_images()])
    pixels = normalize(images, preprocess.mean, preprocess.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels, expected["pixel_values"], atol=1e-6)
    assert_equal_outputs(model(jnp.asarray(ids), jnp.asarray(pixels), jnp.asarray(mask)), expected)


def test_fixtures_have_their_quirks() -> None:
    """So that a fixture made anew can't lose what it is for."""

    def config(name: str) -> dict[str, Any]:
        return json.loads((GOLDEN / name / "config.json").read_text())

    def weights(name: str) -> dict[str, Any]:
        return load_file(GOLDEN / name / "model.safetensors")

    assert config("eos_token_id_2")["text_config"]["eos_token_id"] == 2
    assert {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"} < set(weights("position_ids"))
    assert {str(value.dtype) for value in weights("float16").values()} == {"float16"}
    header = (GOLDEN / "bfloat16" / "model.safetensors").read_bytes()[:8000]
    assert b'"BF16"' in header
    assert b'"F32"' not in header
    assert len(list((GOLDEN / "sharded").glob("*.safetensors"))) > 1
    assert "hidden_act" not in config("missing_keys")["text_config"]
    assert config("config_dict")["text_config_dict"] != config("config_dict")["text_config"]
    assert config("gelu")["text_config"]["hidden_act"] == "gelu"
    published = {path.name for path in (GOLDEN / "vocabulary_size_int").iterdir()}
    assert published == {"config.json", "flax_model.msgpack", "merges.txt", "preprocessor_config.json", "vocab.json"}
    size = json.loads((GOLDEN / "vocabulary_size_int" / "preprocessor_config.json").read_text())["size"]
    assert isinstance(size, int)


def test_saved_folder_loads_equal(tmp_path: Path) -> None:
    model = FlaxCLIPModel.from_pretrained(str(GOLDEN / "gelu"))
    model.save_pretrained(str(tmp_path / "saved"))
    again = FlaxCLIPModel.from_pretrained(str(tmp_path / "saved"))
    assert again.config == model.config
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1, "a server may read them all"
    before, after = load_file(GOLDEN / "gelu" / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_config_goes_there_and_back() -> None:
    for config in (CLIPConfig(), config_from_hf(small(eos_token_id=2))):
        assert config_from_hf(config_to_hf(config)) == config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a whole folder, to be damaged."""
    shutil.copytree(GOLDEN / "quick_gelu", tmp_path / "clip")
    return tmp_path / "clip"


def load_fails(folder: Path) -> str:
    """Return the one line that a person sees."""
    with pytest.raises(UserError) as error:
        FlaxCLIPModel.from_pretrained(str(folder))
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_all_weights_that_do_not_fit_are_listed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["logit_scale"], weights["vision_model.encoder.layers.1.mlp.fc1.bias"]
    weights["text_projection.weight"] = np.ones((3, 5), np.float32)
    weights["text_model.encoder.layers.0.mlp.fc2.bias"] = np.ones(7, np.float32)
    weights["visual_projection.bias"] = weights["text_model.encoder.layers.2.mlp.fc2.bias"] = np.ones(8, np.float32)
    save_file(weights, folder / "model.safetensors")
    message = load_fails(folder)
    for problem in (
        "missing logit_scale",
        "missing vision_model.encoder.layers.1.mlp.fc1.bias",
        "misshapen text_projection.weight",
        "(3, 5)",
        "misshapen text_model.encoder.layers.0.mlp.fc2.bias",
        "unexpected visual_projection.bias",
        "unexpected text_model.encoder.layers.2.mlp.fc2.bias",
    ):
        assert problem in message
    assert "fc1.weight" not in message
    assert message.endswith("; copy both files of one model")


def test_of_many_weights_that_do_not_fit_only_the_first_are_named(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(num_hidden_layers=9))
    message = load_fails(folder)
    assert message.count("missing vision_model.encoder.layers.") == SHOWN
    missing = (9 - 2) * 16  # layers, and the weights of each
    assert f"; and {missing - SHOWN} more; copy both files" in message


def test_misshapen_weights_of_too_few_dims_are_listed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name].reshape(8, -1)
    save_file(weights, folder / "model.safetensors")
    assert f"misshapen {name}" in load_fails(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = load_fails(folder)
    assert "pytorch_model.bin" in message
    assert "safe_serialization" in message


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in load_fails(folder)


def test_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in load_fails(folder)


WRONG_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model_type is 'blip'": lambda config: config.update(model_type="blip"),
    "activation 'relu'": lambda config: config["text_config"].update(hidden_act="relu"),
    "3 heads": lambda config: config["text_config"].update(num_attention_heads=3),
    "sizes below 1": lambda config: config["text_config"].update(num_attention_heads=0),
    "hidden_size is '8'": lambda config: config["vision_config"].update(hidden_size="8"),
    "patch_size is [8, 8]": lambda config: config["vision_config"].update(patch_size=[8, 8]),
    "no patch of 17 px": lambda config: config["vision_config"].update(patch_size=17),
    "text_config is 'x'": lambda config: config.update(text_config="x"),
    "hidden_size is True": lambda config: config["vision_config"].update(hidden_size=True),
    "num_channels is 1": lambda config: config["vision_config"].update(num_channels=1),
    "layer_norm_eps is -1.0": lambda config: config["text_config"].update(layer_norm_eps=-1.0),
    "layer_norm_eps is nan": lambda config: config["vision_config"].update(layer_norm_eps=float("nan")),
    "text_config.num_hidden_layers is 0": lambda config: config["text_config"].update(num_hidden_layers=0),
    "projection_dim is 0.5": lambda config: config.update(projection_dim=0.5),
}


@pytest.mark.parametrize("words", WRONG_CONFIGS)
def test_wrong_config_is_refused(folder: Path, words: str) -> None:
    edit_json(folder / "config.json", WRONG_CONFIGS[words])
    assert words in load_fails(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: value.astype(np.int8) for name, value in weights.items()}, folder / "model.safetensors")
    assert "is of type I8, as quantised weights are" in load_fails(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """An id beyond the vocabulary would be read as the last token."""
    folder = shutil.copytree(GOLDEN / "shortest_edge", tmp_path / "clip")
    weights, name = load_file(folder / "model.safetensors"), "text_model.embeddings.token_embedding.weight"
    save_file(weights | {name: weights[name][:300]}, folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=300))
    tokenizer = load(str(folder)).tokenizer
    with pytest.raises(UserError, match=f"{folder}: the tokenizer gives the id .*, but the model has 300 tokens"):
        tokenizer(["a person"], 16)
    with pytest.raises(UserError, match="the model has 300 tokens"):
        tokenizer.words("a person")


@pytest.mark.parametrize("std", [[0, 1, 1], [1, 1, float("inf")], [1, 1]])
def test_a_deviation_that_divides_by_zero_is_refused(std: list[float], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": std}))
    with pytest.raises(UserError, match="image_std"):
        Preprocess.from_folder(tmp_path, 32)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00\xff"], ids=["cut", "list", "bytes"])
def test_config_that_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in load_fails(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -40])
def test_truncated_safetensors_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors" in load_fails(folder)


def test_truncated_msgpack_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    data = (GOLDEN / "vocabulary_size_int" / "flax_model.msgpack").read_bytes()
    (folder / "flax_model.msgpack").write_bytes(data[: len(data) // 2])
    assert "flax_model.msgpack" in load_fails(folder)


def shards(folder: Path) -> list[Path]:
    shutil.rmtree(folder)
    shutil.copytree(GOLDEN / "sharded", folder)
    return sorted(folder.glob("*.safetensors"))


def test_missing_shard_is_named(folder: Path) -> None:
    first = shards(folder)[0]
    first.unlink()
    assert first.name in load_fails(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_damaged_index_is_refused(folder: Path, text: str) -> None:
    shards(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in load_fails(folder)


def test_positions_are_interpolated(folder: Path) -> None:
    old = read_config(folder)
    config = dataclasses.replace(old, vision=dataclasses.replace(old.vision, image_size=32))
    params = read_params(folder, old)
    grid = np.arange(4, dtype=np.float32).reshape(2, 2)
    params["vision.position_embedding"] = np.concatenate([[9.0], grid.ravel()])[:, None].repeat(8, axis=1)
    resized = np.asarray(resize_positions(params, old, config)["vision.position_embedding"])
    assert resized.shape == (17, 8)
    np.testing.assert_array_equal(resized[0], 9.0)
    new_grid = resized[1:, 0].reshape(4, 4)
    assert (np.diff(new_grid, axis=1) > 0).all()
    assert (np.diff(new_grid, axis=0) > 0).all()
    np.testing.assert_allclose(new_grid.mean(), grid.mean(), atol=1e-5)
    assert resize_positions(params, old, old) is params


def test_what_is_no_folder_is_refused() -> None:
    with pytest.raises(UserError, match="no such folder"):
        resolve_folder("runs/nothing/model")
    with pytest.raises(UserError, match="Hub"):  # the tests are offline
        resolve_folder("nobody/nothing")


def test_weights_are_float32_whatever_the_file(folder: Path) -> None:
    for name in ("float16", "bfloat16", "vocabulary_size_int"):
        params = read_params(GOLDEN / name, read_config(GOLDEN / name))
        assert {value.dtype for value in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("find", [factory.make_base, factory.known_config], ids=["base", "sizes"])
def test_an_unknown_name_is_told_the_remedy_and_only_sizes_of_the_readme(find: Callable[..., Any]) -> None:
    arguments = (["a"],) if find is factory.make_base else ()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = ", ".join(f"`{name}`" for name in factory.SHOWN_SIZES)
    assert shown in readme and set(factory.SHOWN_SIZES) <= set(factory.NAMED_SIZES)
    with pytest.raises(UserError, match=r"^config\.model\.name=ViT-B32: did you mean 'ViT-B/32'\?; name a ") as told:
        find("ViT-B32", *arguments)
    assert "siglip" not in str(told.value)
