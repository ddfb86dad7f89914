"""The parts of a bulk prediction as Parquet files: each is whole or not there, and says which inputs it holds."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_har_jax.bundle import Actions
from clip_har_jax.errors import UserError
from clip_har_jax.files import atomic, sha256, write_json
from clip_har_jax.inference.backends import above_thresholds
from clip_har_jax.inference.bulk_engine import Outcome, Part

ANOTHER_OUTPUT = "name another --output"


class PartFiles:
    """The files of one shard: `PPPPPP.parquet` in both folders.

    Args:
      folder: for predictions (input, label, score, probs; of a multi-label model also labels).
      bad_folder: for unreadable inputs (input, error).
      actions: of the model.
    """

    def __init__(self, folder: Path, bad_folder: Path, actions: Actions):
        self._folder, self._bad_folder, self._labels = folder, bad_folder, actions.labels
        self._actions = actions
        self.finished = {int(path.stem) for path in folder.glob("*.parquet") if path.stem.isdecimal()}
        bad_folder.mkdir(exist_ok=True)

    def check_same_run(self, about: dict[str, Any]) -> None:
        """Write the facts that all starts must share into about.json, or compare them with the earlier ones.

        Raises:
          UserError: the folder holds predictions of another model or of other inputs.
        """
        path = self._folder / "about.json"
        if not path.is_file():
            write_json(path, about)
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for key, value in about.items():
            # A sealed model may have moved: its digest shows that it is the same.
            if earlier.get(key, value) != value and (key != "model" or about["digest"] is None):
                raise UserError(
                    f"{self._folder}: holds predictions with another {key} ({str(earlier.get(key))[:80]!r}, now "
                    f"{str(value)[:80]!r}); {ANOTHER_OUTPUT}"
                )

    def check(self, part: Part) -> None:
        """Check that a finished part holds these inputs.

        Raises:
          UserError: they have changed.
        """
        written = _metadata(self._folder / _name(part.number))
        count = int(written["count"])
        now = _describe(part.inputs[:count])
        if len(part.inputs) < count or any(written.get(key, value) != value for key, value in now.items()):
            raise self.changed(part.number)
        if len(part.inputs) > count:
            raise UserError(f"{self._folder}: more inputs have come behind the last part; {ANOTHER_OUTPUT} for them")

    def changed(self, number: int) -> UserError:
        """Return the error that the inputs of a finished part are others."""
        return UserError(f"{self._folder}: the inputs have changed since part {number} was written; {ANOTHER_OUTPUT}")

    def count_bad(self, number: int) -> int:
        """Return the number of unreadable inputs of a finished part."""
        path = self._bad_folder / _name(number)
        return pq.read_metadata(path).num_rows if path.is_file() else 0

    def count_errors(self) -> dict[str, int]:
        """Return the number of unreadable inputs of the finished parts by kind: the message without its figures."""
        kinds: Counter[str] = Counter()
        for path in self._bad_folder.glob("*.parquet"):
            if int(path.stem) in self.finished:
                errors = pq.read_table(path, columns=["error"]).column(0).to_pylist()
                kinds.update(re.sub(r"\d+", "N", error.partition(";")[0]) for error in errors)
        return dict(kinds.most_common())

    def write(self, part: Part, outcomes: Sequence[Outcome]) -> None:
        """Write a part's files, the bad inputs first: the file of predictions marks the part as finished.

        Raises:
          UserError: they can't be written.
        """
        rows = [(_text(name), outcome) for name, outcome in zip(part.inputs, outcomes, strict=True)]
        bad = [(name, outcome) for name, outcome in rows if isinstance(outcome, str)]
        good = [(name, outcome) for name, outcome in rows if not isinstance(outcome, str)]
        bad_path = self._bad_folder / _name(part.number)
        if bad:
            _write_table(bad_path, {"input": [n for n, _ in bad], "error": [e for _, e in bad]}, {})
        else:  # a file that was unreadable before a kill can be readable now
            bad_path.unlink(missing_ok=True)
        probs = np.stack([outcome for _, outcome in good]) if good else np.zeros((0, len(self._labels)), np.float32)
        best = probs.argmax(axis=-1)
        columns: dict[str, Any] = {
            "input": [name for name, _ in good],
            "label": [self._labels[i] for i in best],
            "score": probs[np.arange(len(probs)), best].astype(np.float32),
            "probs": pa.FixedSizeListArray.from_arrays(pa.array(probs.astype(np.float32).ravel()), len(self._labels)),
        }
        if self._actions.multi_label:
            given = [[label for label, _ in above_thresholds(row, self._actions)] for row in probs]
            columns["labels"] = pa.array(given, pa.list_(pa.string()))
        about = {"labels": json.dumps(self._labels), "count": str(len(rows)), **_describe(part.inputs)}
        _write_table(self._folder / _name(part.number), columns, about)
        self.finished.add(part.number)


def _name(number: int) -> str:
    return f"{number:06d}.parquet"


def _describe(inputs: Sequence[str]) -> dict[str, str]:
    """Return the facts by which a later start knows that the inputs of a part are the same.

    Parts of earlier versions hold only the first fact.
    """
    names = [_text(name) for name in inputs]
    return {"last_input": names[-1] if names else "", "inputs_sha256": sha256(f"{name}\n" for name in names)}


def _metadata(path: Path) -> dict[str, str]:
    """Return what `_write_table` was given as `about`.

    Raises:
      UserError: not a file that it wrote.
    """
    try:
        metadata = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); remove it, and the part is predicted again") from error
    if not metadata.get("count", "").isdecimal():
        raise UserError(f"{path}: not a part of a bulk prediction; {ANOTHER_OUTPUT}")
    return metadata


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # names may not be UTF-8


def _write_table(path: Path, columns: dict[str, Any], about: dict[str, str]) -> None:
    table = pa.table(
        {
            name: pa.array(values, pa.string()) if name in ("input", "label", "error") else values
            for name, values in columns.items()
        }
    )
    try:
        with atomic(path) as partial:
            pq.write_table(table.replace_schema_metadata(about), partial)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); earlier parts are whole") from error
