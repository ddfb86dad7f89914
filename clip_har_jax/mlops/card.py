"""The model card for the Hub: what the model does, how it was made, and its limits."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.baselines import verdict, zero_shot_on
from clip_har_jax.files import read_object

LICENSE = "apache-2.0"
DRAWINGS = "drawings made by a program"
# Kind of a SPEC -> its pictures.
KINDS = {"synthetic": DRAWINGS, "motion": DRAWINGS, "people": DRAWINGS, "video": "video clips"}
SECTIONS = ("## Results", "## Data", "## Limits", "## Use", "## Where it comes from")
METRICS = (("top1", "accuracy", "top-1"), ("top5", "accuracy", "top-5"), ("macro_f1", "f1", "macro F1"))


def make_card(model: Path, metrics: Mapping[str, Any] | None, name: str, license: str = LICENSE) -> str:
    """Return README.md of a sealed model folder.

    Args:
      model: the folder.
      metrics: metrics.json of its evaluation; None: the card says that there is none.
      name: the name on the Hub, OWNER/NAME, or any other name.
      license: an identifier of the Hub's list.

    Raises:
      UserError: the folder isn't sealed or was changed, or the metrics are of another model.
    """
    digest = bundle.verify(model)
    if digest is None:
        raise UserError(f"--model={model}: not sealed; a card is of what a run left in model/")
    if metrics is not None and metrics.get("model_digest") != digest:
        raise UserError(f"the metrics are of the model {str(metrics.get('model_digest'))[:12]}, not of {digest[:12]}")
    actions = bundle.read_actions(model)
    record = read_object(model / "run.json") if (model / "run.json").is_file() else {}
    data = ModelCardData(
        license=license,
        library_name="clip_har_jax",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "jax", "action-recognition", "human-action-recognition"],
        model_name=name,
        eval_results=_results(metrics) if metrics else None,
        ignore_metadata_errors=False,
    )
    body = "\n\n".join(
        (
            f"# {name}",
            _summary(len(actions.labels), record),
            "## Results",
            _table_of(metrics, record) if metrics else "Not evaluated yet.",
            "## Data",
            _data(record),
            "## Limits",
            _limits(actions.labels, record),
            "## Use",
            _use(name),
            "## Where it comes from",
            _provenance(digest, record),
        )
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def check_card(text: str) -> None:
    """Check a card without the Hub: parse its metadata and look for each section.

    Raises:
      UserError: names what is missing or can't be parsed.
    """
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"the card's metadata can't be read: {str(error).splitlines()[0]}") from error
    if missing := [key for key in ("license", "pipeline_tag", "library_name") if not data.get(key)]:
        raise UserError(f"the card's metadata lacks {', '.join(missing)}")
    if missing := [section for section in SECTIONS if f"\n{section}\n" not in text]:
        raise UserError(f"the card lacks {', '.join(missing)}")


def _public(spec: str) -> str:
    """Return a SPEC without local folders of the machine where it was used."""
    kind, colon, place = spec.partition(":")
    return f"{kind}:{_public_path(place)}" if colon else spec


def _public_path(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place


def _results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    spec = _public(str(metrics.get("data", "unknown")))
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=spec.split(":")[0].split("?")[0],
            dataset_name=spec,
            metric_type=kind,
            metric_name=title,
            metric_value=round(metrics[key], 4),
        )
        for key, kind, title in METRICS
        if key in metrics
    ]


def _pictures(record: Mapping[str, Any]) -> str:
    """Return the kind of pictures that the model was trained on, as far as the data's SPEC says it."""
    kind = str(record.get("data", {}).get("train", {}).get("spec", "")).split(":")[0].split("?")[0]
    return KINDS.get(kind, "images")


def _summary(num_actions: int, record: Mapping[str, Any]) -> str:
    """Return a sentence on the model's actions and its training."""
    start, method = record.get("start", {}), record.get("method")
    made = f"A CLIP that tells {num_actions} human actions apart in {_pictures(record)}, trained with clip_har_jax"
    if not start:
        return f"{made}. What it started from isn't recorded."
    name = f"`{_public_path(str(start['model']))}`"
    if start["weights"] == "random":
        return f"{made} from random weights (model size {name}): nothing pretrained is in it."
    return f"{made} from the pretrained weights of {name}" + (f", by the method `{method}`." if method else ".")


def _table_of(metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    rows = [f"| {title} | {metrics[key]:.3f} |" for key, _, title in METRICS if key in metrics]
    rows += [f"| {key.upper()} | {metrics[key]:.3f} |" for key in ("nll", "ece") if key in metrics]
    of = f"On {metrics['num_examples']} examples of `{_public(metrics.get('data', 'unnamed data'))}`"
    worst = sorted(metrics["per_class"].items(), key=lambda item: item[1]["f1"])[:3]
    told = ", ".join(f"{_plain(label)} (F1 {values['f1']:.2f})" for label, values in worst)
    lines = [f"{of}:", "", "| metric | value |", "|---|---|", *rows, ""]
    if "baselines" in metrics:
        lines += [verdict(metrics, zero_shot_on(record, str(metrics.get("data")))), ""]
    return "\n".join([*lines, f"The actions with the lowest F1: {told}."])


def _data(record: Mapping[str, Any]) -> str:
    if not record:
        return "Not recorded."
    parts = [
        f"- {split}: {part['num_examples']} images of `{_public(part['spec'])}`, "
        f"fingerprint `{part['fingerprint'][:16]}`"
        for split, part in record["data"].items()
    ]
    return "\n".join(parts)


def _plain(label: str) -> str:
    """Return a label as Markdown that shows it unchanged, even if it is HTML or a link."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(label, quote=False))


def _limits(labels: tuple[str, ...], record: Mapping[str, Any]) -> str:
    drawn = _pictures(record) == DRAWINGS
    only = "It has seen drawings alone: don't use it on pictures of real people. " if drawn else ""
    return (
        f"{only}"
        "It answers with one of these actions, also for a picture that shows none of them: "
        f"{', '.join(map(_plain, labels))}. "
        "Figures hold for pictures like those that it was evaluated on; on others, measure again. "
        "It tells what people seem to do, not who they are, and mustn't decide anything about a person on its own."
    )


def _use(name: str) -> str:
    return f"""With clip_har_jax:

```sh
python scripts/predict.py --model={name} image.jpg
```

With transformers, as any CLIP (without the temperature and the prompts' average, which stand in `actions.json`):

```python
import json
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("{name}"), CLIPProcessor.from_pretrained("{name}")
actions = json.load(open(hf_hub_download("{name}", "actions.json")))
texts = [actions["prompts"][label][0] for label in actions["labels"]]
inputs = processor(text=texts, images=Image.open("image.jpg"), return_tensors="pt", padding=True)
print(actions["labels"][model(**inputs).logits_per_image.argmax().item()])
```"""


def _provenance(digest: str, record: Mapping[str, Any]) -> str:
    rows = {"digest": digest} | {key: record.get(key) for key in ("run_id", "git_sha", "config_hash", "lock_hash")}
    lines = [f"| {key} | `{value}` |" for key, value in rows.items() if value is not None]
    if record.get("git_dirty"):
        lines.append("| work tree | had changes that no commit holds |")
    return "\n".join(("| what | value |", "|---|---|", *lines))
