"""A run set up: its data, its program and state on the mesh, and what it writes into the work folder."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from clip_har_jax import bundle
from clip_har_jax.batch import Batch
from clip_har_jax.config import RunConfig
from clip_har_jax.data.pipeline import BadInputs, eval_batches, prefetch_to_mesh, train_batches
from clip_har_jax.data.sources import Source, SubsetSource, are_clips, make_source, manifest_of
from clip_har_jax.data.splits import hold_out
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.evaluation.calibration import Calibration
from clip_har_jax.evaluation.evaluator import EvalResult, evaluate, write_result
from clip_har_jax.models.factory import Start, start_params
from clip_har_jax.models.params import Params
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.parallel.mesh import AXES, make_mesh, peak_flops
from clip_har_jax.pipelines.provenance import make_record
from clip_har_jax.pipelines.workdir import read_json
from clip_har_jax.text import make_prompts
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.goodput import Goodput
from clip_har_jax.training.guards import SkipGuard, StopSignal, TooManySkippedError
from clip_har_jax.training.loop import Meter, Outcome, Schedule, fit
from clip_har_jax.training.methods import Classes
from clip_har_jax.training.program import Program
from clip_har_jax.training.sinks import Sink
from clip_har_jax.training.state import TrainState


@dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by."""

    train: Source
    val: Source
    labels: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]

    @property
    def texts(self) -> list[str]:
        """All prompts, class after class."""
        return [text for label in self.labels for text in self.prompts[label]]


def load_data(config: RunConfig) -> Data:
    """The data that a config names.

    Raises:
      UserError: it isn't there, or leaves nothing to train or to validate on.
    """
    train_source = make_source(config.data.train, "train", config.data.labels, several_classes=True)
    labels = tuple(train_source.labels)
    if config.data.val:
        val_source = make_source(config.data.val, "val", labels)
    else:
        train_ids, val_ids = hold_out(train_source.label_ids, config.data.val_fraction, config.seed)
        train_source, val_source = SubsetSource(train_source, train_ids), SubsetSource(train_source, val_ids)
    if unknown := [label for label in config.data.augment.no_flip_labels if label not in labels]:
        raise UserError(
            f"config.data.augment.no_flip_labels: {unknown[0]!r} is none of the {len(labels)} classes; "
            f"{nearest(unknown[0], list(labels))}"
        )
    if not len(val_source):
        raise UserError("config.data.val_fraction leaves no validation images; raise it, or set config.data.val")
    prompts = make_prompts(labels, config.text.templates, config.text.descriptions, config.text.phrases)
    return Data(train_source, val_source, labels, prompts)


