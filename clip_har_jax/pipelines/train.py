"""Data in, a fine-tuned model folder out."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from clip_har_jax import bundle
from clip_har_jax.batch import Batch
from clip_har_jax.config import RunConfig, leaves
from clip_har_jax.data.pipeline import BadInputs, eval_batches, prefetch_to_mesh, train_batches
from clip_har_jax.data.sources import Source, SubsetSource, make_source
from clip_har_jax.data.splits import hold_out
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.evaluator import EvalResult, evaluate
from clip_har_jax.models.clip import forward_flops
from clip_har_jax.models.factory import Start, make_start, start_params
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import Params, abstract_model, axis_names
from clip_har_jax.models.pretrained import write_params
from clip_har_jax.parallel import sharding
from clip_har_jax.parallel.mesh import AXES, make_mesh, peak_flops
from clip_har_jax.pipelines.provenance import make_record
from clip_har_jax.text import make_prompts
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.guards import StopSignal
from clip_har_jax.training.loop import Meter, Schedule, fit
from clip_har_jax.training.methods import Classes, make_method
from clip_har_jax.training.optim import make_optimizer, make_schedule
from clip_har_jax.training.sinks import ConsoleSink, JsonlSink, Sink
from clip_har_jax.training.state import TrainState, make_state, state_shardings
from clip_har_jax.training.steps import make_class_step, make_eval_step, make_train_step

# What may differ between the run that began in a work folder and the one that continues it.
FREE_AT_RESUME = ("data.num_", "data.prefetch", "data.max_", "train.log_", "checkpoint.", "eval.", "mesh.")


@dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by."""

    train: Source
    val: Source
    labels: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    workdir: Path
    model: Path | None  # None where a signal stopped the run first
    steps: int
    metrics: dict[str, Any]  # of the model folder, on the validation data
    seconds: float
    exit_code: int  # 0, or 128 + the signal's number


def train(config: RunConfig, workdir: str | Path, sinks: Sequence[Sink] = (), quiet: bool = False) -> Result:
    """Trains a model, or continues where the run in `workdir` stopped.

    Args:
      config: the run.
      workdir: config.json, run.json, metrics.jsonl, checkpoints/, eval/ and model/ are written there.
      sinks: further receivers of the metrics.
      quiet: nothing on the screen.

    Raises:
      UserError: a mistake in the config or the data; found before any compute where it can be.
    """
    begin, workdir = time.monotonic(), Path(workdir)
    data = _load_data(config)
    prompts = [text for texts in data.prompts.values() for text in texts]
    start = make_start(config.model.name, prompts, config.model.image_size_px)
    _claim(workdir, config)
    run = _Run(config, workdir, data, start)
    with ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", config.checkpoint))
        state, step = run.state, checkpointer.latest_step() or 0
        if step:
            state, _ = checkpointer.restore(state, step)
        run.write_record()
        all_sinks: list[Sink] = [JsonlSink(workdir / "metrics.jsonl", step), *sinks]
        if not quiet:
            run.print_overview(step)
            all_sinks.append(ConsoleSink(run.num_steps, step))
        for sink in all_sinks:
            stack.callback(sink.close)
        stop = stack.enter_context(StopSignal())
        outcome = run.fit(state, step, checkpointer, all_sinks, stop)
        if outcome.stopped:
            return Result(workdir, None, int(outcome.state.step), {}, time.monotonic() - begin, stop.exit_code)
        best = checkpointer.best_step()
        assert best is not None, "the last step is always saved"
        state, _ = checkpointer.restore(outcome.state, best)
    metrics = json.loads((workdir / "eval" / str(best) / "metrics.json").read_text())
    model = run.write_model(state)
    return Result(workdir, model, best, metrics, time.monotonic() - begin, 0)


def _load_data(config: RunConfig) -> Data:
    train_source = make_source(config.data.train, "train", config.data.labels, several_classes=True)
    labels = tuple(train_source.labels)
    if config.data.val:
        val_source = make_source(config.data.val, "val", labels)
    else:
        train_ids, val_ids = hold_out(train_source.label_ids, config.data.val_fraction, config.seed)
        train_source, val_source = SubsetSource(train_source, train_ids), SubsetSource(train_source, val_ids)
    if not len(val_source):
        raise UserError("config.data.val_fraction leaves no validation images; raise it, or set config.data.val")
    prompts = make_prompts(labels, config.text.templates, config.text.descriptions, config.text.phrases)
    return Data(train_source, val_source, labels, prompts)


