"""The model folder: actions.json describes its classes; a manifest seals it, so that any change is detected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import read_object, sha256, sha256_file, write_json
from clip_har_jax.signing import SIGNATURE_FILE

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HEADS = ("cosine", "linear", "mlp", "cross_attention", "adapter", "tip_adapter", "frame_attention", "temporal")
THRESHOLDS = ("abstain", "coverage", "split_conformal", "aps")
VIDEO = ("num_frames", "sampling", "rate_hz", "num_views")  # the keys of config.data.video
PREPROCESS = "clip_har_jax.preprocess"  # which prepares images for an exported model


class Sigmoid(NamedTuple):
    """The probability that an image shows an action, from the logit of this action alone (Platt 1999).

    Attributes:
      slope: factor of the logit, which is divided by the temperature; 0 or more.
      bias: added to it.
    """

    slope: float
    bias: float

    def __call__(self, logits: Float[np.ndarray, "*b c"]) -> Float64[np.ndarray, "*b c"]:
        """Return the probability of each class; they needn't add up to 1."""
        return np.exp(-np.logaddexp(0.0, -(self.slope * logits.astype(np.float64) + self.bias)))


@dataclass(frozen=True)
class Actions:
    """The classes of a model folder, and how the model scores them.

    Attributes:
      labels: the classes, in the order of the model's logits.
      prompts: the texts of each class; their mean embedding is the class embedding.
      temperature: divides the logits before the softmax.
      head: the module from image features to logits. "cosine" compares with the class embeddings, so any class names
        can be used. The weights of other heads stand in head.safetensors and fit the trained classes only.
      thresholds: probabilities by the names in `THRESHOLDS`, see `evaluation.calibration`; empty: not calibrated.
      sigmoid: the calibrated sigmoid of a model with a logit bias; None: not calibrated.
      video: the sampling of frames from a clip, by the names in `VIDEO`; empty: trained on images.
      label_thresholds: of a multi-label model, the probability from which on each label is given; its probabilities are
        sigmoids, each by itself. Empty: an image has one label.
      preprocess_version: for an exported model, the `preprocess.PREPROCESS_VERSION` that its images need; None: any.
    """

    labels: tuple[str, ...]
    prompts: dict[str, tuple[str, ...]]
    temperature: float = 1.0
    head: str = "cosine"
    thresholds: dict[str, float] = field(default_factory=dict)
    preprocess_version: int | None = None
    video: dict[str, Any] = field(default_factory=dict)
    sigmoid: Sigmoid | None = None
    label_thresholds: dict[str, float] = field(default_factory=dict)

    @property
    def multi_label(self) -> bool:
        """Return whether an image has any number of labels."""
        return bool(self.label_thresholds)


def write_actions(folder: str | Path, actions: Actions) -> None:
    """Write actions.json."""
    fields = {key: getattr(actions, key) for key in ("labels", "prompts", "temperature", "head")}
    if actions.thresholds:
        fields["thresholds"] = actions.thresholds
    if actions.sigmoid is not None:
        fields["sigmoid"] = actions.sigmoid._asdict()
    if actions.label_thresholds:
        fields["label_thresholds"] = actions.label_thresholds
    if actions.video:
        fields["video"] = actions.video
    if actions.preprocess_version is not None:
        fields["preprocess"] = {"name": PREPROCESS, "version": actions.preprocess_version}
    write_json(Path(folder) / "actions.json", fields)


def has_actions(folder: str | Path) -> bool:
    """Return whether the folder lists its own classes; a plain CLIP folder doesn't."""
    return (Path(folder) / "actions.json").is_file()


def read_actions(folder: str | Path) -> Actions:
    """Read actions.json.

    Raises:
      UserError: the file is missing or not JSON, or a key is missing, unknown or has a wrong value; names file and key.
    """
    path = Path(folder) / "actions.json"
    values = read_object(path)
    fitted = ("temperature", "thresholds", "label_thresholds", "sigmoid")
    known = ("labels", "prompts", "head", "preprocess", "video", *fitted)
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{path}: key {unknown[0]!r} is unknown; {nearest(unknown[0], list(known))}")
    if missing := sorted({"labels", "prompts"} - set(values)):
        raise UserError(f"{path}: key {missing[0]!r} is missing")
    labels = _texts(values["labels"], path, "labels")
    if len(set(labels)) < len(labels):
        raise UserError(f"{path}: key 'labels' holds a label twice")
    prompts = values["prompts"]
    if not isinstance(prompts, dict) or set(prompts) != set(labels):
        raise UserError(f"{path}: key 'prompts' must give the texts of each of the {len(labels)} labels, and no other")
    temperature = values.get("temperature", 1.0)
    if type(temperature) not in (int, float) or not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"{path}: key 'temperature' must be a number above 0, not {temperature!r}")
    head = values.get("head", "cosine")
    if head not in HEADS:
        raise UserError(f"{path}: key 'head' is {head!r}; {nearest(str(head), list(HEADS))}")
    texts = {label: _texts(prompts[label], path, f"prompts.{label}") for label in labels}
    thresholds = _thresholds(values.get("thresholds", {}), path)
    version = _preprocess_version(values.get("preprocess"), path)
    video = _video(values.get("video", {}), path)
    sigmoid = _sigmoid(values.get("sigmoid"), path)
    of_labels = _thresholds(values.get("label_thresholds", {}), path, "label_thresholds", labels)
    if of_labels and set(of_labels) != set(labels):
        lacking = next(label for label in labels if label not in of_labels)
        raise UserError(f"{path}: key 'label_thresholds' lacks the label {lacking!r}")
    return Actions(labels, texts, float(temperature), head, thresholds, version, video, sigmoid, of_labels)


