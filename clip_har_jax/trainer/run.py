"""A run set up: its data, its program and state on the mesh; training it and judging it."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from clip_har_jax.batch import Batch
from clip_har_jax.config import RunConfig
from clip_har_jax.data.pipeline import (
    BadInputs,
    ProcessShare,
    ResumePoint,
    eval_batches,
    prefetch_to_mesh,
    train_batches,
)
from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.files import is_local, write_json
from clip_har_jax.models.factory import Start, start_params
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed, sharding
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.parallel.topology import find_chip
from clip_har_jax.trainer.artifacts import write_examples
from clip_har_jax.trainer.initial_params import fit_to_features, start_embeddings
from clip_har_jax.trainer.run_data import Data
from clip_har_jax.training.checkpoint import Checkpointer
from clip_har_jax.training.goodput import Goodput
from clip_har_jax.training.guards import SkipGuard, StopSignal, TooManySkippedError
from clip_har_jax.training.loop import Meter, Outcome, Schedule, fit
from clip_har_jax.training.methods import HEAD, ClassInputs
from clip_har_jax.training.program import Program
from clip_har_jax.training.sinks import Sink
from clip_har_jax.training.state import TrainState


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
        process = f".{jax.process_index()}" if jax.process_index() else ""
        self._bad_log = workdir / f"bad_inputs{process}.jsonl"
        self.bad_inputs = {name: self.watch(source) for name, source in (("train", data.train), ("val", data.val))}
        counts = np.bincount(data.train.label_ids, minlength=len(data.labels))
        self.cache_size = int(np.minimum(counts, config.method.cache_per_class).sum())
        self.program = Program(
            config,
            start.config,
            start.preprocess,
            len(data.labels),
            self.num_steps,
            self.mesh,
            class_counts=counts.tolist(),
            cache_size=self.cache_size,
        )
        self.prompts = self.place_texts(data.texts, data.class_of_prompt)
        self.fit_report: dict[str, float] = {}  # how a head was fitted to features
        self.state, self.frozen = self.program.place(self.start_params())
        self._fixed_classes: ClassInputs | None = None

    def watch(self, source: Source) -> BadInputs:
        """Count and log what can't be read of a source."""
        return BadInputs(source, self.config.data.max_bad_fraction, self._bad_log)

    def place_texts(self, texts: Sequence[str], class_of_prompt: Sequence[int]) -> tuple[Any, Any]:
        """Prompts of the run's classes on the mesh; learned vectors, where there are some, still have room in them."""
        length = self.start.config.text.context_length - self.program.method.context_length
        if length < 3:
            raise UserError(
                f"config.method.prompt_length is {self.program.method.context_length}; the text tower takes "
                f"{self.start.config.text.context_length} tokens in all, leave some for the classes' names"
            )
        return self.program.place_prompts(self.start.tokenizer(texts, length)[0], class_of_prompt)

    def start_params(self) -> Params:
        """All parameters as the run begins with them, on the host."""
        clip, method = start_params(self.start, self.config.seed), self.program.method
        head = self.start.head
        if method.has_head and head is not None and (head.name, head.labels) == (method.head, self.data.labels):
            return clip | {HEAD + name: value for name, value in head.params.items()}
        embeddings = start_embeddings(self, clip) if method.has_head else None
        own = method.init_extra(clip, self.program.shapes, embeddings, self._context_ids(), self.config.seed)
        if method.recipe.learns_from == "features" or method.recipe.probes_first:
            assert embeddings is not None
            fit = fit_to_features(self, clip, embeddings)
            self.fit_report = fit.about
            own |= {HEAD + name: value for name, value in fit.params.items()}
        return clip | own

    def _context_ids(self) -> np.ndarray | None:
        """Return the tokens of the words that a learned context starts from."""
        config = self.config.method
        if not self.program.method.context_length:
            return None
        ids, mask = self.start.tokenizer([config.prompt_init], self.start.config.text.context_length)
        words = ids[0, 1 : mask[0].sum() - 1]
        if len(words) > config.prompt_length:
            raise UserError(
                f"config.method.prompt_init={config.prompt_init!r} is {len(words)} tokens; set method.prompt_length to "
                f"{len(words)} or more, or use fewer words"
            )
        return words

    def _check_profile(self) -> None:
        if self.profile_steps is None:
            return
        begin, end = self.profile_steps
        if not self.first_step < begin <= self.num_steps:
            raise UserError(
                f"--profile_steps={begin}:{end}: this start makes steps {self.first_step + 1} to {self.num_steps}"
            )
        if not is_local(self.workdir):
            raise UserError(f"--profile_steps: a trace is written to a disk only, not to {self.workdir}")

    def weights(self, state: TrainState) -> Params:
        """Return the trainable parameters that are evaluated and kept: their moving average where there is one."""
        return state.ema or state.params

    def with_weights(self, state: TrainState, params: Mapping[str, Any]) -> TrainState:
        """Return a state whose trainable parameters are these, from the host."""
        placed = sharding.put_global(dict(params), self.program.shardings.params)
        return state._replace(params=placed, ema=placed if state.ema else {})

    def classes(self, params: Params) -> ClassInputs:
        """Return the classes with their embeddings; computed once where they never change."""
        if self._fixed_classes is not None:
            return self._fixed_classes
        classes = ClassInputs(
            None, None, self.program.class_step(params | self.frozen, ClassInputs(*self.prompts, None))
        )
        if not self.program.trains_text:
            self._fixed_classes = classes
        return classes

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
        classes = ClassInputs(*self.prompts, None) if self.program.trains_text else self.classes(state.params)
        chip = find_chip(jax.devices()[0])
        peak = chip.peak_flops * jax.device_count() if chip else None
        schedule = Schedule(
            self.num_steps,
            config.train.log_every_steps,
            config.eval.every_steps,
            config.checkpoint.every_steps,
            batch_size,
            self.first_example,
            self.profile_steps if distributed.is_main() else None,
            config.train.patience,
        )
        with train_batches(
            self.data.train,
            config.data,
            self.start.preprocess,
            seed=config.seed,
            global_batch_size=batch_size,
            bad_inputs=self.bad_inputs["train"],
            resume=ResumePoint(self.first_step, self.first_example),
            share=ProcessShare(shard, num_shards),
        ) as batches:
            try:
                return fit(
                    state,
                    lambda state, batch: self.program.train_step(state, self.frozen, classes, batch),
                    prefetch_to_mesh(batches, lambda batch: sharding.put_local_rows(batch, rows)),
                    self.validate,
                    schedule,
                    checkpointer,
                    sinks,
                    Meter(self.program.flops_per_step(len(self.data.texts)), peak),
                    goodput,
                    SkipGuard(config.train.max_skipped_steps),
                    stop,
                    os.fspath(self.workdir / "profile"),
                )
            except TooManySkippedError as error:
                raise UserError(f"{error}; {write_examples(self, error.examples)}") from error

    def validate(self, state: TrainState) -> dict[str, float]:
        """Evaluate a state on the validation data; leaves eval/<step>/metrics.json."""
        result = self.evaluate(state)
        if distributed.is_main():
            folder = self.workdir / "eval" / str(int(state.step))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "metrics.json", result.metrics)
        return {f"val/{name}": result.metrics[name] for name in ("top1", "top5", "macro_f1", "nll", "ece")}

    def evaluate(self, state: TrainState) -> EvalResult:
        weights = self.weights(state)
        classes = self.classes(weights)

        def logits(batch: Batch) -> tuple[jax.Array, Batch]:
            return self.program.eval_step(weights, self.frozen, classes, batch)

        batches = self.computed(logits, self.data.val, self.bad_inputs["val"])
        return evaluate(lambda batch: batch.image, batches, self.data.labels)

    def computed(
        self, step: Callable[[Batch], tuple[jax.Array, Batch]], source: Source, bad_inputs: BadInputs
    ) -> Iterator[Batch]:
        """Batches of all processes' rows, each example once, with what `step` gives in the images' place."""
        rows, batch_size = sharding.batch_sharding(self.mesh), self.config.eval.batch_size
        shard, num_shards = sharding.process_shard(self.mesh, batch_size)
        with eval_batches(
            source,
            self.config.data,
            self.start.preprocess,
            batch_size=batch_size,
            bad_inputs=bad_inputs,
            share=ProcessShare(shard, num_shards),
        ) as batches:
            for batch in batches:
                outputs, whole = step(sharding.put_local_rows(batch, rows))
                label, mask, index = (np.asarray(part) for part in (whole.label, whole.mask, whole.index))
                yield Batch(np.asarray(outputs), label, mask, index)
