"""The overview printed before a training."""

import sys
from collections.abc import Mapping

import jax

from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.sources import Source
from clip_har_jax.parallel.mesh import AXES
from clip_har_jax.trainer.run import Run


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def print_overview(run: Run) -> None:
    """Print the data, the model, the method and the mesh, and write parameters.txt."""
    from clu import parameter_overview

    trainable, frozen = run.program.abstract_state().params, run.program.abstract_frozen()
    path = run.workdir / "parameters.txt"
    path.write_text(parameter_overview.get_parameter_overview({**trainable, **frozen}, include_stats=False) + "\n")
    count = sum(value.size for value in trainable.values())
    print(
        f"data    {_describe_examples(run.data.train)} and {len(run.data.val)} validation images, "
        f"{len(run.data.labels)} classes"
    )
    print(
        f"model   {run.config.model.name}, {count + sum(value.size for value in frozen.values()):,} parameters "
        f"({count:,} trainable), listed in {path}"
    )
    print(f"method  {_describe_method(run)}", flush=True)
    if run.program.method.recipe.learns_from == "steps":
        print(f"run     {_describe_steps(run)}", flush=True)


def _describe_examples(train: Source | PairSources) -> str:
    if not isinstance(train, PairSources):
        return f"{len(train)} training"
    count = "image-text pairs" if train.num_examples is None else f"{train.num_examples} image-text pairs"
    return f"{count} in {train.num_shards} shards"


def _describe_method(run: Run) -> str:
    method = run.program.method
    learns_from = {"steps": f"loss {method.loss}", "features": "features computed once", "nothing": "no training"}
    head = "linear (class embeddings of the learned prompts)" if method.context_length else method.head
    return f"{run.config.method.name}, head {head}, {learns_from[method.recipe.learns_from]}"


def _describe_steps(run: Run) -> str:
    if run.first_step >= run.num_steps:
        return f"all {run.num_steps} steps are done"
    mesh = " x ".join(f"{axis} {run.mesh.shape[axis]}" for axis in AXES if run.mesh.shape[axis] > 1) or "1 device"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    continuing = f", continuing at step {run.first_step}" if run.first_step else ""
    return f"{run.num_steps} steps of {run.config.train.global_batch_size} images on {mesh}{processes}{continuing}"


def print_probe(fitted: Mapping[str, float]) -> None:
    """Print the scores of a head fitted to features."""
    print("fitted  " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in fitted.items()), flush=True)
