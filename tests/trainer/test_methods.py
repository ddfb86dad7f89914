"""Each method, from one common start on the embedded set: it beats zero-shot, changes what it says, and is saved."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.special import softmax

from clip_har_jax import bundle
from clip_har_jax.data import synthetic
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.models.adapters import merge_lora
from clip_har_jax.models.head_file import HEAD_FILE
from clip_har_jax.models.heads import Features, HeadSize, head_logits, head_shapes, init_head
from clip_har_jax.pipelines.method_comparison import evaluate_on
from clip_har_jax.text import make_prompts
from clip_har_jax.trainer.result import EXIT_RETENTION, Result
from clip_har_jax.trainer.retention import interpolate
from clip_har_jax.trainer.run_data import select_classes, zero_shot_prompts
from clip_har_jax.trainer.train import train
from clip_har_jax.training.losses import balanced_weights, cross_entropy
from clip_har_jax.training.mixing import mix
from clip_har_jax.training.probe import LabeledFeatures, fit_linear_probe, make_tip_adapter
from tests.support.batches import read_pixels
from tests.support.model_folders import write_image, write_images
from tests.support.runs import config_with, params_of

KNOWN = ("cycling", "sitting", "sleeping", "using_laptop", "fighting", "running")  # what the start was trained on
NEW = ("dancing", "clapping", "eating", "hugging")


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(synthetic, "draw", cache(synthetic.draw))  # the trainings read a few hundred pictures many times
        yield


def config_for(start, name, steps=40, **sections):
    values: dict[str, dict[str, Any]] = {
        "data": {
            "val": "synthetic?split=val",
            "classes": NEW,
            "shots": 32,
            "augment": {"crop_scale_min": 1.0},
        },
        "model": {"name": str(start)},
        "method": {"name": name},
        "train": {"num_steps": steps, "global_batch_size": 32, "log_every_steps": steps},
        "optim": {"learning_rate": 1e-3, "warmup_fraction": 0.1, "weight_decay": 0.0},
        "eval": {"every_steps": steps, "batch_size": 160},
        "checkpoint": {"every_steps": steps},
    }
    return config_with(values, sections)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a small model trained on some of the actions."""
    data, size = {"classes": KNOWN, "shots": 100}, {"global_batch_size": 48}
    config = config_for("mini", "full", 120, data=data, train=size)
    return train(config, tmp_path_factory.mktemp("start"), quiet=True).model


@pytest.fixture(scope="module")
def zero_shot(start, tmp_path_factory):
    return train(config_for(start, "zero_shot"), tmp_path_factory.mktemp("zero_shot"), quiet=True).metrics["top1"]


def model_of(result: Result) -> Path:
    """Return the model folder that a finished run wrote."""
    assert result.model is not None
    return Path(result.model)


# Which parameters of model.safetensors differ afterwards, and the head that is saved.
ATTENTION = ("attention.query.kernel", "attention.value.kernel")
EXPECTED = {
    "linear_probe": (lambda name: False, "linear"),
    "full": (lambda name: True, "cosine"),
    "lp_ft": (lambda name: name.startswith("vis"), "linear"),
    "flyp": (lambda name: True, "cosine"),
    "lora": (lambda name: name.endswith(ATTENTION), "cosine"),
    "prompt": (lambda name: False, "linear"),
    "adapter": (lambda name: False, "adapter"),
    "tip_adapter": (lambda name: False, "tip_adapter"),
    "bitfit": (lambda name: name.endswith(".bias"), "cosine"),
}
RATES = {"lora": 1e-2, "prompt": 5e-2, "adapter": 5e-2, "bitfit": 1e-2}
FAST = ("linear_probe", "lora")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EXPECTED]
)
def test_each_method_beats_zero_shot_and_changes_what_it_says(name, start, zero_shot, tmp_path):
    changes, head = EXPECTED[name]
    rate = {"learning_rate": RATES[name]} if name in RATES else {}
    result = train(config_for(start, name, optim=rate), tmp_path, quiet=True)
    assert result.metrics["top1"] > zero_shot + 0.05
    baselines = json.loads((tmp_path / "model" / "run.json").read_text())["baselines"]
    assert baselines["zero_shot"] == result.zero_shot == pytest.approx(zero_shot)
    assert (baselines["chance"], baselines["data"]) == (1 / len(NEW), "synthetic?split=val")
    before, after = params_of(start), params_of(result.model)
    for key, value in before.items():
        if not changes(key):
            np.testing.assert_array_equal(value, after[key], err_msg=key)
        elif not key.endswith("attention.key.bias"):  # it shifts all scores of a query alike: its gradient is 0
            assert not np.array_equal(value, after[key]), key
    if name == "lora":  # its adapter of PEFT, read with the base model, is the merged model
        for key, value in params_of(tmp_path / "adapter").items():
            np.testing.assert_allclose(value, after[key], atol=1e-6, err_msg=key)
    assert bundle.read_actions(model_of(result)).head == head
    assert evaluate_on(config_for(start, name), model_of(result), "synthetic?split=val")["top1"] == pytest.approx(
        result.metrics["top1"], abs=0.01
    )  # what training measured is what the folder answers


