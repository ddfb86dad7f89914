"""Methods x seeds on equal terms: the same start, splits, steps and search; a table and a plot of what each costs."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig
from clip_har_jax.data.pipeline import BadInputs, eval_batches
from clip_har_jax.data.sources import Source, make_source
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.inference.backends import JaxBackend
from clip_har_jax.models.pretrained import read_config, read_params, write_params
from clip_har_jax.pipelines.inputs import load_retention, select_classes
from clip_har_jax.pipelines.train import train
from clip_har_jax.training.methods import METHODS

# What a method's learning rate is of the config's, before the search: fewer parameters take larger steps.
RATE_OF = {"lora": 10.0, "bitfit": 10.0, "adapter": 100.0, "prompt": 100.0}
SEARCH = (0.3, 1.0, 3.0)  # what that rate is multiplied by, the same for all; chosen on the first seed's validation
SOUP_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "run.json",
)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 1, 2, ... degrees of freedom


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    test: str,
    search: Sequence[float],
    soups: bool = False,
) -> list[dict[str, Any]]:
    """Trains each method with each seed, or what of it is missing, and writes compare.json, compare.md, compare.png.

    Args:
      config: of every run, but for method, seed and learning rate.
      output: a folder; a finished cell in it is not run again.
      test: SPEC of the images that decide, which neither training nor the search sees.
      search: factors of the learning rate to choose from.
      soups: add a row for the mean of the weights of each method's seeds, where the cosine head is saved.

    Raises:
      UserError: an unknown method, no seeds, a mistake in the config, or cells of another config in the folder.
    """
    check_comparison(config, methods, seeds)
    cells = []
    for i, method in enumerate(methods):
        rate = _choose_rate(config, method, seeds[0], output, test, search)
        for seed in seeds:
            cells.append(run_cell(config, method, seed, rate, output, test))
            print(f"[{i + 1}/{len(methods)}] {_describe(cells[-1])}", flush=True)
    rows = [summarize(method, [cell for cell in cells if cell["method"] == method]) for method in methods]
    for method in methods if soups else ():
        if METHODS[method].learns_from == "steps" and METHODS[method].heads[0] == "cosine" and method != "prompt":
            soup = cook_soup(config, [cell for cell in cells if cell["method"] == method], output, test)
            rows.append(summarize(method, [soup]) | {"method": f"{method}, soup"})
    bundle.write_json(output / "compare.json", {"test": test, "search": list(search), "rows": rows, "cells": cells})
    (output / "compare.md").write_text(make_table(rows, search, len(seeds)))
    if all(row["retained"] for row in rows):
        from clip_har_jax.evaluation.tradeoffs import draw_comparison

        (output / "compare.png").write_bytes(draw_comparison(rows))
    return rows


def check_comparison(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> None:
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods: {method!r} is unknown; {nearest(method, list(METHODS))}")
    if not methods or len(set(methods)) < len(methods) or not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--methods and --seeds: one or more of each are needed, none of them twice")
    if config.method.head or config.method.loss:
        raise UserError("config.method.head and method.loss: leave them empty, each method brings its own")


def _rate_of(config: RunConfig, method: str) -> float:
    return config.optim.learning_rate * RATE_OF.get(method, 1.0)


def _choose_rate(config: RunConfig, method: str, seed: int, output: Path, test: str, search: Sequence[float]) -> float:
    """The learning rate of the best validation accuracy with the first seed; nothing to choose where no steps are."""
    rates = [_rate_of(config, method) * factor for factor in search]
    if METHODS[method].learns_from != "steps":
        return _rate_of(config, method)
    if len(rates) == 1:
        return rates[0]
    tried = [run_cell(config, method, seed, rate, output, test) for rate in rates]
    return float(max(tried, key=lambda cell: cell["val_top1"])["learning_rate"])


def run_cell(config: RunConfig, method: str, seed: int, rate: float, output: Path, test: str) -> dict[str, Any]:
    """One run and its evaluation: read if it is finished, else continued, or begun."""
    config = dataclasses.replace(
        config,
        seed=seed,
        method=dataclasses.replace(config.method, name=method),
        optim=dataclasses.replace(config.optim, learning_rate=rate),
    )
    folder = _folder(output, method, seed, rate)
    done = folder / "cell.json"
    if done.is_file():
        cell = json.loads(done.read_text())
        if cell["config_hash"] != config.digest or cell["test"] != test:
            raise UserError(f"{done} is of another config or test data; use another --output")
        return cell
    result = train(config, folder / "run", quiet=True)
    if result.exit_code >= 128:
        raise SystemExit(result.exit_code)  # stopped by a signal; the same command continues
    if result.model is None:
        raise UserError(f"{folder}: no model; set config.retention.fail=false in a comparison")
    metrics = measure(config, Path(result.model), test)
    record = json.loads((folder / "run" / "run.json").read_text())
    retention = folder / "run" / "retention.json"
    cell = {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "test": test,
        "config_hash": config.digest,
        "val_top1": result.metrics["top1"],
        "top1": metrics["top1"],
        "ece": metrics["ece"],
        "retained": json.loads(retention.read_text())["after"] if retention.is_file() else None,
        "trainable_parameters": record["trainable_parameters"],
        "optimizer_bytes": record["optimizer_bytes_per_device"],
        "seconds": result.seconds,
    }
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # the model is kept
    bundle.write_json(done, cell)
    return cell


def _folder(output: Path, method: str, seed: int, rate: float) -> Path:
    return output / "cells" / method / f"seed_{seed}" / f"rate_{rate:.3g}"


def cook_soup(config: RunConfig, cells: Sequence[dict[str, Any]], output: Path, test: str) -> dict[str, Any]:
    """The mean of the weights of runs that differ in their seeds (Wortsman et al. 2022, Model soups: the uniform one).

    Returns:
      As a cell; the soup itself is a model folder, OUTPUT/soups/METHOD.
    """
    folders = [_folder(output, cell["method"], cell["seed"], cell["learning_rate"]) / "run/model" for cell in cells]
    clip = read_config(folders[0])
    each = [read_params(folder, clip) for folder in folders]
    mean = {name: np.mean([params[name] for params in each], axis=0, dtype=np.float32) for name in each[0]}

    def fill(folder: Path) -> None:
        for name in SOUP_FILES:
            shutil.copyfile(folders[0] / name, folder / name)
        write_params(folder, clip, mean)
        actions = bundle.read_actions(folders[0])  # its temperature and thresholds are those of one run
        bundle.write_actions(folder, bundle.Actions(actions.labels, actions.prompts))
        bundle.seal(folder)

    soup = bundle.replace_folder(output / "soups" / cells[0]["method"], fill)
    metrics, retention = measure(config, soup, test), load_retention(config)
    retained = None
    if retention is not None:
        backend = JaxBackend(soup, retention.labels, batch_size=config.eval.batch_size)
        retained = _evaluate(config, backend, retention.source)["top1"]
    seconds = sum(cell["seconds"] for cell in cells)
    return {**cells[0], "top1": metrics["top1"], "ece": metrics["ece"], "retained": retained, "seconds": seconds}


def measure(config: RunConfig, model: Path, test: str) -> dict[str, Any]:
    """The metrics of a model folder on the test data."""
    backend = JaxBackend(model, batch_size=config.eval.batch_size)
    source = make_source(test, "test")
    source = select_classes(source, backend.labels, "data.classes") if source.labels != backend.labels else source
    return _evaluate(config, backend, source)


def _evaluate(config: RunConfig, backend: JaxBackend, source: Source) -> dict[str, Any]:
    batch_size, bad_inputs = config.eval.batch_size, BadInputs(source, config.data.max_bad_fraction)
    with eval_batches(source, config.data, backend.preprocess, batch_size=batch_size, bad_inputs=bad_inputs) as batches:
        return evaluate(lambda batch: backend.logits(batch.image), batches, backend.labels).metrics


def summarize(method: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table; means with the half-width of their 95% interval (Student's t over seeds)."""

    def interval(key: str) -> tuple[float, float] | None:
        values = [cell[key] for cell in cells]
        if any(value is None for value in values):
            return None
        if len(values) == 1:
            return float(values[0]), 0.0
        t = T_975[len(values) - 2] if len(values) - 2 < len(T_975) else 1.96
        return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(len(values)))

    return {
        "method": method,
        "learning_rate": cells[0]["learning_rate"] if METHODS[method].learns_from == "steps" else None,
        "target": interval("top1"),
        "retained": interval("retained"),
        "ece": interval("ece"),
        "trainable_parameters": cells[0]["trainable_parameters"],
        "optimizer_bytes": cells[0]["optimizer_bytes"],
        "seconds": float(np.mean([cell["seconds"] for cell in cells])),
    }


