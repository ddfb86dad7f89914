"""Evaluation of a run's weights on its validation data."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool

from clip_har_jax.batch import Batch
from clip_har_jax.evaluation.evaluator import evaluate
from clip_har_jax.evaluation.multi_label import MultiLabelResult, evaluate_multi_label
from clip_har_jax.evaluation.result import EvalResult
from clip_har_jax.files import write_json
from clip_har_jax.models.params import Params
from clip_har_jax.parallel import distributed
from clip_har_jax.trainer.run import Run
from clip_har_jax.training.methods import ClassInputs
from clip_har_jax.training.state import TrainState

METRICS = ("top1", "top5", "macro_f1", "nll", "ece")  # in metrics.jsonl, with the prefix val/
MULTI_LABEL_METRICS = ("map", "map_micro", "coverage_error", "nll", "label_ece")


class Validation:
    """The evaluator of a run's weights.

    Args:
      run: the run, with its validation data.
      frozen: the parameters that no step updates, on the mesh.
    """

    def __init__(self, run: Run, frozen: Params):
        self.run, self.frozen, self.prompts = run, frozen, run.place_prompts()
        self._constant: ClassInputs | None = None

    @property
    def data_name(self) -> str:
        """The name of the validation data in reports."""
        return self.run.config.data.val or "held out"

    def classes(self, weights: Params) -> ClassInputs:
        """Return the class embeddings of these weights; computed only once if no step changes them."""
        if self._constant is not None:
            return self._constant
        program = self.run.program
        classes = ClassInputs(None, None, program.class_step(weights | self.frozen, self.prompts))
        if not program.trains_text:
            self._constant = classes
        return classes

    def evaluate(self, weights: Params) -> EvalResult:
        """Return the result of trainable parameters on the mesh."""
        return evaluate(lambda batch: batch.image, self._logits(weights), self.run.data.labels)

    def evaluate_multi_label(self, weights: Params, resamples: int = 0) -> MultiLabelResult:
        """Return the result on multi-label data, with thresholds fitted to it.

        Args:
          weights: trainable parameters on the mesh.
          resamples: of the bootstrap intervals; 0: none.
        """
        labels = self.run.data.labels
        return evaluate_multi_label(lambda batch: batch.image, self._logits(weights), labels, None, resamples)

    def _logits(self, weights: Params) -> Iterator[Batch]:
        """Yield the validation batches with class logits in place of the images."""
        program, classes = self.run.program, self.classes(weights)

        def logits(batch: Batch) -> tuple[jax.Array, Batch]:
            return program.eval_step(weights, self.frozen, classes, batch)

        return self.run.map_batches(logits, self.run.data.val, self.run.bad_inputs["val"])

    def validate(self, state: TrainState) -> dict[str, float]:
        """Return the main metrics of a state, and write all of them to eval/<step>/metrics.json."""
        if self.run.config.data.multi_label:
            metrics, names = self.evaluate_multi_label(state.weights).metrics, MULTI_LABEL_METRICS
        else:
            metrics, names = self.evaluate(state.weights).metrics, METRICS
        if distributed.is_main():
            folder = self.run.workdir / "eval" / str(int(jax.device_get(state.step)))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "metrics.json", metrics)
        return {f"val/{name}": metrics[name] for name in names}


def is_right(result: EvalResult) -> Bool[np.ndarray, " n"]:
    """Return which of the examples were predicted correctly."""
    return result.scores.rank == 0
