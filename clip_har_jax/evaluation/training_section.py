"""The sections of a report on the model's training, from the history of its run."""

from collections.abc import Mapping
from typing import Any

from clip_har_jax.evaluation import charts
from clip_har_jax.evaluation.history import History

CURVES = (
    ("Loss", "loss, nats", {"training": "train/loss", "validation": "val/nll"}, True),
    ("Accuracy", "top-1", {"training": "train/top1", "validation": "val/top1"}, False),
    ("Mean average precision", "mAP", {"validation": "val/map"}, False),
    ("Learning rate", "rate", {"learning rate": "train/learning_rate"}, False),
    ("Throughput", "images a second", {"images a second": "train/images_per_s"}, False),
)
SHORTEST_S = 0.05  # shorter parts of the time aren't drawn


def draw_training(history: History) -> list[dict[str, Any]]:
    """Return the charts of the run, each with its title."""
    found = []
    for title, y, series, log_y in CURVES:
        lines = {name: history.series(key) for name, key in series.items()}
        lines = {name: points for name, points in lines.items() if len(points[0]) > 1}
        if lines:
            ends = ", ".join(f"{name} ends at {points[1][-1]:.3g}" for name, points in lines.items())
            drawn = charts.draw_lines(lines, "step", y, f"{title} over {y}: {ends}", log_y)
            found.append({"title": title, "chart": drawn})
    seconds = {name: value for name, value in history.record.get("goodput", {}).items() if value >= SHORTEST_S}
    if seconds:
        share = seconds.get("productive", 0.0) / sum(seconds.values())
        title = f"Where the time went: {share:.0%} moved the model forward"
        named = {name.replace("_", " "): value for name, value in seconds.items()}
        drawn = charts.draw_bars(named, "seconds, over all starts", title, " s")
        found.append({"title": title, "chart": drawn})
    return found


def draw_tradeoffs(history: History) -> list[dict[str, Any]]:
    """Return charts of the lost zero-shot accuracy and of WiSE-FT, if they were measured."""
    found, kept, curve = [], history.retention, history.wise_ft
    if {"before", "after"} <= set(kept):
        title = "What was kept of the start"
        told = (
            f"Zero-shot accuracy on {kept.get('data')}, which wasn't trained for: {kept['before']:.3f} before, "
            f"{kept['after']:.3f} after."
        )
        bars = {"before": kept["before"], "after": kept["after"]}
        found.append({"title": title, "explained": told, "chart": charts.draw_bars(bars, "zero-shot top-1", told)})
    if points := curve.get("curve"):
        alphas = [point["alpha"] for point in points]
        named = {"on the target": "target_top1", "zero-shot, retained": "retained_top1"}
        lines = {name: (alphas, [point[key] for point in points]) for name, key in named.items() if key in points[0]}
        told = f"0 is the start, 1 the fine-tuned weights (WiSE-FT); {curve.get('chosen')} was taken."
        drawn = charts.draw_lines(lines, "share of the fine-tuned weights", "top-1", told, markers=True)
        found.append({"title": "Between the start and fine-tuning", "explained": told, "chart": drawn})
    return found


def describe_run(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of run.json on the training, by name."""
    if not record:
        return {}
    data = record.get("data", {})
    told = {
        "trained by": " ".join(["python", *record.get("command", [])]),
        "run": f"{record.get('run_id')}, started {record.get('started')}",
        "code": f"{record.get('git_sha')}{' with uncommitted changes' if record.get('git_dirty') else ''}",
        "config checksum": record.get("config_hash"),
        "machine": f"{record.get('num_devices')} x {record.get('device')}, {record.get('num_processes')} process(es)",
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        "environment checksum": record.get("lock_hash"),
        **{
            f"{name} split": "{spec}: {num_examples} images, checksum {fingerprint}".format(**part)
            for name, part in data.items()
        },
    }
    return {name: str(value) for name, value in told.items() if value}
