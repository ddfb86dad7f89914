"""SPEC -> image-text pairs: the readers of one or several SPECs, mixed by weight."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clip_har_jax.csv_files import has_column
from clip_har_jax.data.pair_tables import CsvPairs, ParquetPairs
from clip_har_jax.data.pairs import Found, PairReader
from clip_har_jax.data.webdataset import WebDataset
from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256
from clip_har_jax.listing import Tally
from clip_har_jax.specs import PAIRS, Spec, parse_spec

READERS: dict[str, Callable[[Spec], PairReader]] = {
    "webdataset": WebDataset,
    "parquet": ParquetPairs,
    "csv": CsvPairs,
}
BOUNDARY = re.compile(rf"::(?=(?:{'|'.join(READERS)}):)")  # between several SPECs, as in webdataset's own lists


@dataclass(frozen=True)
class PairSources:
    """The pairs of one or several SPECs, which are mixed by weight.

    Attributes:
      readers: one for each SPEC.
      weights: the share of the pairs that each one gives; they sum to 1.
    """

    readers: tuple[PairReader, ...]
    weights: tuple[float, ...]
    clips = False
    manifest_sha256 = None

    @property
    def num_examples(self) -> int | None:
        """The number of pairs; None: not known before all are read."""
        counts = [reader.num_pairs for reader in self.readers]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def num_shards(self) -> int:
        return sum(len(reader.names) for reader in self.readers)

    @property
    def fingerprint(self) -> str:
        return sha256(
            repr([(reader.fingerprint, weight) for reader, weight in zip(self.readers, self.weights, strict=True)])
        )

    @property
    def order_digest(self) -> str:
        """SHA-256 over the shards' names, without folders: while it stays, a position in them keeps its meaning."""
        names = [[name.rpartition("/")[2] for name in reader.names] for reader in self.readers]
        return sha256(repr((names, self.weights)))

    @property
    def tally(self) -> Tally:
        return Tally(self.num_examples or 0)

    def each_once(self) -> Iterator[Found]:
        """Yield all pairs in the order of the SPECs and their shards."""
        for reader in self.readers:
            for shard in range(len(reader.names)):
                yield from (found for found, _ in reader.read(shard, 0))


def has_pairs(text: str) -> bool:
    """Return whether a SPEC means image-text pairs: shards, Parquet, or a CSV with captions and no labels.

    Reads at most the first line of a table.
    """
    spec = parse_spec(BOUNDARY.split(text)[0])
    if spec.kind != "csv":
        return spec.kind in PAIRS and "label" not in spec.options
    return "caption" in spec.options or (has_column(spec.path, "caption") and not has_column(spec.path, "label"))


def make_pair_sources(text: str) -> PairSources:
    """Return the pairs of a SPEC, or of several that are joined by `::`, each with its `weight` (default 1).

    Raises:
      UserError: a SPEC that holds no pairs or can't be used; says what to do.
    """
    specs = [parse_spec(part) for part in BOUNDARY.split(text)]
    for spec in specs:
        if spec.kind not in READERS:
            raise UserError(f"{spec}: not image-text pairs; use webdataset:PATTERN, parquet:PATTERN or csv:FILE")
        if "label" in spec.options:
            raise UserError(f"{spec}: labelled images, not image-text pairs; name the column of captions, not label")
    weights = [_weight(spec) for spec in specs]
    readers = tuple(READERS[spec.kind](spec) for spec in specs)
    return PairSources(readers, tuple(weight / sum(weights) for weight in weights))


def _weight(spec: Spec) -> float:
    text = spec.options.get("weight", "1")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{spec}: weight must be a number above 0, not {text!r}")
    return weight
