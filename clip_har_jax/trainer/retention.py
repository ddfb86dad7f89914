"""What fine-tuning costs in zero-shot ability, the gate that says so, and WiSE-FT, which buys some of it back."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from clip_har_jax.batch import Batch
from clip_har_jax.files import read_json, write_json
from clip_har_jax.models.adapters import A as LORA_A
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed
from clip_har_jax.trainer.run_data import RetentionData
from clip_har_jax.training.state import TrainState
from clip_har_jax.training.steps import make_text_step

if TYPE_CHECKING:
    from clip_har_jax.trainer.run import Run


class Retention:
    """Zero-shot accuracy on data that isn't trained for: CLIP's own towers and cosine, whatever head the run has."""

    def __init__(self, run: "Run", data: RetentionData):
        self.run, self.data = run, data
        texts = [text for label in data.labels for text in data.prompts[label]]
        ids, _ = run.start.tokenizer(texts, run.start.config.text.context_length)
        class_of_prompt = [i for i, label in enumerate(data.labels) for _ in data.prompts[label]]
        self._prompts = run.program.place_prompts(ids, class_of_prompt, len(data.labels))
        self._text_step = make_text_step(run.program.method, len(data.labels), run.mesh)
        self._bad_inputs = run.watch(data.source)

    def top1(self, params: Params) -> float:
        """Of all parameters, on the mesh."""
        classes = np.asarray(self._text_step(params, *self._prompts))

        def step(batch: Batch) -> tuple[jax.Array, Batch]:
            return self.run.program.feature_step(params, batch)

        right = total = 0
        for batch in self.run.computed(step, self.data.source, self._bad_inputs):
            found = (batch.image @ classes.T).argmax(axis=-1) == batch.label
            right, total = right + int((found * (batch.mask > 0)).sum()), total + int((batch.mask > 0).sum())
        return right / max(total, 1)

    def of(self, state: TrainState) -> float:
        return self.top1({**self.run.weights(state), **self.run.frozen})

    def before(self) -> float:
        """Of the start: as measured when the run began; a folder without a step may hold another run's."""
        known = distributed.broadcast(read_json(self.run.workdir / "retention.json") if distributed.is_main() else None)
        if known is not None and self.run.first_step:
            return float(known["before"])
        before = self.of(self.run.state)
        self._write({"before": before})
        return before

    def check(self, before: float, after: float) -> bool:
        """Write retention.json and say aloud what was lost; whether that is within the bound."""
        config = self.run.config.retention
        passed = before - after <= config.max_drop
        facts = {"after": after, "drop": before - after, "max_drop": config.max_drop, "passed": passed}
        self._write({"before": before, **facts})
        if not passed and distributed.is_main():
            print(
                f"WARNING: zero-shot top-1 on {config.data} fell from {before:.3f} to {after:.3f}, more than "
                f"config.retention.max_drop={config.max_drop:g}. Try config.method.wise_ft=(0.25,0.5,0.75,1.0), a "
                "lower config.optim.learning_rate, or method.name=lora",
                file=sys.stderr,
            )
        return passed

    def _write(self, facts: Mapping[str, Any]) -> None:
        if distributed.is_main():
            about: dict[str, Any] = {"data": self.run.config.retention.data, "num_examples": len(self.data.source)}
            about["classes"] = list(self.data.labels)
            write_json(self.run.workdir / "retention.json", {**about, **facts})


def interpolate(start: Mapping[str, Any], end: Mapping[str, Any], alpha: float) -> Params:
    """WiSE-FT (Wortsman et al. 2022, equation 1): (1 - alpha) * start + alpha * end, parameter by parameter.

    Of a low-rank update one factor alone is scaled, since their product is what is added to the weights.
    """
    return {
        name: np.asarray(value)
        if name.endswith(LORA_A)
        else ((1 - alpha) * np.asarray(start[name]) + alpha * np.asarray(value)).astype(np.float32)
        for name, value in end.items()
    }


def choose_wise_ft(run: "Run", state: TrainState, retention: Retention | None, quiet: bool) -> TrainState:
    """Try the alphas of `config.method.wise_ft`, and 1, and take the best; writes wise_ft.json and wise_ft.png.

    The best has the highest mean of validation accuracy and, where there is a retention gate, of retained zero-shot
    accuracy; of equal ones the one that moved least. The fine-tuned weights are always among them: half-way to a start
    that knew nothing lies a worse model. Without alphas, or without steps to go back on, the state stays, and what an
    earlier setting left goes, so that no report shows it.
    """
    if distributed.is_main():
        for name in ("wise_ft.json", "wise_ft.png"):
            (run.workdir / name).unlink(missing_ok=True)
    if not run.config.method.wise_ft or run.program.method.recipe.learns_from != "steps":
        return state
    start = run.start_params()
    end: Params = _fetch_all(run.weights(state))
    points = []
    for alpha in sorted({*run.config.method.wise_ft, 1.0}):
        mixed = run.with_weights(state, interpolate(start, end, alpha))
        point = {"alpha": alpha, "target_top1": run.evaluate(mixed).metrics["top1"]}
        points.append(point | ({"retained_top1": retention.of(mixed)} if retention else {}))
    best = max(
        points, key=lambda point: (sum(value for key, value in point.items() if key != "alpha"), -point["alpha"])
    )
    if not quiet:
        print(f"wise-ft alpha {best['alpha']:g} chosen; {', '.join(map(_describe, points))}")
    if distributed.is_main():
        write_json(run.workdir / "wise_ft.json", {"curve": points, "chosen": best["alpha"]})
        if retention:
            from clip_har_jax.evaluation.retention_plots import draw_wise_ft

            (run.workdir / "wise_ft.png").write_bytes(draw_wise_ft(points, best["alpha"]))
    return run.with_weights(state, interpolate(start, end, best["alpha"]))


def _describe(point: Mapping[str, float]) -> str:
    kept = f", retained {point['retained_top1']:.3f}" if "retained_top1" in point else ""
    return f"{point['alpha']:g}: validation top-1 {point['target_top1']:.3f}{kept}"


def _fetch_all(params: Params) -> Params:
    """On every process."""
    from jax.experimental import multihost_utils

    return {
        name: np.asarray(value)
        if value.is_fully_addressable or value.is_fully_replicated
        else np.asarray(multihost_utils.process_allgather(value, tiled=True))
        for name, value in params.items()
    }
