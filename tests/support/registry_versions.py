"""Folders that a registry takes as a version, without a graph in the export."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from clip_har_jax import bundle
from clip_har_jax.files import write_json
from tests.support.model_folders import write_model

LABELS = ("cycling", "running", "sleeping")


def make_version(root, temperature, right, fingerprint="abc", parity=True, num_examples=200):
    """Return a model, an exported folder and an evaluation with so many right answers; no graph is in the export."""
    model = write_model(root / "model", LABELS, temperature)
    digest = json.loads((model / "manifest.json").read_text())["digest"]
    export = root / "export"
    export.mkdir()
    (export / "actions.json").write_text((model / "actions.json").read_text())
    write_json(export / "parity.json", {"onnx": {"passed": parity}})
    bundle.seal(export, digest)
    evaluation = root / "evaluation"
    evaluation.mkdir()
    predicted = [LABELS[0] if i < right else LABELS[1] for i in range(num_examples)]
    names = [f"{i}.jpg" for i in range(num_examples)]
    table = pa.table({"input": names, "label": [LABELS[0]] * num_examples, "predicted": predicted})
    pq.write_table(table, evaluation / "predictions.parquet")
    metrics = {"top1": right / num_examples, "model_digest": digest, "data_fingerprint": fingerprint}
    write_json(evaluation / "metrics.json", metrics)
    return {"model": model, "export": export, "evaluation": evaluation}
