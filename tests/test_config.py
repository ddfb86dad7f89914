"""Configs: every shipped file loads, overrides are typed, mistakes name the nearest valid key."""

import ast
import inspect
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from clip_har_jax.config import RunConfig, load_config, make_config
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.settings import Range, leaves, settings_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_all_promised_configs_are_there():
    promised = {"demo", "har15_scratch", "vitb32", "vitb16", "vitl14", "vitl14_336"}
    assert promised <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_says_only_what_differs_and_how_to_run_it(path):
    import runpy

    get_config = runpy.run_path(str(path))["get_config"]
    chosen_by_data = inspect.signature(get_config).parameters  # such values may equal a default
    given = ConfigDict() if chosen_by_data else get_config()
    config, defaults = dict(leaves(load_config(path))), dict(leaves(RunConfig()))
    flat = {key for section, values in given.to_dict().items() for key in _keys(values, section)}
    same = [key for key in flat if config[key] == defaults[key]]
    assert not same, "these equal the defaults"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None and f"--config=configs/{path.name}" in docstring
    assert "Hardware:" in docstring
    assert "Expected result:" in docstring


def _keys(values, prefix):
    if not isinstance(values, dict):
        return [prefix]
    return [key for name, value in values.items() for key in _keys(value, f"{prefix}.{name}")]


