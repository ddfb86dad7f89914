"""Comparison of methods over seeds: same base model, splits, steps and search; with a table and a plot."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig, refuse_multi_label
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.pipeline import eval_batches
from clip_har_jax.data.sources import Source, make_source
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.method_table import make_table, summarize
from clip_har_jax.files import write_json
from clip_har_jax.folders import output_folder, replace_folder
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.models.factory import make_base
from clip_har_jax.models.pretrained import read_config, read_params, write_params
from clip_har_jax.pipelines.tuning import (
    Space,
    fingerprints,
    finished,
    run_training,
    search,
    setting_name,
    training_needs,
    with_method,
)
from clip_har_jax.specs import parse_spec
from clip_har_jax.trainer.run_data import load_data, load_retention, select_classes
from clip_har_jax.training.probe import ALPHAS, BETAS, PENALTIES
from clip_har_jax.training.recipes import METHODS

SOUP_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "run.json",
)


def compare_methods(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    test: str,
    space: Space,
    soups: bool = False,
) -> list[dict[str, Any]]:
    """Train each method with each seed, except finished runs, and write compare.json, compare.md and compare.png.

    Args:
      config: of every run, except method, seed, learning rate and weight decay.
      output: a folder; finished cells in it aren't run again.
      test: SPEC of the test images, which neither training nor search uses.
      space: the settings to search with the first seed's validation data.
      soups: add a row for the mean of the weights over the seeds, for methods that save the cosine head.

    Raises:
      UserError: an unknown method, no seeds, test images that training or search uses, a mistake in the config, or
        cells of another config in the folder.
    """
    check_comparison(config, methods, seeds)
    check_test(config, test)
    with output_folder(output):
        model = config.model
        clip = make_base(model.name, load_data(config).texts, model.image_size_px, model.temporal).config
        needs = {method: training_needs(with_method(config, method, seeds[0]), clip) for method in methods}
        cells, searched = [], {}
        for i, method in enumerate(methods):
            chosen, searched[method] = search(with_method(config, method, seeds[0]), needs[method], output, space)
            for seed in seeds:
                tuned = with_method(config, method, seed, *chosen)
                cells.append(run_cell(tuned, output, test) | {"step_bytes": needs[method].step_bytes})
                print(f"[{i + 1}/{len(methods)}] {_describe(cells[-1])}", flush=True)
        rows = [summarize(method, [cell for cell in cells if cell["method"] == method]) for method in methods]
        for method in methods if soups else ():
            if METHODS[method].learns_from == "steps" and METHODS[method].heads[0] == "cosine" and method != "prompt":
                soup = cook_soup(config, [cell for cell in cells if cell["method"] == method], output, test)
                rows.append(summarize(method, [soup]) | {"method": f"{method}, soup"})
        facts = {"test": test, "space": dataclasses.asdict(space), "rows": rows, "cells": cells, "search": searched}
        write_json(output / "compare.json", facts)
        (output / "compare.md").write_text(make_table(rows, describe_search(config, methods, len(seeds), space)))
        if all(row["retained"] for row in rows):
            from clip_har_jax.evaluation.retention_plots import draw_comparison

            (output / "compare.png").write_bytes(draw_comparison(rows))
        return rows


def check_comparison(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> None:
    refuse_multi_label(config, "compare.py")
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods: {method!r} is unknown; {nearest(method, list(METHODS))}")
    if not methods or len(set(methods)) < len(methods) or not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--methods and --seeds: one or more of each are needed, none of them twice")
    if config.method.head or config.method.loss:
        raise UserError("config.method.head and method.loss: leave them empty, each method brings its own")


def default_test(config: RunConfig) -> str:
    """Return the SPEC of the test split of the validation data, or of the training data if that is split."""
    spec = parse_spec(config.data.val or config.data.train)
    options = {name: value for name, value in spec.options.items() if name != "split"}
    return str(dataclasses.replace(spec, options=options))


def check_test(config: RunConfig, test: str) -> None:
    """Check that the test data is neither the training nor the validation data, which choose the model."""
    fingerprint = make_source(test, "test").fingerprint
    for key, spec, split in (("train", config.data.train, "train"), ("val", config.data.val, "val")):
        if spec and make_source(spec, split).fingerprint == fingerprint:
            raise UserError(f"--test={test}: the same images as config.data.{key}, which choose the model; name others")


def run_cell(config: RunConfig, output: Path, test: str) -> dict[str, Any]:
    """Return the result of one run and its evaluation; read if it is finished, otherwise computed."""
    folder = _folder(config, output)
    done = folder / "cell.json"
    data = fingerprints(config, test)
    if known := finished(done, config, data, test=test):
        return known
    result = run_training(config, folder / "run")
    metrics = evaluate_on(config, folder / "run/model", test)
    record = json.loads((folder / "run" / "run.json").read_text())
    retention = folder / "run" / "retention.json"
    makes_steps = METHODS[config.method.name].learns_from == "steps"
    settings = {"learning_rate": config.optim.learning_rate, "weight_decay": config.optim.weight_decay}
    cell = {
        "method": config.method.name,
        "seed": config.seed,
        "settings": settings if makes_steps else {},
        "fit": {name: value for name, value in record["fit"].items() if not name.startswith("val_")},
        "test": test,
        "config_hash": config.digest,
        "data": data,
        "val_top1": result.metrics["top1"],
        "top1": metrics["top1"],
        "ece": metrics["ece"],
        "retained": json.loads(retention.read_text())["after"] if retention.is_file() else None,
        "trainable_parameters": record["trainable_parameters"],
        "optimizer_bytes": record["optimizer_bytes_per_device"],
        "seconds": result.seconds,
    }
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # the model is kept
    write_json(done, cell)
    return cell


def _folder(config: RunConfig, output: Path) -> Path:
    return output / "cells" / config.method.name / f"seed_{config.seed}" / setting_name(config)


def cook_soup(config: RunConfig, cells: Sequence[dict[str, Any]], output: Path, test: str) -> dict[str, Any]:
    """Make a uniform soup: the mean of the weights over the seeds (Wortsman et al. 2022, Model soups).

    Returns:
      A cell of the comparison; the soup itself is a model folder, OUTPUT/soups/METHOD.
    """
    method, settings = cells[0]["method"], cells[0]["settings"]
    runs = [with_method(config, method, cell["seed"], *settings.values()) for cell in cells]
    folders = [_folder(run, output) / "run/model" for run in runs]
    clip = read_config(folders[0])
    each = [read_params(folder, clip) for folder in folders]
    mean = {name: np.mean([params[name] for params in each], axis=0, dtype=np.float32) for name in each[0]}

    def fill(folder: Path) -> None:
        for name in SOUP_FILES:
            shutil.copyfile(folders[0] / name, folder / name)
        write_params(folder, clip, mean)
        actions = bundle.read_actions(folders[0])  # its temperature and thresholds are from one run
        bundle.write_actions(folder, bundle.Actions(actions.labels, actions.prompts))
        bundle.seal(folder)

    soup = replace_folder(output / "soups" / method, fill)
    metrics, retention = evaluate_on(config, soup, test), load_retention(config)
    retained = None
    if retention is not None:
        backend = JaxBackend(soup, retention.labels, batch_size=config.eval.batch_size)
        retained = _evaluate(config, backend, retention.source)["top1"]
    seconds = sum(cell["seconds"] for cell in cells)
    return {**cells[0], "top1": metrics["top1"], "ece": metrics["ece"], "retained": retained, "seconds": seconds}


def cell_model(config: RunConfig, row: dict[str, Any], seed: int, output: Path) -> Path:
    """Return the model folder of a method and seed of a comparison, whose row tells the chosen settings."""
    settings = row["settings"] or {}
    tuned = with_method(config, row["method"], seed, settings.get("learning_rate"), settings.get("weight_decay"))
    return _folder(tuned, output) / "run/model"


def evaluate_on(config: RunConfig, model: Path, test: str, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the metrics of a model folder on the test data; `classes`: to tell apart others than the folder's own."""
    backend = JaxBackend(model, classes, batch_size=config.eval.batch_size)
    source = make_source(test, "test")
    source = select_classes(source, backend.labels, "data.classes") if source.labels != backend.labels else source
    return _evaluate(config, backend, source)


