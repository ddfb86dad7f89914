"""The history of a model's training run, from its work folder: curves, time, settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_har_jax.config import RunConfig


@dataclass(frozen=True)
class History:
    """The records of a run; missing ones are empty.

    Attributes:
      rows: of metrics.jsonl.
      record: run.json.
      changed: settings that differ from the defaults: key -> (default, value).
      retention: retention.json.
      wise_ft: wise_ft.json.
    """

    rows: tuple[dict[str, Any], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)
    wise_ft: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric, without missing values."""
        points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in points], [float(value) for _, value in points]


def read_history(model: str | Path) -> History:
    """Return the history of a model folder, from itself and, if it belongs to the same run, the folder around it."""
    folder = Path(model)
    record, workdir = _read(folder / "run.json"), folder.parent
    if not record or _read(workdir / "run.json").get("run_id") != record.get("run_id"):
        return History(record=record)
    config = _read(workdir / "config.json")
    changed = _differences(RunConfig().to_dict(), config) if config else {}
    return History(
        _read_rows(workdir / "metrics.jsonl"),
        _read(workdir / "run.json"),
        changed,
        _read(workdir / "retention.json"),
        _read(workdir / "wise_ft.json"),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the report is about the model; parts of its history may be missing
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> tuple[dict[str, Any], ...]:
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return tuple(rows)


def _differences(default: Any, value: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(default, Mapping) and isinstance(value, Mapping) and default:
        found: dict[str, tuple[Any, Any]] = {}
        for name in value:
            found |= _differences(default.get(name), value[name], f"{key}.{name}" if key else name)
        return found
    plain = list(default) if isinstance(default, tuple) else default
    return {} if plain == value else {key: (plain, value)}
