"""The hyperparameter search of a method comparison: the same few settings for all, chosen on validation data only."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_har_jax.config import RetentionConfig, RunConfig
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.planning.cost import PlannedStep, Variant, find_machine, make_program, step_memory
from clip_har_jax.trainer.result import Result
from clip_har_jax.trainer.run_data import load_data
from clip_har_jax.trainer.train import train
from clip_har_jax.training.optim import is_decayed
from clip_har_jax.training.recipes import METHODS


@dataclasses.dataclass(frozen=True)
class Space:
    """The settings tried for every method that trains in steps: learning rates, then weight decays at the best rate."""

    factors: tuple[float, ...]  # of config.optim.learning_rate
    decays: tuple[float, ...]  # tried besides config.optim.weight_decay

    def rates(self, config: RunConfig) -> list[float]:
        return sorted(config.optim.learning_rate * factor for factor in self.factors)

    def all_decays(self, config: RunConfig) -> list[float]:
        """Return the weight decays; the learning rates are tried with the first one, the config's own."""
        return list(dict.fromkeys([config.optim.weight_decay, *self.decays]))


@dataclasses.dataclass(frozen=True)
class Needs:
    """The properties of a method's training that don't depend on seed and settings."""

    step_bytes: int | None  # memory of one step on each device, from XLA; None: the method trains nothing
    has_decay: bool  # whether weight decay applies to some trainable parameter


def with_method(
    config: RunConfig, method: str, seed: int, rate: float | None = None, decay: float | None = None
) -> RunConfig:
    """Return the config of a run; None keeps the learning rate or weight decay of the config."""
    optim = config.optim
    rate, decay = optim.learning_rate if rate is None else rate, optim.weight_decay if decay is None else decay
    return dataclasses.replace(
        config,
        seed=seed,
        method=dataclasses.replace(config.method, name=method),
        optim=dataclasses.replace(optim, learning_rate=rate, weight_decay=decay),
    )


def training_needs(config: RunConfig, clip: TwoTowerConfig) -> Needs:
    """Compile the training step of a method for a model of these sizes, and return its needs.

    Raises:
      UserError: a mistake in the config or the data.
    """
    data = load_data(config)
    planned_step, settings = PlannedStep(config, clip, len(data.labels), len(data.texts)), config.train
    variant = Variant(config.mesh, settings.accumulation_steps, config.model.remat)
    program = make_program(planned_step, find_machine("local"), variant)
    memory = step_memory(program, len(data.texts))
    return Needs(memory.total_bytes if memory else None, any(is_decayed(name) for name in program.trainable))


def search(
    config: RunConfig, needs: Needs, output: Path, space: Space
) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    """Return the best (learning rate, weight decay) on validation data, and the results of all settings."""
    own = (config.optim.learning_rate, config.optim.weight_decay)
    rates, decays = space.rates(config), space.all_decays(config)
    if METHODS[config.method.name].learns_from != "steps":
        return own, []
    if not needs.has_decay:
        decays = decays[:1]
    if len(rates) == len(decays) == 1:
        return (rates[0], decays[0]), []
    tried = [try_setting(config, rate, decays[0], output) for rate in rates]
    best = max(tried, key=_score)
    tried += [try_setting(config, best["learning_rate"], decay, output) for decay in decays[1:]]
    best = max(tried, key=_score)
    return (best["learning_rate"], best["weight_decay"]), tried


def _score(tried: dict[str, Any]) -> tuple[float, float]:
    """Return the sort key of a setting: validation accuracy, then likelihood."""
    return tried["val_top1"], -tried["val_nll"]


def try_setting(config: RunConfig, rate: float, decay: float, output: Path) -> dict[str, Any]:
    """Return the validation scores of one setting; neither test data nor retention take part in the search."""
    config = with_method(config, config.method.name, config.seed, rate, decay)
    config = dataclasses.replace(config, retention=RetentionConfig())
    folder = output / "search" / config.method.name / setting_name(config)
    done = folder / "tried.json"
    data = fingerprints(config)
    if known := finished(done, config, data):
        return known
    result = run_training(config, folder / "run")
    tried = {
        "learning_rate": rate,
        "weight_decay": decay,
        "config_hash": config.digest,
        "data": data,
        "val_top1": result.metrics["top1"],
        "val_nll": result.metrics["nll"],
        "seconds": result.seconds,
    }
    shutil.rmtree(folder / "run")
    write_json(done, tried)
    print(f"      {config.method.name}, {setting_name(config)}: validation top-1 {tried['val_top1']:.3f}", flush=True)
    return tried


def setting_name(config: RunConfig) -> str:
    """Return the name of the setting's folder."""
    return f"rate_{config.optim.learning_rate:.3g}_decay_{config.optim.weight_decay:.3g}"


def fingerprints(config: RunConfig, test: str = "") -> dict[str, str]:
    """Return the fingerprint of each data set, by its config key; it depends on the contents."""
    specs = [("data.train", config.data.train, "train"), ("data.val", config.data.val, "val"), ("test", test, "test")]
    return {key: make_source(spec, split).fingerprint for key, spec, split in specs if spec}


def finished(done: Path, config: RunConfig, data: Mapping[str, str], **same: Any) -> dict[str, Any] | None:
    """Return the result of a finished run; None if there is none yet.

    Args:
      done: the file of the cell.
      config: of which the cell must be.
      data: `fingerprints` of the cell's data.
      same: further values that must be equal.

    Raises:
      UserError: the cell is of another config or other data, or the data changed since.
    """
    if not done.is_file():
        return None
    cell: dict[str, Any] = json.loads(done.read_text())
    if any(cell[key] != value for key, value in {"config_hash": config.digest, **same}.items()):
        raise UserError(f"{done} is of another config or test data; use another --output")
    known = cell.get("data", data)  # cells of earlier versions lack it
    if changed := [key for key, value in data.items() if known.get(key) != value]:
        raise UserError(f"{done}: {', '.join(changed)} changed since it was made; use another --output")
    return cell


def run_training(config: RunConfig, workdir: Path) -> Result:
    result = train(config, workdir, quiet=True)
    if result.exit_code >= 128:
        raise SystemExit(result.exit_code)  # stopped by a signal; the same command continues
    if result.model is None:
        raise UserError(f"{workdir}: no model; set config.retention.fail=false in a comparison")
    return result
