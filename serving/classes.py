"""Classes given as text: their embeddings, checks, and files that store changes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clip_har_jax.bundle import Sigmoid
from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json
from clip_har_jax.names import check_text, name_key
from clip_har_jax.text import make_prompts, phrase
from serving.problems import Problem
from serving.telemetry import log

Prompts = tuple[str, ...]


@dataclass(frozen=True)
class TextClasses:
    """Classes given as text, with their embeddings; logits are scaled cosines."""

    prompts: dict[str, Prompts]  # label -> its texts
    embeddings: np.ndarray  # [c, d], L2-normalised
    scale: float
    sigmoid: Sigmoid | None  # from these logits to the probability of each class alone

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in the order of the logits."""
        return tuple(self.prompts)

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the logits of image embeddings: [c] for one, [n, c] for several."""
        return self.scale * embeddings @ self.embeddings.T


def check_labels(labels: Sequence[str], code: str = "invalid_request") -> None:
    """Refuse classes that a model can't tell apart.

    Raises:
      Problem: fewer than two, or two with the same phrase.
    """
    if len(labels) < 2:
        raise Problem(code, f"classes: two or more are needed, not {len(labels)}")
    said = [name_key(phrase(label)) for label in labels]
    if twice := [label for label, key in zip(labels, said, strict=True) if said.count(key) > 1]:
        raise Problem(code, f"classes: {' and '.join(map(repr, twice[:2]))} mean the same; leave one out")


def checked_prompts(given: Mapping[str, Sequence[str]]) -> dict[str, Prompts]:
    """Return the texts of each label: the given ones, else the default prompts.

    Raises:
      Problem: a label without words, or with a control character.
    """
    for label in given:
        try:
            check_text(label, "classes")
        except UserError as error:
            raise Problem("invalid_request", str(error)) from error
    if empty := [label for label in given if not phrase(label).strip()]:
        raise Problem("invalid_request", f"classes: {empty[0]!r} has no words")
    usual = make_prompts(list(given))
    return {label: tuple(texts) or usual[label] for label, texts in given.items()}


class _Kept(BaseModel):
    """The file of a change: its model, its number, and the resulting classes."""

    model_config = ConfigDict(extra="forbid")

    digest: str
    changes: int = Field(ge=1)
    classes: dict[str, list[str]] = Field(min_length=2)


class KeptClasses:
    """Changes of classes, one file per model name and digest; without a folder, they aren't stored.

    Args:
      folder: of the files.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def _path(self, name: str, digest: str | None) -> Path | None:
        return self._folder / f"{name}-{digest[:16]}.json" if self._folder is not None and digest is not None else None

    def read(self, name: str, digest: str | None) -> tuple[dict[str, Prompts], int] | None:
        """Return the changed classes of a model, and the number of changes; None: unchanged.

        Raises:
          UserError: the file can't be used.
        """
        path = self._path(name, digest)
        if path is None or not path.is_file():
            return None
        try:
            kept = _Kept.model_validate_json(path.read_bytes())
            check_labels(list(kept.classes))
        except (OSError, ValidationError, Problem) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: the kept change of classes is damaged ({reason}); delete or mend it") from error
        if kept.digest != digest or not all(kept.classes.values()):
            raise UserError(f"{path}: the kept change of classes is of another model; delete it")
        return {label: tuple(texts) for label, texts in kept.classes.items()}, kept.changes

    def write(self, name: str, digest: str | None, classes: TextClasses, changes: int) -> None:
        """Store a change atomically.

        Raises:
          Problem: it can't be written.
        """
        path = self._path(name, digest)
        if path is None:
            if self._folder is not None:
                log.warning("a change of classes isn't kept: the model isn't sealed", extra={"fields": {"model": name}})
            return
        value: dict[str, Any] = {"digest": digest, "changes": changes, "classes": classes.prompts}
        try:
            write_json(path, value)
        except OSError as error:
            raise Problem("internal", f"the change can't be kept in state_dir ({error.strerror})") from error

    def forget(self, name: str, digest: str | None) -> None:
        """Delete the stored changes of a model.

        Raises:
          Problem: it can't be deleted.
        """
        path = self._path(name, digest)
        try:
            if path is not None:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise Problem("internal", f"the change can't be deleted in state_dir ({error.strerror})") from error