HEAD_PARAMS = {
    "mlp": {"classes.kernel", "fc1.kernel", "fc1.bias", "fc2.kernel", "fc2.bias"},
    "cross_attention": {
        "classes.kernel",
        *(f"{layer}.{part}" for layer in ("query", "key", "value", "out") for part in ("kernel", "bias")),
    },
}


@pytest.mark.parametrize("head", [pytest.param(head, marks=pytest.mark.slow) for head in ("mlp", "cross_attention")])
def test_a_fusion_head_and_the_image_tower_learn_together(head, start, zero_shot, tmp_path):
    result = train(config_for(start, "full", method={"head": head}), tmp_path, quiet=True)
    assert result.metrics["top1"] > zero_shot + 0.05
    before, after = params_of(start), params_of(result.model)
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    tower = {name for name in before if name.startswith("vis")}  # the head's classes take the text tower's place
    assert moved | {"vision.layers.attention.key.bias"} == tower
    assert bundle.read_actions(model_of(result)).head == head
    saved = load_file(model_of(result) / HEAD_FILE)
    size = HeadSize(before["visual_projection.kernel"].shape[1], len(NEW), 0)
    assert set(saved) == set(head_shapes(head, size)[0]) == HEAD_PARAMS[head]
    lengths = np.linalg.norm(saved["classes.kernel"], axis=0)
    assert not np.allclose(lengths, np.exp(before["logit_scale"]), rtol=1e-4)  # what they all start with
    untrained = init_head(head, np.zeros((len(NEW), size.dim), np.float32), 1.0, seed=0)
    for name in HEAD_PARAMS[head] - {"classes.kernel", "key.bias"}:
        assert not np.array_equal(saved[name], untrained[name]), name


@pytest.mark.slow
def test_the_sigmoid_loss_teaches_both_towers(start, zero_shot, tmp_path):
    result = train(config_for(start, "full", method={"loss": "sigmoid"}), tmp_path, quiet=True)
    assert result.metrics["top1"] > zero_shot + 0.05
    before, after = params_of(start), params_of(result.model)
    still = {name for name, value in before.items() if np.array_equal(value, after[name])}
    assert still <= {f"{tower}.layers.attention.key.bias" for tower in ("text", "vision")}
    assert bundle.read_actions(model_of(result)).head == "cosine"


