"""Retention: the zero-shot accuracy lost by fine-tuning, the gate that limits the loss, and WiSE-FT to reduce it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.evaluation.significance import paired_gain
from clip_har_jax.files import read_json, write_json
from clip_har_jax.models.adapters import A as LORA_A
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed
from clip_har_jax.trainer.initial_state import initial_params, place_start
from clip_har_jax.trainer.run import Run
from clip_har_jax.trainer.run_data import RetentionData
from clip_har_jax.trainer.validation import Validation, is_right
from clip_har_jax.trainer.zero_shot import ZeroShot


class Retention:
    """Zero-shot accuracy on data other than the training data, with CLIP's towers and cosine, whatever the head."""

    def __init__(self, run: Run, data: RetentionData):
        self.run, self.data, self._bad_inputs = run, data, run.watch(data.source)
        self._zero_shot = ZeroShot(run, data.labels, data.prompts)

    def right(self, params: Params) -> Bool[np.ndarray, " n"]:
        """Return which images are classified correctly with these parameters (all of them, on the mesh)."""
        return self._zero_shot.right(params, self.data.source, self._bad_inputs)

    def top1(self, params: Params) -> float:
        return float(self.right(params).mean())

    def measure_start(self, params: Params | None) -> float:
        """Return the base model's accuracy, which retention.json stores.

        Args:
          params: all parameters before the first step, on the mesh; None: they have been trained since.
        """
        known = distributed.broadcast(read_json(self.run.workdir / "retention.json") if distributed.is_main() else None)
        if known is not None and params is None:  # without steps, the file may be another run's
            return float(known["before"])
        before = self.top1(place_start(self.run) if params is None else params)
        self._write({"before": before})
        return before

    def check(self, before: float, after: float) -> bool:
        """Return whether the loss is within the limit; write retention.json, and warn if it isn't."""
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
    """Return (1 - alpha) * start + alpha * end, parameter by parameter (WiSE-FT, Wortsman et al. 2022, equation 1).

    Of a low-rank update only one factor is scaled, since the product of both is added to the weights.
    """
    return {
        name: np.asarray(value)
        if name.endswith(LORA_A)
        else ((1 - alpha) * np.asarray(start[name]) + alpha * np.asarray(value)).astype(np.float32)
        for name, value in end.items()
    }


@dataclass(frozen=True)
class Point:
    """An interpolation of the initial and the fine-tuned weights, and the examples that it classifies correctly."""

    alpha: float
    target: Bool[np.ndarray, " n"]  # of the validation examples
    retained: Bool[np.ndarray, " m"] | None  # of the retention images; None: no gate

    @property
    def accuracies(self) -> dict[str, float]:
        kept = {} if self.retained is None else {"retained_top1": float(self.retained.mean())}
        return {"target_top1": float(self.target.mean()), **kept}

    @property
    def score(self) -> float:
        return sum(self.accuracies.values())

    def __str__(self) -> str:
        kept = "" if self.retained is None else f", retained {self.retained.mean():.3f}"
        return f"{self.alpha:g}: validation top-1 {self.target.mean():.3f}{kept}"


def choose_point(points: Sequence[Point]) -> tuple[Point, str]:
    """Return the chosen point and the reason in words. The last point is the fine-tuned weights.

    The point with the highest sum of accuracies is chosen only if its gain over the fine-tuned weights is above 0 with
    95% confidence. After a tie, or a gain that can be chance with so few images, the fine-tuned weights stay.
    """
    tuned = points[-1]
    best = max(points, key=lambda point: (point.score, point.alpha))
    if best.score <= tuned.score:
        return tuned, "no other alpha is more accurate"
    pairs = [(tuned.target, best.target)]
    if tuned.retained is not None and best.retained is not None:
        pairs.append((tuned.retained, best.retained))
    gain, low, high = paired_gain(pairs)
    told = f"by {gain:.3f} (95% interval {low:.3f} to {high:.3f})"
    if low > 0:
        return best, f"more accurate than the fine-tuned weights {told}"
    return tuned, f"the fine-tuned weights; alpha {best.alpha:g} is more accurate {told}, which may be chance"


def choose_wise_ft(
    validation: Validation, weights: Params, retention: Retention | None, quiet: bool
) -> tuple[Params, EvalResult]:
    """Return the chosen weights among alpha 1 and those of `config.method.wise_ft`, and their validation result.

    Write wise_ft.json and, with a retention gate, wise_ft.png. Without alphas or steps the weights stay, and the files
    of an earlier setting are removed, so that no report shows them.
    """
    run = validation.run
    if distributed.is_main():
        for name in ("wise_ft.json", "wise_ft.png"):
            (run.workdir / name).unlink(missing_ok=True)
    if not run.config.method.wise_ft or run.program.method.recipe.learns_from != "steps":
        return weights, validation.evaluate(weights)
    start, _ = initial_params(run)
    start = distributed.fetch_to_all({name: start[name] for name in weights})
    end = distributed.fetch_to_all(weights)
    del weights  # one set at a time on the devices
    points = []
    for alpha in sorted({*run.config.method.wise_ft, 1.0}):
        mixed = run.program.place_params(interpolate(start, end, alpha))
        kept = retention.right({**mixed, **validation.frozen}) if retention else None
        points.append(Point(alpha, is_right(validation.evaluate(mixed)), kept))
    chosen, reason = choose_point(points)
    if not quiet:
        print(f"wise-ft alpha {chosen.alpha:g} chosen: {reason}; {', '.join(map(str, points))}")
    if distributed.is_main():
        curve = [{"alpha": point.alpha, **point.accuracies} for point in points]
        write_json(run.workdir / "wise_ft.json", {"curve": curve, "chosen": chosen.alpha, "reason": reason})
        if retention:
            from clip_har_jax.evaluation.retention_plots import draw_wise_ft

            (run.workdir / "wise_ft.png").write_bytes(draw_wise_ft(curve, chosen.alpha))
    mixed = run.program.place_params(interpolate(start, end, chosen.alpha))
    return mixed, validation.evaluate(mixed)
