"""The inputs that couldn't be read: counted, logged, and an error if there are too many."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from etils import epath

from clip_har_jax.data.batches import BadInput
from clip_har_jax.data.examples import Source
from clip_har_jax.errors import UserError

MAX_BAD_FRACTION = "config.data.max_bad_fraction"
FEWEST_PAIRS = 1000  # the accepted share of bad pairs is of at least so many
MOST_LOGGED = 10_000  # bad pairs; later ones are only counted


class _Bad:
    """The bad inputs that were seen, each by its key; the length is their number.

    Args:
      log: bad_inputs.jsonl, appended to; None: only count. All sources of a run share one file, also after a resume; an
        input that it contains isn't logged again.
      setting: the name of the accepted share to a person.
    """

    def __init__(self, log: epath.PathLike | None, setting: str):
        self._log, self._setting = None if log is None else epath.Path(log), setting
        self._seen: dict[Any, str] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def _add(self, errors: Mapping[Any, BadInput]) -> None:
        new = {key: error for key, error in errors.items() if key not in self._seen}
        if new and self._log is not None:
            _append(self._log, new.values())
        self._seen |= {key: f"{name}: {reason}" for key, (_, name, reason) in new.items()}

    def _refuse(self, what: str) -> NoReturn:
        listed = f", all so far in {self._log}" if self._log is not None else ""
        first = next(iter(self._seen.values()))
        raise UserError(f"{what} {first}{listed}; mend or remove them, or raise {self._setting}")


class BadInputs(_Bad):
    """The unreadable images of a source, counted once each.

    Args:
      source: the source of the examples.
      max_fraction: accepted share of the source; one image more ends the run.
      log, setting: as of `_Bad`.
    """

    def __init__(
        self, source: Source, max_fraction: float, log: epath.PathLike | None = None, setting: str = MAX_BAD_FRACTION
    ):
        super().__init__(log, setting)
        self._limit, self._size = max_fraction * len(source), len(source)
        self._noun = "clips" if source.clips else "images"

    def record(self, errors: Iterable[BadInput]) -> None:
        """Count and log the errors of a batch.

        Raises:
          UserError: more bad images than the config allows.
        """
        self._add({error[0]: error for error in errors})
        if len(self) > self._limit:
            self._refuse(f"{len(self)} of {self._size} {self._noun} can't be read, the first is")


class BadPairs(_Bad):
    """The image-text pairs that couldn't be read, counted each time, since their number isn't known.

    Args:
      max_fraction: accepted share of the pairs read so far, or of `FEWEST_PAIRS` if these are fewer.
      log, setting: as of `_Bad`.
    """

    def __init__(self, max_fraction: float, log: epath.PathLike | None = None, setting: str = MAX_BAD_FRACTION):
        super().__init__(log, setting)
        self._max_fraction, self._rows, self._bad = max_fraction, 0, 0

    def record(self, errors: Iterable[BadInput], num_rows: int) -> None:
        """Count the rows of a batch, and count and log its errors.

        Raises:
          UserError: more bad pairs than the config allows.
        """
        errors = list(errors)
        self._rows, self._bad = self._rows + num_rows, self._bad + len(errors)
        if len(self) < MOST_LOGGED:
            self._add({error[1]: error for error in errors})
        if self._bad > self._max_fraction * max(self._rows, FEWEST_PAIRS):
            self._refuse(f"{self._bad} of the {self._rows} pairs read so far can't be used, first")


def _append(log: epath.Path, errors: Iterable[BadInput]) -> None:
    """Append errors to a log, without names that it contains."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a killed run may have left a partial line
    logged = {json.loads(line)["input"] for line in whole.splitlines()}
    new = [
        json.dumps({"input": name, "index": index, "error": reason}) + "\n"
        for index, name, reason in errors
        if name not in logged
    ]
    log.write_text(whole + "".join(new))  # rewritten as a whole, since object stores can't append