class Run:
    """The program of a config, with its data and state on the mesh."""

    def __init__(
        self,
        config: RunConfig,
        workdir: epath.Path,
        data: Data,
        start: Start,
        position: Mapping[str, Any],
        profile_steps: tuple[int, int] | None,
    ):
        self.config, self.workdir, self.data, self.start = config, workdir, data, start
        self.profile_steps = profile_steps
        self.mesh, batch_size = make_mesh(config.mesh), config.train.global_batch_size
        self.first_step = position.get("step", 0)
        self.first_example = position.get("examples_seen", 0) - self.first_step * batch_size
        epochs = round((config.train.num_epochs * len(data.train) - self.first_example) / batch_size)
        self.num_steps = config.train.num_steps or max(1, epochs)
        self._check_profile()
        self.program = Program(config, start.config, start.preprocess, len(data.labels), self.num_steps, self.mesh)
        self.state, self.frozen = self.program.place(start_params(start, config.seed))
        input_ids, _ = start.tokenizer(data.texts, start.config.text.context_length)
        class_of_prompt = [i for i, label in enumerate(data.labels) for _ in data.prompts[label]]
        self.prompts = self.program.place_prompts(input_ids, class_of_prompt)
        process = f".{jax.process_index()}" if jax.process_index() else ""
        self.bad_inputs = {
            name: BadInputs(source, config.data.max_bad_fraction, workdir / f"bad_inputs{process}.jsonl")
            for name, source in (("train", data.train), ("val", data.val))
        }

    def _check_profile(self) -> None:
        if self.profile_steps is None:
            return
        begin, end = self.profile_steps
        if not self.first_step < begin <= self.num_steps:
            raise UserError(
                f"--profile_steps={begin}:{end}: this start makes steps {self.first_step + 1} to {self.num_steps}"
            )
        if not bundle.is_local(self.workdir):
            raise UserError(f"--profile_steps: a trace is written to a disk only, not to {self.workdir}")

    def weights(self, state: TrainState) -> Params:
        """The trainable parameters that are evaluated and kept: their moving average where there is one."""
        return state.ema or state.params

    def classes(self, params: Params) -> Classes:
        """The classes with their embeddings, computed now."""
        return Classes(None, None, self.program.class_step(params | self.frozen, *self.prompts))

    def fit(
        self,
        state: TrainState,
        checkpointer: Checkpointer,
        sinks: Sequence[Sink],
        goodput: Goodput,
        stop: StopSignal,
    ) -> Outcome:
        config, batch_size = self.config, self.config.train.global_batch_size
        shard, num_shards = sharding.process_shard(self.mesh, batch_size)
        rows = sharding.batch_sharding(self.mesh)
        # With a frozen text tower the class embeddings never change: they are computed once.
        classes = Classes(*self.prompts, None) if self.program.trains_text else self.classes(state.params)
        peak = peak_flops(jax.devices()[0])
        schedule = Schedule(
            self.num_steps,
            config.train.log_every_steps,
            config.eval.every_steps,
            config.checkpoint.every_steps,
            batch_size,
            self.first_example,
            self.profile_steps if distributed.is_main() else None,
        )
        with train_batches(
            self.data.train,
            config.data,
            self.start.preprocess,
            seed=config.seed,
            global_batch_size=batch_size,
            start_step=self.first_step,
            first_example=self.first_example,
            process_index=shard,
            process_count=num_shards,
            bad_inputs=self.bad_inputs["train"],
        ) as batches:
            try:
                return fit(
                    state,
                    lambda state, batch: self.program.train_step(state, self.frozen, classes, batch),
                    prefetch_to_mesh(batches, lambda batch: sharding.place(batch, rows)),
                    self.validate,
                    schedule,
                    checkpointer,
                    sinks,
                    Meter(self.program.flops_per_step(len(self.data.texts)), peak and peak * jax.device_count()),
                    goodput,
                    SkipGuard(config.train.max_skipped_steps),
                    stop,
                    os.fspath(self.workdir / "profile"),
                )
            except TooManySkippedError as error:
                raise UserError(f"{error}; {self._write_examples(error.examples)}") from error

    def _write_examples(self, examples: Mapping[int, Sequence[int]]) -> str:
        """Names the examples of the batches whose update wasn't finite; returns what to do about it."""
        process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.workdir / f"nonfinite_examples{process}.json"
        source = self.data.train
        bundle.write_json(
            path,
            [
                {"step": step, "examples": [{"index": index, "input": _name(source, index)} for index in indices]}
                for step, indices in sorted(examples.items())
            ],
        )
        return f"the examples stand in {path}. Lower config.optim.learning_rate, or look at them"

    def validate(self, state: TrainState) -> dict[str, float]:
        """Evaluates a state on the validation data; leaves eval/<step>/metrics.json."""
        result = self.evaluate(state)
        if distributed.is_main():
            folder = self.workdir / "eval" / str(int(state.step))
            folder.mkdir(parents=True, exist_ok=True)
            bundle.write_json(folder / "metrics.json", result.metrics)
        return {f"val/{name}": result.metrics[name] for name in ("top1", "top5", "macro_f1", "nll", "ece")}

    def evaluate(self, state: TrainState) -> EvalResult:
        weights = self.weights(state)
        classes = self.classes(weights)
        rows = sharding.batch_sharding(self.mesh)
        shard, num_shards = sharding.process_shard(self.mesh, self.config.eval.batch_size)

        batches = eval_batches(
            self.data.val,
            self.config.data,
            self.start.preprocess,
            batch_size=self.config.eval.batch_size,
            process_index=shard,
            process_count=num_shards,
            bad_inputs=self.bad_inputs["val"],
        )

        def computed() -> Iterator[Batch]:
            """Batches of all processes' rows, with the logits in the images' place."""
            for batch in batches:
                logits, whole = self.program.eval_step(weights, self.frozen, classes, sharding.place(batch, rows))
                label, mask, index = (np.asarray(part) for part in (whole.label, whole.mask, whole.index))
                yield Batch(np.asarray(logits), label, mask, index)

        return evaluate(lambda batch: batch.image, computed(), self.data.labels)

    def data_record(self) -> dict[str, dict[str, Any]]:
        """What identifies the training and the validation data, by name."""
        specs = {"train": self.config.data.train, "val": self.config.data.val or self.config.data.train}
        sources = {"train": self.data.train, "val": self.data.val}
        return {
            name: {
                "spec": specs[name],
                "num_examples": len(source),
                "fingerprint": source.fingerprint,
                "manifest_sha256": manifest_of(source),
            }
            for name, source in sources.items()
        }

    def write_report(self, step: int, result: EvalResult) -> epath.Path:
        """Writes the report of an evaluation to eval/<step>/, for the trackers."""
        folder = self.workdir / "eval" / str(step)
        if distributed.is_main():
            about = {"run": str(self.workdir), "step": str(step), "data": self.config.data.val or "held out"}
            names = [_name(self.data.val, int(i)) for i in result.predictions.index]
            if bundle.is_local(folder):
                write_result(result, Path(folder), names, about)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    write_result(result, scratch, names, about)
                    for path in Path(scratch).iterdir():
                        (folder / path.name).write_bytes(path.read_bytes())
        return folder

    def write_record(self, goodput: Goodput, changes: Sequence[Mapping[str, Any]]) -> None:
        """Writes run.json."""
        if not distributed.is_main():
            return
        old = read_json(self.workdir / "run.json")
        changed = [{"step": self.first_step, **change} for change in changes]
        facts = {
            "data": self.data_record(),
            "mesh": {axis: self.mesh.shape[axis] for axis in AXES},
            "param_bytes_per_device": sharding.bytes_per_device((self.state.params, self.frozen)),
            "num_steps": self.num_steps,
            "starts": (old or {}).get("starts", 0) + 1,
            "config_changes": [*(old or {}).get("config_changes", []), *changed],
            "last_step": self.first_step,
            "goodput": goodput.seconds(),
        }
        bundle.write_json(self.workdir / "run.json", make_record(self.config, facts, old))

    def record_goodput(self, goodput: Goodput, step: int) -> dict[str, float]:
        """Brings the account of the time in run.json up to date, and returns it."""
        seconds = goodput.seconds()
        if distributed.is_main():
            record = read_json(self.workdir / "run.json") or {}
            bundle.write_json(self.workdir / "run.json", {**record, "last_step": step, "goodput": seconds})
        return seconds

    def print_overview(self) -> None:
        """What is about to run: data, model, mesh."""
        from clu import parameter_overview

        params = {**self.state.params, **self.frozen}
        text = parameter_overview.get_parameter_overview(params, include_stats=False)
        (self.workdir / "parameters.txt").write_text(text + "\n")
        count = sum(value.size for value in params.values())
        trainable = sum(value.size for value in self.state.params.values())
        mesh = " x ".join(f"{axis} {self.mesh.shape[axis]}" for axis in AXES if self.mesh.shape[axis] > 1) or "1 device"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(
            f"data    {len(self.data.train)} training and {len(self.data.val)} validation images, "
            f"{len(self.data.labels)} classes"
        )
        print(
            f"model   {self.config.model.name}, {count:,} parameters ({trainable:,} trainable), "
            f"listed in {self.workdir / 'parameters.txt'}"
        )
        print(
            f"run     {self.num_steps} steps of {self.config.train.global_batch_size} images on {mesh}{processes}"
            + (f", continuing at step {self.first_step}" if self.first_step else ""),
            flush=True,
        )

    def write_model(self, state: TrainState, calibration: Calibration) -> epath.Path:
        """Writes the model folder and seals it; the old one stays whole until the new one is."""
        params = distributed.fetch({**self.weights(state), **self.frozen})
        target = self.workdir / "model"
        if not distributed.is_main():
            return target

        def fill(folder: Path) -> None:
            write_params(folder, self.start.config, params)
            self.start.tokenizer.save(folder)
            self.start.preprocess.save(folder)
            temperature, thresholds = calibration.temperature, calibration.thresholds
            actions = bundle.Actions(self.data.labels, self.data.prompts, temperature, thresholds=thresholds)
            if are_clips(self.data.train):
                actions = replace(actions, video=asdict(self.config.data.video))
            bundle.write_actions(folder, actions)
            bundle.write_json(folder / "calibration.json", calibration.report)
            (folder / "run.json").write_text((self.workdir / "run.json").read_text())
            bundle.seal(folder)

        if bundle.is_local(target):
            bundle.replace_folder(Path(target), fill)
        else:
            _upload_folder(fill, target)
        return target


def _upload_folder(fill: Callable[[Path], None], target: epath.Path) -> None:
    """Puts a folder written by `fill` on an object store; its manifest goes last, so that a part isn't sealed."""
    with tempfile.TemporaryDirectory() as scratch:
        fill(Path(scratch))
        if target.exists():
            target.rmtree()
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == bundle.MANIFEST):
            (target / path.name).write_bytes(path.read_bytes())


def _name(source: Source, index: int) -> str:
    try:
        return source[index].name
    except Exception:  # the very example may be what is wrong
        return f"example {index}"