def make_table(rows: Sequence[dict[str, Any]], search: Sequence[float], num_seeds: int) -> str:
    """The table in Markdown."""

    def percent(pair: tuple[float, float] | None) -> str:
        return "-" if pair is None else f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"

    lines = [
        "| method | top-1, % | zero-shot retained, % | ECE, % | trainable | optimiser, KiB | time, s | learning rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:.2g}"
        lines.append(
            f"| `{row['method']}` | {percent(row['target'])} | {percent(row['retained'])} | {percent(row['ece'])} | "
            f"{row['trainable_parameters']:,} | {row['optimizer_bytes'] / 1024:.0f} | {row['seconds']:.0f} | {rate} |"
        )
    factors = ", ".join(f"{factor:g}" for factor in search)
    note = (
        f"Means over {num_seeds} seeds with 95% intervals (Student's t). Search, the same for every method that makes "
        f"steps: the method's rate times {factors}, by validation accuracy of the first seed; nothing else was tried."
    )
    return "\n".join([*lines, "", note, ""])


def _describe(cell: dict[str, Any]) -> str:
    kept = "" if cell["retained"] is None else f", retained {cell['retained']:.3f}"
    return f"{cell['method']} seed {cell['seed']}: top-1 {cell['top1']:.3f}{kept}, {cell['seconds']:.0f} s"