def _evaluate(config: RunConfig, backend: JaxBackend, source: Source) -> dict[str, Any]:
    batch_size, bad_inputs = config.eval.batch_size, BadInputs(source, config.data.max_bad_fraction)
    with eval_batches(source, config.data, backend.preprocess, batch_size=batch_size, bad_inputs=bad_inputs) as batches:
        return evaluate(lambda batch: backend.logits(batch.image), batches, backend.labels).metrics


def describe_search(config: RunConfig, methods: Sequence[str], num_seeds: int, space: Space) -> str:
    """Return the note below the table."""

    def say(values: Sequence[float]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    rates, decays = (say([float(f"{value:.2g}") for value in space.rates(config)]), say(space.all_decays(config)))
    lines = [
        f"Means over {num_seeds} seeds with 95% intervals (Student's t). Every method that makes steps tries the same: "
        f"learning rates {rates} with weight decay {config.optim.weight_decay:g}, then weight decays {decays} at the "
        "best rate where the method trains matrices; chosen by the first seed's validation accuracy, of equal ones by "
        "the likelihood."
    ]
    if {"linear_probe", "lp_ft"} & set(methods):
        lines.append(f"A probe's L2 penalty is one of {say(PENALTIES)}, each seed's own choice by validation.")
    if "tip_adapter" in methods:
        lines.append(f"So are Tip-Adapter's alpha ({say(ALPHAS)}) and beta ({say(BETAS)}).")
    lines.append(
        f"Step memory is of each device, of {config.train.global_batch_size} images, as XLA says; where features are "
        "computed once, of embedding as many."
    )
    return " ".join(lines)


def _describe(cell: dict[str, Any]) -> str:
    kept = "" if cell["retained"] is None else f", retained {cell['retained']:.3f}"
    return f"{cell['method']} seed {cell['seed']}: top-1 {cell['top1']:.3f}{kept}, {cell['seconds']:.0f} s"
