"""Evaluation of a model folder on image-text pairs: recall in both directions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from clip_har_jax import bundle, cli
from clip_har_jax.config import DataConfig, EvalConfig, make_config
from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.pair_batches import eval_pair_batches
from clip_har_jax.data.pair_rows import PairTransform
from clip_har_jax.data.pair_sources import make_pair_sources
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.retrieval import Embedded, check_texts, describe, measure_retrieval
from clip_har_jax.files import write_json
from clip_har_jax.folders import output_folder
from clip_har_jax.models.factory import load
from clip_har_jax.models.params import flat_params, unflatten
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.models.two_towers import normalize_images
from clip_har_jax.parallel.compile_cache import keep_compiled
from clip_har_jax.pipelines.evaluate import with_progress


def evaluate_retrieval(
    model: str,
    data: str,
    output: str | Path,
    batch_size: int = EvalConfig.batch_size,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
) -> dict[str, Any]:
    """Return the recall of a model folder, or of any folder of a known family, and write it to metrics.json.

    Both towers are compared; a trained head isn't used.

    Args:
      model: a folder or a Hub name.
      data: the SPEC of the pairs; several are joined by `::`.
      output: the folder to write to.
      batch_size: pairs in one forward pass.
      max_bad_fraction: accepted share of pairs that can't be read, which are listed in bad_inputs.jsonl.

    Raises:
      UserError: a mistake in the arguments, the model or the data.
    """
    config = make_config({"data": {"max_bad_fraction": max_bad_fraction}, "eval": {"batch_size": batch_size}})
    sources, model_folder = make_pair_sources(data), resolve_folder(model)
    digest, loaded = bundle.verify(model_folder), load(str(model_folder))
    check_texts(model, loaded.model.config.has_texts)
    keep_compiled()
    towers, mean, std = loaded.model, loaded.preprocess.mean, loaded.preprocess.std
    graphdef, params = nnx.graphdef(towers), flat_params(towers)

    @jax.jit
    def embed(params: Any, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = nnx.merge(graphdef, unflatten(params))
        return own.encode_image(normalize_images(images, mean, std)), own.encode_text(ids)

    transform = PairTransform(config.data, loaded.preprocess, loaded.tokenizer, towers.config.text.context_length)
    with output_folder(output) as folder:
        log = folder / "bad_inputs.jsonl"
        log.unlink(missing_ok=True)  # of an earlier evaluation
        bad_pairs = BadPairs(max_bad_fraction, log, "--max_bad_fraction")

        def embedded() -> Iterator[Embedded]:
            batches = eval_pair_batches(sources, transform, batch_size, bad_pairs)
            total = None if sources.num_examples is None else -(-sources.num_examples // batch_size)
            for batch, pairs in with_progress(batches, total):
                image, text = jax.device_get(embed(params, batch.image, batch.input_ids))
                yield Embedded(np.asarray(image), np.asarray(text), batch.mask > 0, pairs)

        metrics = measure_retrieval(embedded())
        metrics |= {"data": data, "data_fingerprint": sources.fingerprint, "model_digest": digest}
        write_json(folder / "metrics.json", metrics)
    return metrics


def print_result(metrics: dict[str, Any], output: str | Path) -> None:
    """Print the recalls and the paths of the files."""
    counts = f"{metrics['num_pairs']} of {metrics['num_images']} images and {metrics['num_captions']} captions"
    rows = [("pairs", counts)]
    if metrics["num_unreadable"]:
        rows.append(("unreadable", f"{metrics['num_unreadable']}, listed in {Path(output) / 'bad_inputs.jsonl'}"))
    cli.print_rows([*rows, *describe(metrics), ("metrics", str(Path(output) / "metrics.json"))])


def check_flags(classes: str | None, num_views: int | None) -> None:
    """Refuse flags of `evaluate.py` that mean nothing for pairs.

    Raises:
      UserError: such a flag.
    """
    for flag, value in (("classes", classes), ("num_views", num_views)):
        if value:
            raise UserError(f"--{flag}: --data holds image-text pairs, whose captions are retrieved; leave it out")
