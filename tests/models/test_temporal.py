"""Models of clips: what doesn't move is answered as an image is; the order of frames counts; folders keep it all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_har_jax.config import MeshConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.clip import CLIPConfig
from clip_har_jax.models.configuration import TextConfig, VisionConfig
from clip_har_jax.models.factory import base_params, load, make_base
from clip_har_jax.models.families import config_from_hf
from clip_har_jax.models.hf_layout import TEMPORAL_FILE
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import abstract_model, axis_names, flat_params, init_temporal, make_model
from clip_har_jax.models.pretrained import read_params, write_params
from clip_har_jax.models.temporal import KINDS, TimeAttention, depthwise_conv, is_temporal, split_temporal
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.sharding import param_shardings
from tests.support.model_folders import random_params, write_model

SIZE = CLIPConfig(
    TextConfig(vocab_size=101, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, context_length=8),
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=24, patch_size=8),
    projection_dim=16,
)
ADDING = [kind for kind in KINDS if kind != "mean"]


def size_of(kind):
    return dataclasses.replace(SIZE, temporal=kind)


def lively(kind, seed=0):
    """Weights of which nothing that a kind adds is 0."""
    rng = np.random.default_rng(seed)
    params = random_params(size_of(kind), seed)
    return {
        name: jnp.asarray(rng.normal(size=value.shape) * 0.3, jnp.float32) if is_temporal(name) else value
        for name, value in params.items()
    }


def host_params(base):
    """Return what a run starts from."""
    model = abstract_model(base.config)
    shapes = {name: value.shape for name, value in flat_params(model).items()}
    return base_params(base, 0, param_shardings(shapes, axis_names(model), make_mesh(MeshConfig(), jax.devices()[:1])))


@pytest.fixture(scope="module")
def clips():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 24, 24, 3)), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_move_is_answered_as_an_image(kind, clips):
    model = make_model(size_of(kind), lively(kind))
    images = model.encode_image(clips[:, 0])
    np.testing.assert_allclose(model.encode_image(clips[:, :1]), images, atol=1e-6)
    still = jnp.broadcast_to(clips[:, :1], clips.shape)
    np.testing.assert_allclose(model.encode_image(still), images, atol=1e-5)


@pytest.mark.parametrize("kind", ADDING)
def test_an_untrained_model_is_the_mean_of_the_frames(kind, clips):
    params = random_params(size_of(kind))
    plain = make_model(SIZE, split_temporal(params)[0])
    np.testing.assert_allclose(
        make_model(size_of(kind), params).encode_image(clips), plain.encode_image(clips), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_frames_counts(kind, clips):
    model = make_model(size_of(kind), lively(kind))
    difference = np.abs(model.encode_image(clips) - model.encode_image(clips[:, ::-1])).max()
    assert difference < 1e-6 if kind == "mean" else difference > 1e-3


@pytest.mark.parametrize("kind", ADDING)
def test_clips_of_a_batch_do_not_see_one_another(kind, clips):
    model = make_model(size_of(kind), lively(kind))
    np.testing.assert_allclose(model.encode_image(clips)[1:2], model.encode_image(clips[1:2]), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "remat"),
    [
        pytest.param("head", "full", marks=pytest.mark.slow),
        ("st_adapter", "dots"),
        pytest.param("divided", "full", marks=pytest.mark.slow),
    ],
)
def test_recomputing_activations_changes_no_gradient(kind, remat, clips):
    params = lively(kind)

    def loss(params, remat):
        return jnp.sum(make_model(size_of(kind), params, Runtime(remat=remat)).encode_image(clips) ** 3)

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, policy) for policy in ("none", remat))
    for name, value in plain.items():
        np.testing.assert_allclose(again[name], value, atol=1e-5, err_msg=name)


def test_attention_over_time_starts_by_looking_back_and_ahead():
    with nnx.use_eager_sharding(False):
        scores = np.asarray(TimeAttention(SIZE.vision, Runtime(), nnx.Rngs(0)).distance_scores(5))
    weights = np.asarray(jax.nn.softmax(scores))[:, 2]  # of the middle frame
    assert weights.shape == (4, 5)
    for head, row in enumerate(weights):
        back, ahead = row[:2].sum(), row[3:].sum()
        assert (back > 10 * ahead) if head % 2 == 0 else (ahead > 10 * back)
    np.testing.assert_allclose(np.diagonal(scores, axis1=1, axis2=2), 0)


def test_the_adapter_is_a_convolution_over_time_and_space():
    """By the definition: each output is the sum over 27 neighbours, 0 outside."""
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(2, 4, 3, 3, 5)), rng.normal(size=(3, 3, 3, 5))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    expected = np.zeros_like(x)
    for t, i, j in np.ndindex(4, 3, 3):
        window = padded[:, t : t + 3, i : i + 3, j : j + 3]
        expected[:, t, i, j] = np.einsum("btijc,tijc->bc", window, taps)
    found = depthwise_conv(jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32), (1, 2, 3))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ADDING)
def test_a_folder_keeps_it_and_stays_a_clip_for_others(kind, tmp_path):
    from transformers import CLIPConfig as TheirConfig

    params = lively(kind)
    write_params(tmp_path, size_of(kind), params)
    values = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(values) == size_of(kind)
    assert TheirConfig.from_pretrained(tmp_path).projection_dim == 16
    for name, value in read_params(tmp_path, size_of(kind)).items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)
    (tmp_path / TEMPORAL_FILE).unlink()
    with pytest.raises(UserError, match=rf"{TEMPORAL_FILE} is missing"):
        read_params(tmp_path, size_of(kind))


def test_weights_of_another_temporal_model_are_refused(tmp_path):
    write_params(tmp_path, size_of("head"), lively("head"))
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"temporal": "head"', '"temporal": "divided"')
    )
    with pytest.raises(UserError, match=r"temporal\.safetensors: .* is .*, not .*; copy it again"):
        read_params(tmp_path, size_of("divided"))


def test_an_unknown_kind_is_one_line():
    with pytest.raises(UserError, match="temporal is 'dividd'; did you mean 'divided'"):
        config_from_hf({"temporal": "dividd"})


@pytest.mark.parametrize("kind", ADDING)
def test_an_image_model_starts_a_temporal_one(kind, tmp_path):
    folder = write_model(tmp_path / "clip")
    start = make_base(str(folder), [], temporal=kind)
    params = host_params(start)
    added = split_temporal(params)[1]
    assert added.keys() == init_temporal(start.config, 0).keys() and added
    clips = jnp.asarray(
        np.random.default_rng(0).normal(size=(2, 3, *(start.config.vision.image_size,) * 2, 3)), jnp.float32
    )
    expected = load(str(folder)).model.encode_image(clips)
    np.testing.assert_allclose(make_model(start.config, params).encode_image(clips), expected, atol=1e-6)


def test_a_temporal_model_goes_on_only_as_what_it_is(tmp_path):
    folder = write_model(tmp_path / "clip")
    start = make_base(str(folder), [], temporal="head")
    write_params(tmp_path / "clip", start.config, host_params(start))
    assert make_base(str(folder), [], temporal="head").config.temporal == "head"
    with pytest.raises(UserError, match=r"set config\.model\.temporal=head"):
        make_base(str(folder), [], temporal="divided")
