"""A source under the classes of a model, by whose names or phrases its labels are found."""

from collections.abc import Sequence

import numpy as np

from clip_har_jax.data.examples import Example, Source
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.text import phrase


class ClassedSource(Source):
    """A source with a model's classes; it stores the names of read examples until they are taken.

    Raises:
      UserError: an example's label isn't one of the classes.
    """

    def __init__(self, source: Source, classes: Sequence[str], where: str):
        self.labels, self.fingerprint = tuple(classes), source.fingerprint
        matched = _match_labels(source, classes, where)
        if source.targets is None:
            self.label_ids = matched[source.label_ids]
        else:
            self.targets = np.zeros((len(source), len(self.labels)), bool)
            for k in np.flatnonzero(matched >= 0):
                self.targets[:, matched[k]] |= source.targets[:, k]  # two labels of the data can mean one class
        self.names: dict[int, str] = {}
        self.source = source
        self.clips, self.tally, self.manifest_sha256 = source.clips, source.tally, source.manifest_sha256

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        self.names[i] = example.name.encode(errors="backslashreplace").decode()  # names may not be UTF-8
        return example._replace(label=self.label_of(i))

    def take_name(self, i: int) -> str:
        """Return the name of a read example and forget it, so that memory stays bounded."""
        return self.names.pop(i)

    def find_name(self, i: int) -> str:
        """Return the name of an example by reading it again."""
        return self[i].name.encode(errors="backslashreplace").decode()

    def name(self, i: int) -> str:
        return self.source.name(i)


def _match_labels(source: Source, classes: Sequence[str], where: str) -> np.ndarray:
    """Return the class of each label of the source, by equal names or phrases; -1 for labels without examples."""
    by_name = {label: i for i, label in enumerate(classes)}
    by_phrase = {phrase(label): i for i, label in enumerate(classes)}
    counts = source.class_counts
    matched = [by_name.get(label, by_phrase.get(phrase(label), -1)) for label in source.labels]
    for label, count, match in zip(source.labels, counts, matched, strict=True):
        if count and match < 0:
            raise UserError(
                f"--data={where}: label {label!r} ({count} images) is none of the {len(classes)} classes; "
                f"{nearest(label, list(classes))}"
            )
    return np.asarray(matched, np.int32)
