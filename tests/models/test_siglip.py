"""FlaxSiglipModel, its tokenizers and its preprocessing against those of transformers in tests/golden."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax import load_model
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import FlaxCLIPModel
from clip_har_jax.models.explain import patch_embeds
from clip_har_jax.models.factory import load
from clip_har_jax.models.families import NAMED_SIZES, config_from_hf, config_to_hf
from clip_har_jax.models.flops import forward_flops, matmul_flops
from clip_har_jax.models.hf_layout import TABLES, params_from_hf, params_to_hf
from clip_har_jax.models.params import Params, abstract_model, flat_params, init_params, make_model
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.models.siglip import FlaxSiglipModel, SiglipConfig
from clip_har_jax.models.two_towers import TwoTowersOutput
from clip_har_jax.preprocess import Preprocess, evaluation_transform
from clip_har_jax.tokenization import read_tokenizer
from tests.support.make_golden import GOLDEN, make_images, make_weight
from tests.support.make_siglip_golden import CASES, PROMPTS, make_inputs
from tests.support.normalization import normalize

TABLE, TOLERANCE = TABLES["siglip"], 1e-5  # largest error over largest value of the reference, in float32
OUTPUTS = ("logits_per_image", "text_embeds", "image_embeds")
LARGE = ("siglip-large-patch16-256", "siglip-so400m-patch14-384")


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "siglip.npz") as arrays:
        return dict(arrays)


@cache
def hf_shapes(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / "siglip_shapes.json").read_text())[name]


@cache
def case_params(name: str) -> tuple[SiglipConfig, Params]:
    config = config_from_hf(CASES[name])
    assert isinstance(config, SiglipConfig)
    weights = {key: np.asarray(make_weight(key, shape)) for key, shape in hf_shapes(name).items()}
    shapes = {key: value.shape for key, value in flat_params(abstract_model(config)).items()}
    return config, params_from_hf(weights, shapes, name, TABLE)


@cache
def forward(config: SiglipConfig) -> Callable[..., TwoTowersOutput]:
    return jax.jit(lambda params, inputs: make_model(config, params)(**inputs))


def run(config: SiglipConfig, params: Params, name: str) -> dict[str, float]:
    """Return the largest error of each output over the reference's largest value."""
    inputs = {key: jnp.asarray(value) for key, value in make_inputs(CASES[name]).items()}
    output = forward(config)(params, inputs)
    expected = {key: golden()[f"{name}|{key}"] for key in OUTPUTS}
    return {
        key: float(np.abs(np.asarray(getattr(output, key)) - value).max() / np.abs(value).max())
        for key, value in expected.items()
    }


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"tiny"}))
def test_cases_are_the_published_sizes(name: str) -> None:
    size, case = NAMED_SIZES[name], config_from_hf(CASES[name])
    vocab_size = case.text.vocab_size
    text = dataclasses.replace(size.text, num_layers=1, vocab_size=vocab_size)
    assert case == dataclasses.replace(size, text=text, vision=dataclasses.replace(size.vision, num_layers=1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in CASES]
)
def test_outputs_equal_hugging_face(name: str) -> None:
    errors = run(*case_params(name), name)
    print(f"{name}: {errors}")
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("weight", TABLE)
def test_one_changed_weight_is_seen(weight: str) -> None:
    config, params = case_params("tiny")
    changed = np.array(params[weight])
    token = make_inputs(CASES["tiny"])["input_ids"][0, 1]
    changed[(token, -1) if weight == "text.token_embedding" else (-1,) * changed.ndim] += 0.05
    error = max(run(config, params | {weight: changed}, "tiny").values())
    # A key's bias adds the same to all scores of a query: the softmax takes it away.
    assert (error < TOLERANCE) == weight.endswith("attention.key.bias")


@pytest.mark.parametrize("name", ["tiny", "siglip-base-patch16-224"])
def test_weights_go_back_unchanged(name: str) -> None:
    weights = params_to_hf(case_params(name)[1], TABLE)
    assert {key: list(value.shape) for key, value in weights.items()} == hf_shapes(name)
    for key, value in weights.items():
        np.testing.assert_array_equal(value, make_weight(key, value.shape), err_msg=key)


def test_config_goes_back_unchanged() -> None:
    for name in ("siglip-base-patch16-224", "siglip2-giant-opt-patch16-256"):
        assert config_from_hf(config_to_hf(NAMED_SIZES[name])) == NAMED_SIZES[name]


