"""Image-text pairs of a run: the captions for its tokenizer, their transform, and recall at its end."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np

from clip_har_jax.config import RunConfig
from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.pair_batches import eval_pair_batches
from clip_har_jax.data.pair_rows import PairTransform
from clip_har_jax.data.pair_sources import PairSources
from clip_har_jax.data.pairs import Pair
from clip_har_jax.data.pipeline import ProcessShare
from clip_har_jax.evaluation.retrieval import Embedded, measure_retrieval
from clip_har_jax.models.families import NAMED_SIZES
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import sharding
from clip_har_jax.trainer.run import Run

TOKENIZER_CAPTIONS = 1000


def tokenizer_texts(config: RunConfig, sources: PairSources) -> Sequence[str]:
    """Return captions to train the tokenizer of a named size with; a model folder has its own."""
    if config.model.name not in NAMED_SIZES:
        return ()
    found = islice(sources.each_once(), TOKENIZER_CAPTIONS)
    return [pair.caption for pair in found if isinstance(pair, Pair)]


def pair_transform(run: Run) -> PairTransform:
    length = run.base.config.text.context_length
    return PairTransform(run.config.data, run.base.preprocess, run.base.tokenizer, length)


def measure_recall(run: Run, params: Params) -> dict[str, Any] | None:
    """Return the recall on the pairs of `config.data.retrieval`; None if there are none. All processes call it.

    Args:
      run: the run.
      params: all of the model's parameters, on the mesh.
    """
    if (sources := run.data.retrieval) is None:
        return None
    size = run.config.eval.batch_size
    share = ProcessShare(*sharding.process_shard(run.mesh, size))
    bad_pairs = BadPairs(run.config.data.max_bad_fraction, run.bad_inputs_log)
    rows = sharding.batch_sharding(run.mesh)

    def embedded() -> Iterator[Embedded]:
        for local, pairs in eval_pair_batches(sources, pair_transform(run), size, bad_pairs, share):
            batch = sharding.put_local_rows(local, rows)
            image, rest = run.program.feature_step(params, batch)
            text = run.program.caption_step(params, batch.input_ids)
            image, text, mask = jax.device_get((image, text, rest.mask))
            yield Embedded(image, text, np.asarray(mask) > 0, pairs)

    return measure_retrieval(embedded())
