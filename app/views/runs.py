"""Runs: the work folders of training runs."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app.client import Trouble

ROOT = Path(__file__).resolve().parents[2]
COLORS = ("#3b82d6", "#d97706")
CURVES = (
    ("Loss", {"train/loss": "training", "val/nll": "validation"}, "loss"),
    ("Share of right answers", {"train/top1": "training", "val/top1": "validation"}, "share"),
    ("Pictures a second", {"train/images_per_s": "training"}, "pictures"),
)


def find_runs(folder: Path) -> list[Path]:
    """Return the work folders in a folder, the newest first."""
    found = [path.parent for path in folder.glob("*/metrics.jsonl")]
    return sorted(found, key=lambda path: -(path / "metrics.jsonl").stat().st_mtime)


def read_metrics(path: Path) -> pd.DataFrame:
    """Read metrics.jsonl, one row per step; skip unreadable lines, such as a partial last one."""
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            continue
    return pd.DataFrame(sorted(rows.values(), key=lambda row: row["step"]))


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object; empty if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def as_date(moment: object) -> str:
    """Return a time of a record for display, in UTC; unchanged if it isn't a time."""
    try:
        read = datetime.fromisoformat(str(moment))
    except ValueError:
        return str(moment or "at an unknown time")
    read = read.astimezone(UTC) if read.tzinfo else read
    return f"on {read.day} {read:%B %Y at %H:%M} UTC"


def show_curves(metrics: pd.DataFrame) -> None:
    """Show each curve and its last value."""
    for column, (title, names, unit) in zip(st.columns(len(CURVES)), CURVES, strict=True):
        known = [name for name in names if name in metrics]
        if not known:
            continue
        with column:
            st.subheader(title)
            figure = go.Figure()
            for name, color in zip(known, COLORS, strict=False):
                points = metrics[["step", name]].dropna()
                figure.add_scatter(x=points["step"], y=points[name], name=names[name], mode="lines", line_color=color)
            legend = {"orientation": "h", "y": 1.15}
            figure.update_layout(height=280, margin={"l": 0, "r": 0, "t": 10, "b": 40}, legend=legend)
            figure.update_xaxes(title="step")
            figure.update_yaxes(title=unit, rangemode="tozero")
            last = ", ".join(f"{names[name]} {metrics[name].dropna().iloc[-1]:.3g}" for name in known)
            told = f"{title} over the steps; at the end: {last}"
            st.plotly_chart(figure, config={"displayModeBar": False}, alt=told)
            st.caption(f"At the end: {last}")


st.title("Training runs")
folder = Path(os.environ.get("APP_RUNS_DIR") or ROOT / "runs")
runs = find_runs(folder)
if not runs:
    raise Trouble(
        f"There are no runs in {folder}. Train one with `python scripts/train.py --config=configs/demo.py "
        "--workdir=runs/demo`, or say where they are with APP_RUNS_DIR."
    )
run = folder / st.selectbox("Run", [path.name for path in runs])
record = read_json(run / "run.json")
steps = f"step {record.get('last_step', '?')} of {record.get('num_steps', '?')}"
st.caption(f"Started {as_date(record.get('started'))} · {steps}")
curves, report, settings = st.tabs(["Curves", "Report", "Settings"])
with curves:
    show_curves(read_metrics(run / "metrics.jsonl"))
with report:
    pages = sorted(run.glob("**/report.html"), key=lambda path: -path.stat().st_mtime)
    if pages:
        which = st.selectbox("Report", [str(path.relative_to(run)) for path in pages])
        text = (run / which).read_text(encoding="utf-8")
        st.download_button("Download the report", text, "report.html", "text/html", icon=":material/download:")
        st.iframe(text, height=900, alt=f"The report {which}")
    else:
        command = f"python scripts/evaluate.py --model={run}/model --data=SPEC --output={run}/test"
        st.info(f"No report yet. Write one with `{command}`.")
with settings:
    st.json(read_json(run / "config.json"), expanded=2)
    st.json(record, expanded=False)