def test_overrides_are_typed():
    config = make_config(
        {"optim": {"learning_rate": 1}},
        [
            "--config.optim.weight_decay=0",
            "--config.train.num_steps=7",
            "--config.model.image_size_px=32",
            "--config.data.augment.flip=false",
            "--config.text.templates=('a {}', 'b {}')",
        ],
    )
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.weight_decay, float)
    assert (config.train.num_steps, config.model.image_size_px) == (7, 32)
    assert config.data.augment.flip is False
    assert config.text.templates == ("a {}", "b {}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learnin_rate=1", "did you mean 'optim.learning_rate'"),
        ("learning_rate=1", "did you mean 'optim.learning_rate'"),
        ("train.num_steps=abc", "^--config.train.num_steps=abc: invalid literal"),
        ("train.num_steps=1.5", "1.5"),
        ("seed=true", "true"),
        ("optim=3", "unknown key"),
        ("mesh.strategy=fdsp", "did you mean 'fsdp'"),
        ("data.val_fraction=2", "0 to 1"),
        ("train.global_batch_size=0", "above 0"),
        ("seed=-1", "0 or more"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        make_config({}, [f"--config.{override}"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optm": {}}, "did you mean 'optim'"),
        ({"seed": True}, "takes int, not True"),
        ({"optim": 3}, "holds keys of its own"),
        ({"text": {"templates": "a {}"}}, "takes"),
    ],
)
def test_wrong_values_in_a_file_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_config(values)


def test_missing_or_wrong_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="get_config"):
        load_config(tmp_path / "empty.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# one\nget_config = (", "line 2: SyntaxError"),
        ("def get_config():\n    return undefined\n", "line 2: NameError: name 'undefined'"),
        ("import nothing_of_this_name", "line 1: ModuleNotFoundError"),
        ("def get_config():\n    return None\n", "AttributeError"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_number(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "mine.py")
    assert "\n" not in str(caught.value)


def test_a_file_may_give_a_plain_dict(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return {'seed': 3}\n")
    assert load_config(tmp_path / "mine.py").seed == 3


def test_a_message_names_the_nearest_or_a_bearable_number():
    classes = [f"class_{i:03}" for i in range(200)]
    assert nearest("clas_017", classes) == "did you mean 'class_017'?"
    said = nearest("something else", classes)
    assert "'class_019' and 180 more" in said
    assert "class_020" not in said


def test_digest_is_of_the_values():
    assert make_config().digest == RunConfig().digest
    assert make_config({"seed": 1}).digest != RunConfig().digest


# The policy at resume, and the keys of each kind of range. Every key stands once in each table.
AT_RESUME = {
    "free": """
        checkpoint.every_steps checkpoint.keep_latest checkpoint.keep_best checkpoint.allow_new_batch_size
        eval.every_steps eval.batch_size trackers retention.max_drop retention.fail method.wise_ft train.patience
        mesh.strategy mesh.data mesh.fsdp mesh.tensor data.max_bad_fraction data.max_megapixels data.num_threads
        data.num_workers data.prefetch_batches data.retrieval model.attention model.remat train.log_every_steps
        train.accumulation_steps train.max_skipped_steps""",
    "warned": """optim.schedule optim.decay_fraction optim.learning_rate optim.warmup_fraction optim.weight_decay
        optim.b1 optim.b2 optim.eps
        optim.clip_norm optim.layer_decay train.num_epochs train.num_steps data.augment.crop_scale_min
        data.augment.flip data.augment.no_flip_labels data.augment.randaugment_operations
        data.augment.randaugment_magnitude data.augment.color_jitter data.augment.erase_probability
        method.label_smoothing model.compute_dtype""",
    "refused": """
        data.train data.val data.val_fraction data.split_seed data.shots data.labels data.classes data.sampling
        data.shuffle_buffer data.num_streams data.multi_label method.asymmetric_gamma_pos
        method.asymmetric_gamma_neg method.asymmetric_margin
        data.video.num_frames data.video.sampling data.video.rate_hz data.video.num_views text.templates
        text.descriptions text.phrases model.name model.image_size_px model.temporal method.name method.towers
        method.head method.loss
        method.freeze method.focal_gamma method.class_balance method.mixup method.cutmix method.drop_path
        method.lora_rank method.lora_alpha method.lora_targets method.prompt_length method.prompt_init
        method.prompt_per_class method.solver method.cache_per_class retention.data retention.classes
        train.global_batch_size optim.name optim.ema_decay seed""",
}
RANGES = {
    "above 0": """data.shuffle_buffer data.num_streams
        data.video.num_frames data.video.rate_hz data.video.num_views data.shots method.lora_rank
        method.lora_alpha method.prompt_length method.cache_per_class data.max_megapixels data.num_threads
        data.prefetch_batches model.image_size_px train.num_epochs train.num_steps train.global_batch_size
        train.accumulation_steps train.max_skipped_steps train.log_every_steps optim.learning_rate optim.eps
        optim.clip_norm mesh.data mesh.fsdp mesh.tensor checkpoint.every_steps checkpoint.keep_latest eval.every_steps
        eval.batch_size""",
    "0 or more": """data.num_workers data.augment.randaugment_operations optim.weight_decay method.focal_gamma
        method.asymmetric_gamma_pos method.asymmetric_gamma_neg
        method.mixup method.cutmix train.patience data.split_seed checkpoint.keep_best seed""",
    "from 0 to 1": """data.val_fraction data.max_bad_fraction data.augment.crop_scale_min data.augment.color_jitter
        data.augment.erase_probability method.label_smoothing method.class_balance method.drop_path retention.max_drop
        optim.warmup_fraction optim.decay_fraction optim.b1 optim.b2 optim.ema_decay method.wise_ft
        method.asymmetric_margin""",
    "from 0 to 30": "data.augment.randaugment_magnitude",
    "above 0 and at most 1": "optim.layer_decay",
    "uniform, tsn, dense": "data.video.sampling",
    "shuffle, class_balanced, repeat_factor, weights": "data.sampling",
    "float32, bfloat16": "model.compute_dtype",
    "adamw, lion, muon, adafactor, schedule_free_adamw": "optim.name",
    "cosine, wsd, constant": "optim.schedule",
    "none, dots, full": "model.remat",
    "mean, head, st_adapter, divided": "model.temporal",
    "auto, xla, cudnn": "model.attention",
    "image, text, both": "method.towers",
    "lbfgs, adamw": "method.solver",
    "dp, fsdp, tp, fsdp_tp": "mesh.strategy",
    "tensorboard, mlflow, wandb": "trackers",
    "": """data.multi_label data.train data.val data.retrieval data.labels data.classes
        data.augment.flip data.augment.no_flip_labels text.templates
        text.descriptions text.phrases model.name method.name method.head method.loss method.freeze method.lora_targets
        method.prompt_init method.prompt_per_class retention.data retention.classes retention.fail
        checkpoint.allow_new_batch_size""",
}
# Of each range: values at its inner and outer side.
EDGES = {
    "above 0": ((1,), (0, -1)),
    "0 or more": ((0, 1), (-1,)),
    "from 0 to 1": ((0.0, 1.0), (-0.01, 1.01, float("nan"))),
    "from 0 to 30": ((0.0, 30.0), (-0.01, 30.01, float("nan"))),
    "above 0 and at most 1": ((0.01, 1.0), (0.0, 1.01)),
}


def test_every_key_has_its_range_and_its_policy_at_resume():
    for key, hint, found in settings_of(RunConfig):
        assert found is not None, f"{key}: declare it by setting(default, accepted, policy)"
        assert found.at_resume in AT_RESUME, key
        number = hint in (int, float, int | None, float | None, tuple[int, ...], tuple[float, ...])
        assert isinstance(found.accepted, Range) == number, f"{key}: a number needs a Range, and nothing else has one"
    settings = {key: found for key, _, found in settings_of(RunConfig) if found is not None}
    ranges = {key: said for said, keys in RANGES.items() for key in keys.split()}
    assert ranges == {key: str(found.accepted) for key, found in settings.items()}
    policies = {key: policy for policy, keys in AT_RESUME.items() for key in keys.split()}
    assert policies == {key: found.at_resume for key, found in settings.items()}


@pytest.mark.parametrize("said", EDGES)
def test_the_edges_of_a_range_are_where_it_says(said):
    for key in RANGES[said].split():
        is_tuple = isinstance(dict(leaves(RunConfig()))[key], tuple)
        accepted, refused = EDGES[said]
        for value in accepted:
            make_config(nested(key, (value,) if is_tuple else value))
        for value in refused:
            with pytest.raises(UserError, match=key):
                make_config(nested(key, (value,) if is_tuple else value))


@pytest.mark.parametrize("key", [key for said, keys in RANGES.items() if "," in said for key in keys.split()])
def test_each_choice_is_accepted_and_another_name_refused(key):
    for said in (said for said, keys in RANGES.items() if key in keys.split()):
        for name in said.split(", "):
            make_config(nested(key, (name,) if key == "trackers" else name))
    with pytest.raises(UserError, match=f"{key}.*'nothing'; "):
        make_config(nested(key, ("nothing",) if key == "trackers" else "nothing"))


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_a_file_may_choose_values_by_the_command_line(tmp_path):
    text = "def get_config(overrides):\n    return {'seed': len(overrides), 'train': {'num_steps': 5}}\n"
    (tmp_path / "mine.py").write_text(text)
    config = load_config(tmp_path / "mine.py", ["--config.train.num_steps=7", "--config.optim.b1=0.5"])
    assert (config.seed, config.train.num_steps, config.optim.b1) == (2, 7, 0.5)