def test_zero_shot_writes_the_start(start, zero_shot, tmp_path):
    result = train(config_for(start, "zero_shot"), tmp_path, quiet=True)
    before, after = params_of(start), params_of(result.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert result.metrics["top1"] == zero_shot
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [0]


def test_a_learned_context_is_compared_with_the_usual_templates(start, zero_shot, tmp_path):
    """Its own prompts are bare names, on which the start does worse."""
    config = config_for(start, "prompt", steps=1)
    assert zero_shot_prompts(config, NEW) == make_prompts(NEW)
    assert train(config, tmp_path, quiet=True).zero_shot == pytest.approx(zero_shot)


def test_a_fitted_run_with_other_settings_in_its_folder_writes_another_model(start, tmp_path):
    """It has no checkpoints that would hold it to its settings."""
    first = train(config_for(start, "linear_probe"), tmp_path, quiet=True)
    before = bundle.verify(model_of(first))
    train(config_for(start, "linear_probe"), tmp_path, quiet=True)
    assert bundle.verify(model_of(first)) == before  # the same run: kept as it is
    changed = config_for(start, "linear_probe", data={"shots": 2})
    again = train(changed, tmp_path, quiet=True)
    assert bundle.verify(model_of(again)) != before
    assert json.loads((tmp_path / "model" / "run.json").read_text())["config_hash"] == changed.digest


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_model_in_one_line(start, tmp_path):
    drawn = select_classes(make_source("synthetic", "train"), NEW, "data.classes")
    for label in range(len(NEW)):
        folder = tmp_path / "images" / NEW[label]
        folder.mkdir(parents=True)
        for i in np.flatnonzero(drawn.label_ids == label)[:80]:
            Image.fromarray(read_pixels(drawn, int(i))).save(folder / f"{i}.png")
    command = [sys.executable, "scripts/train.py", "--config=configs/finetune.py", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.data.train=folder:{tmp_path / 'images'}", f"--config.model.name={start}"]
    # The start is no CLIP of many millions of images: it has to go further.
    command += ["--config.optim.learning_rate=0.002", "--config.train.patience=0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "preset 'small': 288 training images, under 10,000 (72 to 72 a class)" in done.stdout
    assert "optim.learning_rate=0.002 (as you set it)" in done.stdout
    found = evaluate_on(config_for(start, "lora"), tmp_path / "run" / "model", "synthetic?split=test")
    assert found["num_examples"] == 4 * 40
    assert found["top1"] > 0.4  # chance is 0.25


def test_features_are_computed_once(start, tmp_path, monkeypatch):
    from clip_har_jax.trainer import initial_state

    train(config_for(start, "linear_probe"), tmp_path / "first", quiet=True)

    def fail(*_):
        raise AssertionError("an image was read again")

    monkeypatch.setattr(initial_state, "embed", fail)
    train(config_for(start, "linear_probe"), tmp_path / "again", quiet=True)
    with pytest.raises(AssertionError, match="read again"):  # other images
        train(config_for(start, "linear_probe", data={"shots": 8}), tmp_path / "other", quiet=True)


def test_features_are_those_of_the_same_activation(start, tmp_path, monkeypatch):
    from clip_har_jax.trainer import initial_state

    train(config_for(start, "linear_probe"), tmp_path / "first", quiet=True)
    other = tmp_path / "other"
    shutil.copytree(start, other)
    (other / bundle.MANIFEST).unlink()
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_act"] = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[
        config["vision_config"].get("hidden_act", "quick_gelu")
    ]
    (other / "config.json").write_text(json.dumps(config))
    calls, embed = list[int](), initial_state.embed

    def counted(*arguments):
        calls.append(1)
        return embed(*arguments)

    monkeypatch.setattr(initial_state, "embed", counted)
    train(config_for(other, "linear_probe"), tmp_path / "second", quiet=True)
    assert len(calls) == 2


def test_features_are_known_by_what_files_hold(tmp_path):
    from clip_har_jax.trainer.features import examples_digest

    images = write_images(tmp_path / "a", ("running", "sleeping"), per_class=2)
    first = examples_digest(make_source(f"folder:{images}", "train"))
    same = write_images(tmp_path / "b", ("running", "sleeping"), per_class=2)
    assert examples_digest(make_source(f"folder:{same}", "train")) == first
    write_image(same / "running" / "0.png", seed=999)
    assert examples_digest(make_source(f"folder:{same}", "train")) != first


def test_features_that_another_process_lacks_are_computed_by_all(tmp_path, monkeypatch):
    from clip_har_jax.trainer import features

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = make_source(f"folder:{write_images(tmp_path / 'images', ('running', 'sleeping'), per_class=2)}", "train")
    calls, found = list[int](), LabeledFeatures(np.eye(4, dtype=np.float32), source.label_ids.astype(np.int32))

    def compute():
        calls.append(1)
        return found

    def cached():
        return features.cached_features(source, "digest", {"dtype": "float32"}, compute)

    cached()
    np.testing.assert_array_equal(cached().embeddings, found.embeddings)
    assert len(calls) == 1
    monkeypatch.setattr(features.distributed, "agree", lambda yes: False)
    cached()
    assert len(calls) == 2
    assert [path.suffix for path in features.cache_folder("features").iterdir()] == [".safetensors"]


def test_merged_updates_are_the_papers_formula():
    """LoRA: W + alpha / rank * A B, in numpy."""
    rng = np.random.default_rng(0)
    w, a, b = rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 3, 5))
    merged = merge_lora({"x.kernel": w, "x.lora_a": a, "x.lora_b": b}, scale=0.5)
    assert set(merged) == {"x.kernel"}
    np.testing.assert_allclose(merged["x.kernel"], w + 0.5 * np.einsum("lir,lro->lio", a, b))


