"""Zero-shot classification with CLIP's own towers, whatever the head of a run."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from clip_har_jax.batch import Batch
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.sources import Source
from clip_har_jax.models.params import Params
from clip_har_jax.trainer.run import Run


class ZeroShot:
    """A classifier whose classes are defined by their prompts.

    Args:
      run: provides the model's shapes, the tokenizer and the mesh.
      labels: the classes; the examples' labels are their positions.
      prompts: the texts of each class.
    """

    def __init__(self, run: Run, labels: Sequence[str], prompts: Mapping[str, Sequence[str]]):
        texts = [text for label in labels for text in prompts[label]]
        self._class_of_prompt = [i for i, label in enumerate(labels) for _ in prompts[label]]
        self._ids, _ = run.base.tokenizer(texts, run.base.config.text.context_length)
        self._text_step = run.program.text_step(len(labels))
        self._run, self._num_classes = run, len(labels)

    def right(self, params: Params, source: Source, bad_inputs: BadInputs) -> Bool[np.ndarray, " n"]:
        """Return which readable examples of a source are classified correctly, in its order.

        Args:
          params: all of the model's parameters, on the mesh.
        """
        program = self._run.program
        prompts = program.place_prompts(self._ids, self._class_of_prompt, self._num_classes)
        classes = np.asarray(jax.device_get(self._text_step(params, *prompts)))

        def step(batch: Batch) -> tuple[jax.Array, Batch]:
            return program.feature_step(params, batch)

        parts, order = [], []
        for batch in self._run.map_batches(step, source, bad_inputs):
            found = (batch.image @ classes.T).argmax(axis=-1) == batch.label
            parts.append(found[batch.mask > 0])
            order.append(batch.index[batch.mask > 0])
        return np.concatenate(parts)[np.argsort(np.concatenate(order), kind="stable")]
