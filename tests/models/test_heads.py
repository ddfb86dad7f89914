"""Heads: each computes the formula of its paper, begins as CLIP does, and is read back as it was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.models.factory import load, make_base
from clip_har_jax.models.head_file import HEAD_FILE, read_head, write_head
from clip_har_jax.models.heads import HEADS, Features, HeadSize, head_logits, head_shapes, image_features, init_head
from clip_har_jax.text import make_prompts
from tests.support.model_folders import IMAGE_SIZE_PX, write_model

DIM, NUM_CLASSES, CACHE = 16, 3, 5
LABELS = ("cycling", "running", "sleeping")
OF_IMAGES = [name for name in HEADS if name not in ("frame_attention", "temporal")]  # those of clips: test_clips.py


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_features(rng):
    images, patches = rng.normal(size=(4, DIM)), rng.normal(size=(4, 9, DIM))
    return Features(*(jnp.asarray(unit(x), jnp.float32) for x in (images, patches)))


def random_params(name, rng):
    """Parameters none of which is 0, so that each one shows in the logits."""
    shapes, _ = head_shapes(name, HeadSize(DIM, NUM_CLASSES, CACHE if name == "tip_adapter" else 6))
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def expected_logits(name, p, image, patches):
    cosine = image @ p["classes.kernel"]
    scale, classes = np.linalg.norm(p["classes.kernel"], axis=0), unit(p["classes.kernel"].T)
    if name == "linear":
        return cosine + p["classes.bias"]
    if name == "mlp":
        pairs = np.stack([[np.concatenate([v, t]) for t in classes] for v in image])
        hidden = pairs @ p["fc1.kernel"] + p["fc1.bias"]
        return cosine + (hidden * (1 + erf(hidden / np.sqrt(2))) / 2 @ p["fc2.kernel"] + p["fc2.bias"])[..., 0]
    if name == "cross_attention":
        query, key, value = (
            x @ p[f"{part}.kernel"] + p[f"{part}.bias"]
            for part, x in (("query", classes), ("key", patches), ("value", patches))
        )
        weights = softmax(query @ key.transpose(0, 2, 1) / np.sqrt(DIM), axis=-1)
        found = weights @ value @ p["out.kernel"] + p["out.bias"]
        return cosine + scale * (found * classes).sum(-1)
    if name == "adapter":  # on features of any length, as in the authors' code
        ratio, raw = p["ratio"], 7.0 * image
        new = np.maximum(np.maximum(raw @ p["down.kernel"], 0) @ p["up.kernel"], 0)
        return unit(ratio * new + (1 - ratio) * raw) @ p["classes.kernel"]
    affinity = np.exp(-p["beta"] * (1 - image @ p["keys.kernel"]))
    return cosine + p["alpha"] * affinity @ p["values.kernel"]


@pytest.mark.parametrize("name", OF_IMAGES)
def test_each_head_computes_its_formula(name):
    rng = np.random.default_rng(0)
    features, params = make_features(rng), random_params(name, rng)
    wanted = expected_logits(name, params, np.asarray(features.image), np.asarray(features.patches))
    np.testing.assert_allclose(head_logits(name, params, features), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "cross_attention"])
def test_an_untrained_head_answers_as_clip_does(name):
    rng = np.random.default_rng(1)
    features, classes = make_features(rng), unit(rng.normal(size=(NUM_CLASSES, DIM))).astype(np.float32)
    params = init_head(name, classes, 20.0, seed=0)
    np.testing.assert_allclose(
        head_logits(name, params, features), 20 * features.image @ classes.T, rtol=1e-5, atol=1e-5
    )


def write_headed_model(folder, name, temperature=1.0):
    """Return a model folder whose head isn't the cosine."""
    write_model(folder)
    params = random_params(name, np.random.default_rng(2))
    write_head(folder, params)
    bundle.write_actions(folder, bundle.Actions(LABELS, make_prompts(LABELS), temperature, name))
    bundle.seal(folder)
    return params


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_model_folder_is_served_with_its_head(name, tmp_path):
    params = write_headed_model(tmp_path / "model", name, temperature=2.0)
    images = np.random.default_rng(3).integers(0, 256, (2, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    loaded = load(str(tmp_path / "model"))
    mean, std = (np.asarray(values) for values in (loaded.preprocess.mean, loaded.preprocess.std))
    pixels = jnp.asarray((images / 255.0 - mean) / std, jnp.float32)
    features = image_features(loaded.model, pixels, with_patches=True)
    wanted = expected_logits(name, params, np.asarray(features.image), np.asarray(features.patches)) / 2
    backend = JaxBackend(tmp_path / "model", batch_size=2)
    np.testing.assert_allclose(backend.logits(images), wanted, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(backend.embed(images), np.asarray(features.image), atol=1e-5)
    head = make_base(str(tmp_path / "model"), []).head
    assert head is not None and (head.name, head.labels) == (name, LABELS)
    for key, value in params.items():
        np.testing.assert_array_equal(head.params[key], value)


def test_patches_are_what_the_class_token_is_beside(tmp_path):
    model = load(str(write_model(tmp_path / "model"))).model
    images = jax.random.normal(jax.random.key(0), (2, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3))
    features = image_features(model, images, with_patches=True)
    np.testing.assert_allclose(features.image, model.encode_image(images), atol=1e-6)
    assert features.patches.shape == (2, 4, DIM)


def test_new_classes_need_the_cosine_head(tmp_path):
    write_headed_model(tmp_path / "model", "linear")
    with pytest.raises(UserError, match=r"--classes: the 'linear' head .* knows only its own 3 actions"):
        JaxBackend(tmp_path / "model", ["riding a bike", "sleeping"])


def test_heads_that_do_not_fit_are_refused(tmp_path):
    params = random_params("mlp", np.random.default_rng(0))
    with pytest.raises(UserError, match=f"{HEAD_FILE} is missing"):
        read_head(tmp_path, "mlp", DIM, NUM_CLASSES)
    (tmp_path / HEAD_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="can't be read"):
        read_head(tmp_path, "mlp", DIM, NUM_CLASSES)
    write_head(tmp_path, params)
    with pytest.raises(UserError, match="3 classes of 16 dims, the model has 4 of 16"):
        read_head(tmp_path, "mlp", DIM, 4)
    with pytest.raises(UserError, match=r"'linear' head don't fit: classes\.bias is None, not \(3,\)"):
        read_head(tmp_path, "linear", DIM, NUM_CLASSES)
    with pytest.raises(UserError, match=r"missing keys\.kernel"):
        read_head(tmp_path, "tip_adapter", DIM, NUM_CLASSES)
    write_head(tmp_path, params | {"extra": np.zeros(1)})
    with pytest.raises(UserError, match="extra"):
        read_head(tmp_path, "mlp", DIM, NUM_CLASSES)
