"""Run: config, data, base model and program of a training. It places no arrays on devices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from clip_har_jax.batch import Batch
from clip_har_jax.config import RunConfig
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.pipeline import ProcessShare, eval_batches
from clip_har_jax.data.sources import Source
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.retrieval import check_texts
from clip_har_jax.files import is_local
from clip_har_jax.models.factory import BaseModel
from clip_har_jax.parallel import sharding
from clip_har_jax.parallel.mesh import make_mesh
from clip_har_jax.trainer.run_data import Data
from clip_har_jax.training.loop import Timetable
from clip_har_jax.training.methods import ClassInputs
from clip_har_jax.training.program import Program, make_program


@dataclass(frozen=True)
class Run:
    """A run before its arrays are made; see `setup`.

    Attributes:
      workdir: on a disk or an object store.
      base: the model to fine-tune.
      program: its mesh and steps.
      timetable: the steps of logging, evaluation and saving.
      position: the step and the position in the data of the checkpoint to resume from; empty: none.
      profile_steps: the first and the last step of a trace.
      bad_inputs: counters of the unreadable examples of "train" and "val"; image-text pairs have others.
    """

    config: RunConfig
    workdir: epath.Path
    data: Data
    base: BaseModel
    program: Program
    timetable: Timetable
    position: Mapping[str, Any]
    profile_steps: tuple[int, int] | None
    bad_inputs: Mapping[str, BadInputs]

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    @property
    def first_step(self) -> int:
        """The step of the checkpoint to resume from; 0: none."""
        return self.position.get("step", 0)

    @property
    def bad_inputs_log(self) -> epath.Path:
        """The file of this process that lists unreadable examples."""
        return _bad_inputs_log(self.workdir)

    @property
    def num_steps(self) -> int:
        return self.timetable.num_steps

    def watch(self, source: Source) -> BadInputs:
        """Return a counter of the unreadable examples of a source, which logs them in the work folder."""
        return _watch(source, self.config, self.workdir)

    def place_prompts(self) -> ClassInputs:
        """Return the prompts of the run's classes on the mesh, shortened by the tokens of learned vectors.

        For a model without a text tower, return class embeddings of 0.
        """
        if not self.base.config.has_texts:  # a linear head starts at 0
            dim = self.base.config.projection_dim
            whole, start = sharding.replicated(self.mesh), np.zeros((len(self.data.labels), dim), np.float32)
            return ClassInputs(None, None, sharding.put_global(start, whole))
        length = self.base.config.text.context_length - self.program.method.context_length
        ids, _ = self.base.tokenizer(self.data.texts, length)
        return ClassInputs(*self.program.place_prompts(ids, self.data.class_of_prompt), None)

    def context_ids(self) -> Int[np.ndarray, " n"] | None:
        """Return the tokens of the words that initialise a learned context; None if none is learned.

        Raises:
          UserError: more tokens than the context has, or no room left for the classes' names.
        """
        config, whole = self.config.method, self.base.config.text.context_length
        taken = self.program.method.context_length
        if not taken:
            return None
        if whole - taken < 3:
            raise UserError(
                f"config.method.prompt_length is {taken}; the text tower takes {whole} tokens in all, leave some for "
                "the classes' names"
            )
        words = np.asarray(self.base.tokenizer.words(config.prompt_init), np.int32)
        if len(words) > taken:
            raise UserError(
                f"config.method.prompt_init={config.prompt_init!r} is {len(words)} tokens; set method.prompt_length to "
                f"{len(words)} or more, or use fewer words"
            )
        return words

    def map_batches(
        self, step: Callable[[Batch], tuple[jax.Array, Batch]], source: Source, bad_inputs: BadInputs
    ) -> Iterator[Batch]:
        """Yield host batches over a source, each example once, with the outputs of `step` in place of the images.

        Every process receives all rows.

        Args:
          step: takes a batch of `eval.batch_size` rows on the mesh; its output has these rows, [b, ...].
          source: the examples.
          bad_inputs: counts those that can't be read.
        """
        rows, batch_size = sharding.batch_sharding(self.mesh), self.config.eval.batch_size
        with eval_batches(
            source,
            self.config.data,
            self.base.preprocess,
            batch_size=batch_size,
            bad_inputs=bad_inputs,
            share=ProcessShare(*sharding.process_shard(self.mesh, batch_size)),
        ) as batches:
            for batch in batches:
                outputs, labels = jax.device_get(step(sharding.put_local_rows(batch, rows)))
                yield labels._replace(image=outputs)


def setup(
    config: RunConfig,
    workdir: epath.Path,
    data: Data,
    base: BaseModel,
    position: Mapping[str, Any],
    profile_steps: tuple[int, int] | None = None,
) -> Run:
    """Return a run on all devices of all processes; no arrays are placed yet.

    Args:
      position: the data position of the checkpoint to resume from; empty: none.

    Raises:
      UserError: settings that don't match the data, the model, the devices or each other.
    """
    batch_size, first_step = config.train.global_batch_size, position.get("step", 0)
    first_example = position.get("examples_seen", 0) - first_step * batch_size
    labelled = {} if isinstance(data.train, PairSources) else {"train": data.train}
    counts = data.classified.class_counts if labelled else None
    timetable = Timetable(
        config.train.num_steps or _steps_of_epochs(config, data.train.num_examples, first_example),
        config.train.log_every_steps,
        config.eval.every_steps,
        config.checkpoint.every_steps,
        batch_size,
        first_example,
        config.train.patience,
    )
    _check_profile(profile_steps, first_step, timetable.num_steps, workdir)
    program = make_program(
        config,
        base.config,
        base.preprocess,
        len(data.labels),
        timetable.num_steps,
        make_mesh(config.mesh),
        class_counts=None if counts is None else counts.tolist(),
        cache_size=0 if counts is None else int(np.minimum(counts, config.method.cache_per_class).sum()),
    )
    bad_inputs = {name: _watch(source, config, workdir) for name, source in {**labelled, "val": data.val}.items()}
    run = Run(config, workdir, data, base, program, timetable, position, profile_steps, bad_inputs)
    if data.retrieval is not None:
        check_texts(f"config.model.name={config.model.name}", base.config.has_texts)
    run.context_ids()  # check it before the work folder is written
    return run


def _steps_of_epochs(config: RunConfig, num_examples: int | None, first_example: int) -> int:
    if num_examples is None:
        raise UserError(
            "config.train.num_steps: the number of pairs in tar shards isn't known before all are read, so the length "
            "of an epoch isn't; set the number of steps, e.g. --config.train.num_steps=10000"
        )
    return max(1, round((config.train.num_epochs * num_examples - first_example) / config.train.global_batch_size))


def _watch(source: Source, config: RunConfig, workdir: epath.Path) -> BadInputs:
    return BadInputs(source, config.data.max_bad_fraction, _bad_inputs_log(workdir))


def _bad_inputs_log(workdir: epath.Path) -> epath.Path:
    process = f".{jax.process_index()}" if jax.process_index() else ""
    return workdir / f"bad_inputs{process}.jsonl"


def _check_profile(steps: tuple[int, int] | None, first_step: int, num_steps: int, workdir: epath.Path) -> None:
    if steps is None:
        return
    if not first_step < steps[0] <= num_steps:
        raise UserError(
            f"--profile_steps={steps[0]}:{steps[1]}: this start makes steps {first_step + 1} to {num_steps}"
        )
    if not is_local(workdir):
        raise UserError(f"--profile_steps: a trace is written to a disk only, not to {workdir}")
