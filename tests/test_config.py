"""Configs: every shipped file loads, overrides are typed, mistakes name the nearest valid key."""

import ast
from pathlib import Path

import pytest

from clip_har_jax.config import RunConfig, leaves, load_config, make_config
from clip_har_jax.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_all_promised_configs_are_there():
    promised = {"demo", "har15_scratch", "vitb32", "vitb16", "vitl14", "vitl14_336"}
    assert promised <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_says_only_what_differs_and_how_to_run_it(path):
    import runpy

    given = runpy.run_path(str(path))["get_config"]()
    config, defaults = dict(leaves(load_config(path))), dict(leaves(RunConfig()))
    flat = {key for section, values in given.to_dict().items() for key in _keys(values, section)}
    same = [key for key in flat if config[key] == defaults[key]]
    assert not same, "these equal the defaults"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/{path.name}" in docstring
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
