"""The end of a run: its result beside the baselines, where the time went, and the commands to go on with."""

import shlex

import pytest
from etils import epath

from clip_har_jax.config import make_config
from clip_har_jax.trainer.result import EXIT_RETENTION, Result, print_result
from clip_har_jax.trainer.run_data import unseen_spec
from clip_har_jax.training.time_account import CATEGORIES, describe_seconds
from tests.support.model_folders import write_images

METRICS = {
    "top1": 1 / 30,
    "top1_interval": [0.006, 0.167],
    "num_examples": 30,
    "macro_f1": 0.01,
    "baselines": {"chance": 1 / 15, "majority": 1 / 15},
}


def result_of(**changes):
    folder = epath.Path("runs/mine")
    seconds = {"productive": 70.0, "compile": 20.0, "evaluation": 9.8, "checkpoint": 0.2}
    given = {"model": folder / "model", "steps": 40, "metrics": METRICS, "exit_code": 0, "zero_shot": 0.4, **changes}
    return Result(folder, time_spent=seconds, seconds=100.0, **given)


def test_a_run_that_learned_nothing_does_not_end_like_a_success(capsys):
    print_result(result_of())
    said = capsys.readouterr().out
    assert "Top-1 is 0.033, with a 95% interval of 0.006 to 0.167 over 30 images." in said
    assert "It isn't shown to be better than guessing (0.067), the most frequent class (0.067)" in said
    assert "the start without training (0.400)" in said


def test_the_next_commands_name_the_paths_of_this_run(capsys):
    print_result(result_of(unseen="folder:photos"))
    said = capsys.readouterr().out
    for command in (
        "python scripts/evaluate.py --model=runs/mine/model --data=folder:photos --output=runs/mine/test",
        "python scripts/predict.py --model=runs/mine/model PHOTO.jpg",
        "python -m export --model=runs/mine/model --formats=onnx --output=runs/mine/export",
        "python -m serving --model=runs/mine/export",
    ):
        assert command in said
    print_result(result_of())  # there are no test images that the run didn't see
    assert "--data=folder:YOUR_TEST_IMAGES" in capsys.readouterr().out
    print_result(result_of(uses=("evaluate", "predict")))  # a NaFlex model, an image tower alone
    said = capsys.readouterr().out
    assert "scripts/evaluate.py" in said and "export" not in said and "serving" not in said


def test_the_next_commands_can_be_pasted_whatever_a_folder_is_called(capsys):
    print_result(result_of(model=epath.Path("runs/my run/model"), unseen="manifest:m.csv?split=test&root=a b"))
    lines = capsys.readouterr().out.splitlines()
    (evaluate,) = (shlex.split(line)[1:] for line in lines if "scripts/evaluate.py" in line)
    assert evaluate[:3] == ["python", "scripts/evaluate.py", "--model=runs/my run/model"]
    assert evaluate[3] == "--data=manifest:m.csv?split=test&root=a b"


def test_a_model_without_steps_is_not_called_the_best_of_them(capsys):
    print_result(result_of(steps=0))
    assert "step 0" not in capsys.readouterr().out
    print_result(result_of())
    assert "runs/mine/model (step 40, the best on the validation images)" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "told"), [(143, "stopped"), (EXIT_RETENTION, "refused")])
def test_without_a_model_there_is_nothing_to_run_on_it(capsys, code, told):
    print_result(result_of(model=None, exit_code=code))
    said = capsys.readouterr().out
    assert told in said
    assert "scripts/" not in said


def test_the_time_is_told_in_plain_words(capsys):
    print_result(result_of())
    said = capsys.readouterr().out
    assert "training steps 70 s (70%), compiling 20 s (20%), evaluating 10 s (10%)" in said
    assert "goodput" not in said and "saving" not in said
    whole = describe_seconds(dict.fromkeys(CATEGORIES, 1.0))
    assert all(words in whole for words in CATEGORIES.values())


def test_images_that_the_run_saw_are_no_test(tmp_path):
    def unseen(train, val=""):
        return unseen_spec(make_config({"data": {"train": train, "val": val}}))

    labels = ("cycling", "running")
    plain = write_images(tmp_path / "plain", labels, per_class=2)
    split = tmp_path / "split"
    for name, count in (("train", 3), ("test", 2)):
        write_images(split / name, labels, per_class=count)
    assert unseen("synthetic?split=train") == "synthetic"
    assert unseen(f"folder:{plain}") is None  # it has no splits: all its images were trained on
    assert unseen(f"folder:{split}") == f"folder:{split}"
    assert (
        unseen(f"folder:{split}", f"folder:{split}") is None
    )  # without a val folder, the test images chose the weights
    assert unseen("csv:labels.csv") is None
