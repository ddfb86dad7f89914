"""Top-1 accuracy compared with chance, the majority class and the base model's zero-shot accuracy."""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from clip_har_jax.evaluation.metrics import ClassificationState

TOO_WIDE = 0.2  # a wider 95% interval says little


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927), valid for few examples and for shares of 0 or 1 too.

    `scipy.stats` has it too, but takes about a second to import.
    """
    share, z2 = correct / total, NormalDist().inv_cdf(0.975) ** 2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half_width = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total) / (1 + z2 / total)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def baselines_of(state: ClassificationState) -> dict[str, float]:
    """Return the accuracy of guessing (`chance`) and of always predicting the most frequent class (`majority`)."""
    support = state.confusion.sum(axis=1)
    return {"chance": 1 / len(support), "majority": float(support.max() / support.sum())}


def zero_shot_on(record: Mapping[str, Any], data: str) -> float | None:
    """Return the base model's zero-shot accuracy from run.json, if it was measured on this data; else None."""
    known = record.get("baselines", {})
    return known.get("zero_shot") if known.get("data") == data else None


def verdict(metrics: Mapping[str, Any], zero_shot: float | None = None) -> str:
    """Return a sentence or two that compare top-1 with the baselines; of multi-label data, mAP with chance.

    Args:
      metrics: the contents of metrics.json, with `top1`, `top1_interval`, `baselines` and `num_examples`; or with `map`
        and `map_interval`.
      zero_shot: the base model's accuracy on the same images; None: not known.
    """
    if "map" in metrics:
        return _multi_label_verdict(metrics)
    top1, (low, high) = metrics["top1"], metrics["top1_interval"]
    named = {"guessing": metrics["baselines"]["chance"], "the most frequent class": metrics["baselines"]["majority"]}
    if zero_shot is not None:
        named["the start without training"] = zero_shot
    said = f"Top-1 is {top1:.3f}, with a 95% interval of {low:.3f} to {high:.3f} over {metrics['num_examples']} images."
    worst = {name: value for name, value in named.items() if value >= low}
    if not worst:
        told = f"It is better than {_listed(named)}."
    elif all(value > high for value in worst.values()):
        told = f"It is worse than {_listed(worst)}."
    else:
        told = f"It isn't shown to be better than {_listed(worst)}."
    if high - low > TOO_WIDE:
        told += " There are too few images to tell small differences."
    return f"{said} {told}"


def _multi_label_verdict(metrics: Mapping[str, Any]) -> str:
    (low, high), chance = metrics["map_interval"], metrics["baselines"]["chance"]
    told = "It is better than" if low > chance else "It isn't shown to be better than"
    return (
        f"mAP is {metrics['map']:.3f}, with a 95% interval of {low:.3f} to {high:.3f} over {metrics['num_examples']} "
        f"images. {told} a ranking by chance ({chance:.3f})."
    )


def _listed(named: Mapping[str, float]) -> str:
    parts = [f"{name} ({value:.3f})" for name, value in named.items()]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