def _video(value: Any, path: Path) -> dict[str, Any]:
    from clip_har_jax.video.sampling import SAMPLING_METHODS

    if not isinstance(value, dict):
        raise UserError(f"{path}: key 'video' is {value!r}; an object is needed")
    for name, given in value.items():
        if name not in VIDEO:
            raise UserError(f"{path}: key 'video.{name}' is unknown; {nearest(name, list(VIDEO))}")
        wanted = given in SAMPLING_METHODS if name == "sampling" else type(given) in (int, float) and given > 0
        if not wanted or (name.startswith("num_") and type(given) is not int):
            raise UserError(f"{path}: key 'video.{name}' is {given!r}; copy the file again")
    return dict(value)


def _thresholds(value: Any, path: Path, key: str = "thresholds", known: Sequence[str] = THRESHOLDS) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: key {key!r} is {value!r}; an object of probabilities is needed")
    for name, threshold in value.items():
        if name not in known:
            raise UserError(f"{path}: key '{key}.{name}' is unknown; {nearest(name, list(known))}")
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise UserError(f"{path}: key '{key}.{name}' must be a probability, not {threshold!r}")
    return {name: float(threshold) for name, threshold in value.items()}


def _sigmoid(value: Any, path: Path) -> Sigmoid | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != set(Sigmoid._fields):
        raise UserError(f"{path}: key 'sigmoid' is {value!r}; an object with slope and bias is needed")
    for name, given in value.items():
        if type(given) not in (int, float) or not math.isfinite(given) or (name == "slope" and given < 0):
            raise UserError(f"{path}: key 'sigmoid.{name}' is {given!r}; calibrate the model again")
    return Sigmoid(float(value["slope"]), float(value["bias"]))


def _preprocess_version(value: Any, path: Path) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("name") != PREPROCESS or type(value.get("version")) is not int:
        raise UserError(f"{path}: key 'preprocess' is {value!r}; the name {PREPROCESS!r} and its version are needed")
    return int(value["version"])


def _texts(value: Any, path: Path, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise UserError(f"{path}: key {key!r} must be a list of texts, none of them empty")
    return tuple(value)


def _sealed_files(folder: Path) -> list[Path]:
    """Return the files under the seal. Hidden ones are left out: other tools create them, and no model needs them."""
    outside = {folder / name for name in (MANIFEST, SIGNATURE_FILE, "README.md")}
    files = [path for path in folder.rglob("*") if path.is_file() and path not in outside]
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in _sealed_files(folder):
        hashes[path.relative_to(folder).as_posix()] = sha256_file(path)
    return hashes


def _digest(hashes: dict[str, str]) -> str:
    listing = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return sha256(listing)


def seal(folder: str | Path, source: str | None = None) -> str:
    """Write manifest.json over all files except README.md, and return the digest of the whole folder.

    Args:
      folder: the folder to seal.
      source: the digest of the model folder from which this one was exported.

    Raises:
      UserError: the folder is sealed already. To change a model, write a new folder.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: sealed already; write a new folder instead of changing this one")
    hashes = _hashes(folder)
    digest = _digest(hashes)
    manifest = {"format_version": FORMAT_VERSION, "files": hashes, "digest": digest}
    write_json(folder / MANIFEST, manifest | ({"source": source} if source else {}))
    return digest


def verify(folder: str | Path) -> str | None:
    """Check a folder against its manifest.

    Returns:
      The digest; None if there is no manifest, as in a plain Hugging Face folder.

    Raises:
      UserError: a file was changed, removed or added, or the manifest is damaged; names the file.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    manifest = read_object(path)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; update it")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise UserError(f"{path}: key 'files' is damaged; copy the folder again")
    found = _hashes(Path(folder))
    for what, names in (
        ("missing", set(files) - set(found)),
        ("not part of the sealed model", set(found) - set(files)),
        ("changed since the model was sealed", {name for name in found if files.get(name) != found[name]}),
    ):
        if names:
            raise UserError(f"{folder}: {', '.join(sorted(names))}: {what}; copy the folder again")
    if manifest.get("digest") != _digest(found):
        raise UserError(f"{path}: key 'digest' doesn't fit the files; copy the folder again")
    return _digest(found)
