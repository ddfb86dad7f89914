"""The result of a training, and how it is printed."""

import shlex
from dataclasses import dataclass
from typing import Any

from etils import epath

from clip_har_jax import cli
from clip_har_jax.evaluation.baselines import verdict
from clip_har_jax.evaluation.retrieval import describe
from clip_har_jax.training.time_account import describe_seconds

USES = ("evaluate", "predict", "export", "serve")
EXIT_RETENTION = 3  # zero-shot accuracy dropped more than the config allows


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
      model: the model folder; None if a signal stopped the run or the retention gate refused the weights.
      steps: of the chosen weights.
      metrics: of the model folder on the validation data.
      time_spent: seconds by category, over all starts.
      seconds: of this start.
      exit_code: 0, 128 + the signal's number, or `EXIT_RETENTION`.
      zero_shot: accuracy of the base model on the same data; None: not known.
      unseen: SPEC of test images that the run didn't use; None: its data have none.
      uses: the next commands that take the model, by their names in `USES`.
    """

    workdir: epath.Path
    model: epath.Path | None
    steps: int
    metrics: dict[str, Any]
    time_spent: dict[str, float]
    seconds: float
    exit_code: int
    zero_shot: float | None = None
    unseen: str | None = None
    uses: tuple[str, ...] = USES


def print_result(result: Result) -> None:
    """Print the result with its baselines, the files, the time spent, and the next commands."""
    rows: list[tuple[str, str]] = []
    if result.exit_code == EXIT_RETENTION:
        rows += [
            ("refused", "no model is written: more zero-shot accuracy was lost than config.retention.max_drop"),
            ("", "the checkpoints are kept; with other retention or wise_ft settings the same command goes on"),
        ]
    elif result.model is None:
        rows.append(("stopped", f"at step {result.steps}, saved; the same command continues"))
    else:
        rows += [
            ("result", verdict(result.metrics, result.zero_shot)),
            ("macro F1", f"{result.metrics['macro_f1']:.3f}"),
            *(describe(result.metrics["retrieval"]) if "retrieval" in result.metrics else []),
            ("model", f"{result.model}{_origin(result.steps)}"),
        ]
    rows += [
        ("metrics", str(result.workdir / "metrics.jsonl")),
        ("time", f"{result.seconds:.0f} s"),
        ("spent on", f"{describe_seconds(result.time_spent)}; over all starts"),
    ]
    cli.print_rows(rows)
    if result.model is not None:
        print("Next:")
        cli.print_rows(_next_commands(result, result.model))


def _origin(steps: int) -> str:
    """Return the origin of the weights; empty for a method without steps."""
    return f" (step {steps}, the best on the validation images)" if steps else ""


def _next_commands(result: Result, model: epath.Path) -> list[tuple[str, str]]:
    """Return the next commands, by purpose; without known test images, the person must name some."""
    exported, data = result.workdir / "export", result.unseen or "folder:YOUR_TEST_IMAGES"
    of_model = f"--model={model}"
    commands = {
        "evaluate": ["scripts/evaluate.py", of_model, f"--data={data}", f"--output={result.workdir / 'test'}"],
        "predict": ["scripts/predict.py", of_model, "PHOTO.jpg"],
        "export": ["-m", "export", of_model, "--formats=onnx", f"--output={exported}"],
        "serve": ["-m", "serving", f"--model={exported}"],
    }
    return [(name, shlex.join(["python", *commands[name]])) for name in result.uses]