def _claim(workdir: Path, config: RunConfig) -> None:
    """Makes the work folder and writes config.json; refuses to continue a run that began with another config."""
    path = workdir / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        for key, value in leaves(config):
            node: Any = old
            for name in key.split("."):
                node = node.get(name) if isinstance(node, dict) else None
            if json.loads(json.dumps(value)) != node and not key.startswith(FREE_AT_RESUME):
                raise UserError(
                    f"{workdir} holds a run with {key}={node!r}, this one says {value!r}; use another --workdir, or "
                    f"--config.{key}={node}"
                )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        bundle.write_json(path, config.to_dict())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: can't be written ({error.strerror})") from error


class _Run:
    """A run set up: the mesh, the placed state, the compiled steps."""

    def __init__(self, config: RunConfig, workdir: Path, data: Data, start: Start):
        self.config, self.workdir, self.data, self.start = config, workdir, data, start
        self.mesh = make_mesh(config.mesh)
        batch_size = config.train.global_batch_size
        sharding.check_batch_size(batch_size, self.mesh, "train.global_batch_size")
        sharding.check_batch_size(config.eval.batch_size, self.mesh, "eval.batch_size")
        epochs = round(config.train.num_epochs * len(data.train) / batch_size)
        self.num_steps = config.train.num_steps or max(1, epochs)
        runtime = Runtime(config.model.compute_dtype, config.model.remat, config.model.attention)
        model = abstract_model(start.config, runtime)
        self.graphdef = nnx.graphdef(model)
        self.method = make_method(config.method, len(data.labels))
        self._place_parameters(axis_names(model))
        self._compile_steps()
        self.bad_inputs = {
            name: BadInputs(source, config.data.max_bad_fraction, workdir / "bad_inputs.jsonl")
            for name, source in (("train", data.train), ("val", data.val))
        }

    def _place_parameters(self, axes: dict[str, tuple[str | None, ...]]) -> None:
        params = start_params(self.start, self.config.seed)
        shardings = sharding.param_shardings({name: value.shape for name, value in params.items()}, axes, self.mesh)
        trainable = {name: value for name, value in params.items() if self.method.is_trainable(name)}
        frozen = {name: value for name, value in params.items() if name not in trainable}
        self.frozen: Params = sharding.put(frozen, {name: shardings[name] for name in frozen})
        self.optimizer = make_optimizer(self.config.optim, self.num_steps, trainable)
        self.shardings = state_shardings(
            self.optimizer, trainable, {name: shardings[name] for name in trainable}, self.mesh
        )
        self.state = make_state(trainable, self.optimizer, self.config.seed, self.shardings)

    def _compile_steps(self) -> None:
        config = self.config
        self.train_step = make_train_step(
            self.graphdef,
            self.method,
            self.optimizer,
            make_schedule(config.optim, self.num_steps),
            self.start.preprocess,
            config.method.label_smoothing,
            self.shardings,
            self.mesh,
        )
        self.eval_step = make_eval_step(self.graphdef, self.method, self.start.preprocess, self.mesh)
        self.class_step = make_class_step(self.graphdef, len(self.data.labels), self.mesh)
        texts = [(text, i) for i, label in enumerate(self.data.labels) for text in self.data.prompts[label]]
        input_ids, _ = self.start.tokenizer([text for text, _ in texts], self.start.config.text.context_length)
        self.prompts: Any = sharding.put(
            (input_ids, np.asarray([i for _, i in texts], np.int32)), (sharding.replicated(self.mesh),) * 2
        )

    def classes(self, params: Params) -> Classes:
        """The classes with their embeddings, computed now."""
        return Classes(None, None, self.class_step(params | self.frozen, *self.prompts))

    def fit(
        self, state: TrainState, step: int, checkpointer: Checkpointer, sinks: Sequence[Sink], stop: StopSignal
    ) -> Any:
        config, batch_size = self.config, self.config.train.global_batch_size
        shard, num_shards = sharding.process_shard(self.mesh, batch_size)
        rows = sharding.batch_sharding(self.mesh)
        # With a frozen text tower the class embeddings never change: they are computed once.
        classes = (
            Classes(self.prompts[0], self.prompts[1], None) if self.method.trains_text else self.classes(state.params)
        )
        peak = peak_flops(jax.devices()[0])
        meter = Meter(self._flops_per_image(), peak and peak * jax.device_count())
        schedule = Schedule(
            self.num_steps,
            config.train.log_every_steps,
            config.eval.every_steps,
            config.checkpoint.every_steps,
            batch_size,
        )
        with train_batches(
            self.data.train,
            config.data,
            self.start.preprocess,
            seed=config.seed,
            global_batch_size=batch_size,
            start_step=step,
            process_index=shard,
            process_count=num_shards,
            bad_inputs=self.bad_inputs["train"],
        ) as batches:
            return fit(
                state,
                lambda state, batch: self.train_step(state, self.frozen, classes, batch),
                prefetch_to_mesh(batches, lambda batch: sharding.place(batch, rows)),
                self.validate,
                schedule,
                checkpointer,
                sinks,
                meter,
                stop,
            )

    def validate(self, state: TrainState) -> dict[str, float]:
        """Evaluates a state on the validation data; leaves eval/<step>/metrics.json."""
        result = self.evaluate(state)
        folder = self.workdir / "eval" / str(int(state.step))
        folder.mkdir(parents=True, exist_ok=True)
        bundle.write_json(folder / "metrics.json", result.metrics)
        return {f"val/{name}": result.metrics[name] for name in ("top1", "top5", "macro_f1", "nll", "ece")}

    def evaluate(self, state: TrainState) -> EvalResult:
        classes = self.classes(state.params)
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
                logits, whole = self.eval_step(state.params, self.frozen, classes, sharding.place(batch, rows))
                label, mask, index = (np.asarray(part) for part in (whole.label, whole.mask, whole.index))
                yield Batch(np.asarray(logits), label, mask, index)

        return evaluate(lambda batch: batch.image, computed(), self.data.labels)

    def _flops_per_image(self) -> int:
        """Of a training step: forward, and twice that backward where the tower is trained."""
        config = self.start.config
        trains_image = self.method.towers in ("image", "both")
        flops = forward_flops(config.vision, config.projection_dim) * (3 if trains_image else 1)
        if self.method.trains_text:
            texts = len(self.prompts[1]) / self.config.train.global_batch_size
            flops += round(3 * texts * forward_flops(config.text, config.projection_dim))
        return flops

    def write_record(self) -> None:
        """Writes run.json."""
        facts = {
            "data": {
                name: {"spec": spec, "num_examples": len(source), "fingerprint": source.fingerprint}
                for name, spec, source in (
                    ("train", self.config.data.train, self.data.train),
                    ("val", self.config.data.val or self.config.data.train, self.data.val),
                )
            },
            "mesh": {axis: self.mesh.shape[axis] for axis in AXES},
            "param_bytes_per_device": sharding.bytes_per_device((self.state.params, self.frozen)),
            "num_steps": self.num_steps,
        }
        path = self.workdir / "run.json"
        bundle.write_json(path, make_record(self.config, facts, path))

    def print_overview(self, step: int) -> None:
        """What is about to run: data, model, mesh."""
        from clu import parameter_overview

        params = {**self.state.params, **self.frozen}
        (self.workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params) + "\n")
        count = sum(value.size for value in params.values())
        trainable = sum(value.size for value in self.state.params.values())
        mesh = " x ".join(f"{axis} {self.mesh.shape[axis]}" for axis in AXES if self.mesh.shape[axis] > 1) or "1 device"
        print(
            f"data    {len(self.data.train)} training and {len(self.data.val)} validation images, "
            f"{len(self.data.labels)} classes"
        )
        print(
            f"model   {self.config.model.name}, {count:,} parameters ({trainable:,} trainable), "
            f"listed in {self.workdir / 'parameters.txt'}"
        )
        print(
            f"run     {self.num_steps} steps of {self.config.train.global_batch_size} images on {mesh}"
            + (f", continuing at step {step}" if step else ""),
            flush=True,
        )

    def write_model(self, state: TrainState) -> Path:
        """Writes the model folder and seals it; the old one stays whole until the new one is."""
        return bundle.replace_folder(self.workdir / "model", self._fill_model_folder(state))

    def _fill_model_folder(self, state: TrainState) -> Any:
        def fill(folder: Path) -> None:
            write_params(folder, self.start.config, jax.device_get({**state.params, **self.frozen}))
            self.start.tokenizer.save(folder)
            self.start.preprocess.save(folder)
            bundle.write_actions(folder, bundle.Actions(self.data.labels, self.data.prompts))
            (folder / "run.json").write_text((self.workdir / "run.json").read_text())
            bundle.seal(folder)

        return fill


def print_result(result: Result) -> None:
    """A short table: the result and where things lie."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    if result.model is None:
        table.add_row("stopped", f"at step {result.steps}, saved; the same command continues")
    else:
        table.add_row("top-1", f"{result.metrics['top1']:.3f} on {result.metrics['num_examples']} validation images")
        table.add_row("macro F1", f"{result.metrics['macro_f1']:.3f}")
        table.add_row("model", f"{result.model} (step {result.steps}, the best)")
    table.add_row("metrics", str(result.workdir / "metrics.jsonl"))
    table.add_row("time", f"{result.seconds:.0f} s")
    Console(highlight=False, soft_wrap=True).print(table)