def test_wise_ft_is_the_papers_formula():
    start, end = {"a": np.array([1.0, 2.0])}, {"a": np.array([3.0, 6.0]), "x.lora_a": np.array([7.0])}
    np.testing.assert_allclose(interpolate(start, end, 0.25)["a"], 0.75 * start["a"] + 0.25 * end["a"])
    np.testing.assert_array_equal(interpolate(start, end, 0.25)["x.lora_a"], [7.0])  # the other factor alone is scaled


def test_tip_adapter_is_the_papers_formula():
    rng = np.random.default_rng(0)

    def unit(x):
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    classes, keys, queries = (
        unit(rng.normal(size=(3, 8))),
        unit(rng.normal(size=(6, 8))),
        unit(rng.normal(size=(20, 8))),
    )
    label = np.array([0, 0, 1, 1, 2, 2], np.int32)
    fit = make_tip_adapter(
        LabeledFeatures(keys, label), LabeledFeatures(queries, rng.integers(0, 3, 20).astype(np.int32)), classes, 10.0
    )
    alpha, beta = fit.about["alpha"], fit.about["beta"]
    wanted = 10 * queries @ classes.T + alpha * np.exp(-beta * (1 - queries @ keys.T)) @ np.eye(3)[label]
    found = head_logits("tip_adapter", fit.params, Features(jnp.asarray(queries)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["lbfgs", "adamw"])
def test_a_probe_is_at_its_optimum(solver):
    """The gradient of the penalised cross-entropy, in numpy, is zero at the solution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    label = (x @ rng.normal(size=(5, 3)) + rng.normal(size=(60, 3))).argmax(-1).astype(np.int32)
    classes, data = rng.normal(size=(3, 5)).astype(np.float32), LabeledFeatures(x, label)
    fit = fit_linear_probe(data, data, classes, 1.0, solver, penalties=[0.1])
    w, b = fit.params["classes.kernel"], fit.params["classes.bias"]
    probs = softmax(x @ w + b, axis=-1) - np.eye(3)[label]
    tolerance = 1e-3 if solver == "lbfgs" else 1e-2
    np.testing.assert_allclose(x.T @ probs / 60 + 0.1 * (w - classes.T), 0, atol=tolerance)
    np.testing.assert_allclose(probs.mean(0) + 0.1 * b, 0, atol=tolerance)


def test_cross_entropy_is_the_papers_formulas():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    target, weights = np.eye(4)[label], np.array([0.5, 1.0, 2.0, 1.5])
    probs = softmax(logits, axis=-1)
    smoothed = 0.9 * target + 0.1 / 4
    wanted = -(smoothed * (1 - probs) ** 2 * np.log(probs)).sum(-1) * weights[label]

    def loss(x):
        return cross_entropy(
            x,
            jnp.asarray(target, jnp.float32),
            label_smoothing=0.1,
            focal_gamma=2.0,
            class_weights=jnp.asarray(weights),
        )

    x = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(loss(x), wanted, rtol=1e-4)
    plain = jax.grad(lambda x: cross_entropy(x, jnp.asarray(target, jnp.float32)).sum())(x)
    np.testing.assert_allclose(plain, probs - target, atol=1e-5)  # the gradient of softmax cross-entropy
    focal = jax.grad(lambda x: cross_entropy(x, jnp.asarray(target, jnp.float32), focal_gamma=2.0).sum())(x)
    p = (probs * target).sum(-1, keepdims=True)
    slope = 2 * p * (1 - p) * np.log(p) - (1 - p) ** 2  # d loss / d p * p, of the true class
    np.testing.assert_allclose(focal, slope * (target - probs), atol=1e-5)


def test_focal_loss_has_a_slope_where_a_class_is_certain():
    logits, target = jnp.array([[200.0, 0.0, -50.0]]), jnp.eye(3)[:1]
    for gamma in (0.5, 1.0, 2.0):
        for smoothing in (0.0, 0.1):

            def loss(x, gamma=gamma, smoothing=smoothing):
                return cross_entropy(x, target, focal_gamma=gamma, label_smoothing=smoothing).sum()

            assert np.isfinite(np.asarray(jax.grad(loss)(logits))).all()


def test_balanced_weights_are_inverse_to_effective_numbers():
    counts = np.array([10, 100, 1000])
    weights = balanced_weights(counts.tolist(), 0.99)
    effective = (1 - 0.99**counts) / (1 - 0.99)
    np.testing.assert_allclose(weights * effective, (weights * effective)[0], rtol=1e-5)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    np.testing.assert_allclose(balanced_weights(counts.tolist(), 0.0), 1)


def test_mixed_labels_are_the_share_of_the_pixels():
    images = jnp.stack([jnp.full((8, 8, 3), float(i)) for i in range(6)])
    target, mask = jnp.eye(6), jnp.array([1.0, 1, 1, 0, 1, 1])
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
        mixed, labels = mix(images, target, mask, jax.random.key(0), mixup, cutmix)
        np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
        means = np.asarray(mixed).mean((1, 2, 3))
        np.testing.assert_allclose(means, np.asarray(labels) @ np.arange(6), atol=1e-5)
        np.testing.assert_array_equal(labels[3:5], target[3:5])  # a masked row is mixed into none, and with none
        if not mixup:
            assert set(np.unique(np.asarray(mixed))) <= set(range(6))  # boxes, no blends
        assert not np.allclose(labels, target)


@pytest.mark.slow
def test_the_retention_gate_and_wise_ft(start, tmp_path, capsys):
    harsh = {"learning_rate": 1e-2}
    retention = {"data": "synthetic?split=test", "classes": KNOWN, "max_drop": 0.0, "fail": True}
    shutil.copytree(start, tmp_path / "model")  # as an earlier start without the gate leaves one
    refused = train(config_for(start, "full", retention=retention, optim=harsh), tmp_path, quiet=True)
    assert (refused.exit_code, refused.model) == (EXIT_RETENTION, None)
    assert not (tmp_path / "model").exists()
    assert "WARNING: zero-shot top-1" in capsys.readouterr().err
    gate = json.loads((tmp_path / "retention.json").read_text())
    assert gate["before"] > 0.6 > gate["after"]
    assert not gate["passed"]
    # the same command with WiSE-FT goes on from the last step
    config = config_for(
        start, "full", retention={**retention, "max_drop": 1.0}, optim=harsh, method={"wise_ft": (0.0, 0.5)}
    )
    result = train(config, tmp_path)
    said = capsys.readouterr().out
    curve = json.loads((tmp_path / "wise_ft.json").read_text())
    points = {point["alpha"]: point for point in curve["curve"]}
    assert points[0.0]["retained_top1"] == pytest.approx(gate["before"])
    assert points[1.0]["retained_top1"] == pytest.approx(gate["after"])
    sums = {alpha: point["target_top1"] + point["retained_top1"] for alpha, point in points.items()}
    assert sums[curve["chosen"]] == max(sums.values())
    assert f"wise-ft alpha {curve['chosen']:g} chosen: {curve['reason']}; " in said
    assert f"; 0: validation top-1 {points[0.0]['target_top1']:.3f}, " in said
    before, after = params_of(start), params_of(result.model)
    assert (tmp_path / "wise_ft.png").stat().st_size > 1000
    if curve["chosen"] == 0.0:
        assert all(np.array_equal(before[name], after[name]) for name in before)
    # without it nothing of it is left, in the folder or in a report
    train(replace(config, method=replace(config.method, wise_ft=())), tmp_path, quiet=True)
    assert not list(tmp_path.glob("wise_ft.*"))


def test_the_gate_measures_the_start_of_this_run(start, tmp_path):
    (tmp_path / "retention.json").write_text('{"before": 0.0}')  # of a run of another model, which made no step
    retention = {"data": "synthetic?split=test", "classes": KNOWN}
    train(config_for(start, "zero_shot", retention=retention), tmp_path, quiet=True)
    gate = json.loads((tmp_path / "retention.json").read_text())
    assert gate["before"] == gate["after"] > 0.6


def test_a_run_that_gets_no_better_is_done(start, tmp_path, capsys):
    sections = {
        "train": {"patience": 2, "num_steps": 40},
        "eval": {"every_steps": 2},
        "optim": {"learning_rate": 1e-12},
    }
    result = train(config_for(start, "full", **sections), tmp_path)
    assert "at step 6: no better top-1 in 2 evaluations (train.patience)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [2, 4, 6]
    assert result.exit_code == 0
    written = (tmp_path / "metrics.jsonl").read_text()
    train(config_for(start, "full", **sections), tmp_path, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == written  # done stays done


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "linear_probe", "head": "mlp"}}, "method 'linear_probe' takes linear"),
        ({"method": {"name": "full", "head": "linear", "towers": "text"}}, "takes the text tower's place"),
        ({"method": {"name": "full", "loss": "class_aware", "towers": "image"}}, "compares images with texts"),
        ({"method": {"name": "flyp", "loss": "cross_entropy"}}, "class_aware or softmax or sigmoid"),
        ({"method": {"name": "flyp", "mixup": 0.2}}, "config.method.mixup needs class logits"),
        (
            {"method": {"name": "lora", "lora_targets": ("*.attention.qery",)}},
            "'*.attention.qery'; layers: text",
        ),
        ({"method": {"name": "lora", "lora_rank": 64}}, "use a rank below that"),
        ({"method": {"name": "prompt", "prompt_length": 2}}, "set method.prompt_length to"),
        ({"method": {"name": "prompt", "prompt_length": 23}}, "leave some for the classes' names"),
        ({"data": {"shots": 99999}}, "class 'dancing' has only 2000 training images"),
        ({"method": {"wise_ft": (0.5, 1.5)}}, "must be from 0 to 1"),
        ({"text": {"templates": ("a photo",)}}, "needs one {}"),
        ({"retention": {"fail": True}}, "config.retention.data is empty"),
        ({"retention": {"data": "synthetic", "classes": ("cycling", "runing")}}, "'running'"),
        ({"data": {"classes": ("cycling",)}}, "two or more classes"),
        ({"method": {"name": "flyp"}, "train": {"accumulation_steps": 2}}, "compares all images of a batch"),
    ],
)
def test_mistakes_are_refused_before_any_compute(start, tmp_path, sections, message):
    name = sections.get("method", {}).get("name", "full")
    with pytest.raises(UserError) as error:
        train(config_for(start, name, **sections), tmp_path, quiet=True)
    assert message in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()