def test_saved_folder_opens_again(tmp_path: Path) -> None:
    config, params = case_params("tiny")
    write_params(tmp_path, config, params)
    whole = load_model(str(tmp_path))  # without a tokenizer, which only texts need
    model = whole.model
    assert isinstance(model, FlaxSiglipModel) and model.config == config
    for name, value in flat_params(model).items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)
    with pytest.raises(UserError, match="no tokenizer"):
        _ = whole.tokenizer
    with pytest.raises(UserError, match="a FlaxSiglipModel, not a FlaxCLIPModel"):
        FlaxCLIPModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("kind", ["siglip_tokenizer", "siglip2_tokenizer"])
def test_tokens_and_pixels_equal_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(GOLDEN / kind)
    ids, mask = tokenizer(PROMPTS, 16)
    np.testing.assert_array_equal(ids, golden()[f"{kind}|input_ids"])
    assert mask.sum(axis=1)[-1] == 16
    tokenizer.save(tmp_path)
    np.testing.assert_array_equal(read_tokenizer(tmp_path)(PROMPTS, 16)[0], ids)
    first = tokenizer.words(PROMPTS[0])
    assert first == list(ids[0, : len(first)])
    preprocess = Preprocess.from_folder(GOLDEN / kind, 32)
    preprocess.save(tmp_path)
    assert Preprocess.from_folder(tmp_path, 32) == preprocess
    ours = np.stack([evaluation_transform(image, preprocess) for image in make_images()])
    pixels = normalize(ours, preprocess.mean, preprocess.std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels, golden()[f"{kind}|pixel_values"], atol=1e-6)


def test_folder_without_or_with_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="the tokenizer can't be read"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head is false"),
        ({"text_config": {"projection_size": 12}}, "projection_size is 12, but images have 768 dims"),
        ({"text_config": {"hidden_act": "relu"}}, "activation 'relu' is unknown"),
        ({"vision_config": {"patch_size": "16"}}, "patch_size is '16'; a value of type int"),
    ],
)
def test_contradicting_config_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_hf({"model_type": "siglip"} | change)


def test_patches_alone_and_their_contributions() -> None:
    """A pooled single patch is its own embedding; contributions add up to what the pooling's attention gives."""
    config, params = case_params("tiny")
    model = make_model(config, jax.tree.map(jnp.asarray, params))
    images = jnp.asarray(make_inputs(CASES["tiny"])["pixel_values"]).transpose(0, 2, 3, 1)
    pool, tokens = model.vision.pool, model.vision.post_norm(model.vision.tokens(images))
    assert pool is not None
    np.testing.assert_allclose(pool.each(tokens)[:, 3], pool(tokens[:, 3:4]), atol=1e-5)
    attended = pool.attention(tokens, None, False, queries=pool.queries(tokens))[:, 0]
    bias = pool.attention.out.bias
    assert bias is not None
    attended -= bias[...][None]
    np.testing.assert_allclose(patch_embeds(model, images).sum(axis=1), attended, atol=1e-5)


def test_flops_count_the_pooling() -> None:
    config, _ = case_params("tiny")
    params = jax.eval_shape(lambda: init_params(config, 0))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    vision = jax.make_jaxpr(lambda params, image: make_model(config, params).encode_image(image))(params, image)
    text = jax.make_jaxpr(lambda params, ids: make_model(config, params).encode_text(ids))(params, ids)
    assert matmul_flops(vision) == forward_flops(config.vision, config.projection_dim)
    assert matmul_flops(text) == forward_flops(config.text, config.projection_dim)


def test_named_size_is_loaded_with_its_own_preprocessing(tmp_path: Path) -> None:
    from clip_har_jax.models.factory import make_base

    base = make_base("siglip-tiny", ["a person is dancing."])
    write_params(tmp_path, base.config, init_params(base.config, 0))
    base.tokenizer.save(tmp_path)
    base.preprocess.save(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.preprocess == base.preprocess == Preprocess(64, None, (0.5,) * 3, (0.5,) * 3, keep_aspect=False)
    ids, _ = loaded.tokenizer(["a person is dancing."], 24)
    assert np.isfinite(loaded.model.encode_text(jnp.asarray(ids))).all()
