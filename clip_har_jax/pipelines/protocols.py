"""Protocols for few labelled examples: K examples of each class, and base against novel classes.

few_shot (Radford et al. 2021, section 3.1.4): each method learns from K examples of each class, for several K. Each
seed draws its own examples, so intervals over seeds include the choice of examples.

base_to_novel (Zhou et al. 2022, CoCoOp): each method learns from K examples of the first half of the classes, in their
order, and is evaluated on both halves separately; H is the harmonic mean of the two. Methods with a head for their
training classes only have no result for novel classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_har_jax.config import RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.method_table import interval, markdown_table, percent
from clip_har_jax.files import write_json
from clip_har_jax.folders import output_folder
from clip_har_jax.inference.backends import choose_actions
from clip_har_jax.pipelines.method_comparison import cell_model, check_comparison, compare_methods, evaluate_on
from clip_har_jax.pipelines.tuning import Space
from clip_har_jax.trainer.run_data import load_data

SHOTS = (2, 4, 8, 16)


def with_data(config: RunConfig, **changes: Any) -> RunConfig:
    """Return a config with other values in its data section."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def few_shot(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    test: str,
    space: Space,
    shots: Sequence[int] = SHOTS,
) -> dict[str, dict[str, Any]]:
    """Compare methods for several numbers of examples, and write few_shot.json and few_shot.md.

    Args:
      config, methods, seeds, test, space: as for `compare_methods`.
      output: a folder, with a comparison in shots_K/ for each K.
      shots: examples of each class.

    Raises:
      UserError: as `compare_methods`; no shots, or a repeated number.
    """
    check_comparison(config, methods, seeds)
    if not shots or len(set(shots)) < len(shots) or min(shots) < 1:
        raise UserError(f"--shots={','.join(map(str, shots))}: numbers from 1 are needed, none of them twice")
    table: dict[str, dict[str, Any]] = {method: {} for method in methods}
    with output_folder(output):
        for count in shots:
            print(f"{count} examples of each class", flush=True)
            rows = compare_methods(
                with_data(config, shots=count), methods, seeds, output / f"shots_{count}", test, space
            )
            for row in rows:
                table[row["method"]][str(count)] = row["target"]
        write_json(output / "few_shot.json", {"test": test, "seeds": list(seeds), "top1": table})
        header = ["method", *(f"{count} shots" for count in shots)]
        body = [[f"`{method}`", *(percent(table[method][str(count)]) for count in shots)] for method in methods]
        note = f"Top-1 in %, means over {len(seeds)} seeds with 95% intervals (Student's t); a seed draws its examples."
        (output / "few_shot.md").write_text(markdown_table(header, body, note))
    return table


def base_to_novel(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    test: str,
    space: Space,
    shots: int = SHOTS[-1],
) -> dict[str, dict[str, Any]]:
    """Train on the first half of the classes, evaluate on both, and write base_to_novel.json and base_to_novel.md.

    Args:
      config, methods, seeds, test, space: as for `compare_methods`.
      output: a folder, with the comparison on the base classes in base/.
      shots: examples of each base class.

    Raises:
      UserError: as `compare_methods`; fewer than four classes.
    """
    check_comparison(config, methods, seeds)
    labels = load_data(config).labels
    if len(labels) < 4:
        raise UserError(f"base_to_novel needs four classes or more; the data has {len(labels)}")
    half = -(-len(labels) // 2)
    base, novel = labels[:half], labels[half:]
    config = with_data(config, classes=tuple(base), shots=shots)
    table: dict[str, dict[str, Any]] = {}
    with output_folder(output):
        rows = compare_methods(config, methods, seeds, output / "base", test, space)
        for row in rows:
            models = [cell_model(config, row, seed, output / "base") for seed in seeds]
            scores = [_novel_top1(config, model, novel, test) for model in models]
            of_novel = [score for score in scores if score is not None]
            found = interval(of_novel) if len(of_novel) == len(seeds) else None
            pair = (row["target"][0], found[0]) if found is not None else None
            harmonic = None if pair is None else 2 * pair[0] * pair[1] / max(sum(pair), 1e-12)
            table[row["method"]] = {"base": row["target"], "novel": found, "harmonic": harmonic}
        facts = {"test": test, "seeds": list(seeds), "shots": shots, "base": base, "novel": novel, "top1": table}
        write_json(output / "base_to_novel.json", facts)
        body = [
            [f"`{method}`", percent(one["base"]), percent(one["novel"]), percent((one["harmonic"], None))]
            for method, one in table.items()
        ]
        note = (
            f"Top-1 in % of the {len(base)} base and {len(novel)} novel classes, each alone; {shots} examples of each "
            f"base class, means over {len(seeds)} seeds with 95% intervals (Student's t). H: the harmonic mean. -: the "
            "head knows only the classes that it was trained on."
        )
        (output / "base_to_novel.md").write_text(markdown_table(["method", "base", "novel", "H"], body, note))
    return table


def _novel_top1(config: RunConfig, model: Path, novel: Sequence[str], test: str) -> float | None:
    """Return the accuracy on novel classes; None: the head knows only its training classes."""
    try:
        choose_actions(model, novel)
    except UserError:
        return None
    return float(evaluate_on(config, model, test, novel)["top1"])
