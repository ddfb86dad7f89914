"""Image-text pairs in tables: `parquet:PATTERN`, whose row groups are the shards, and `csv:FILE`, whose rows are."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_har_jax.csv_files import list_captions
from clip_har_jax.data.examples import fingerprint_of
from clip_har_jax.data.pairs import END, BadPair, Found, PairReader, make_pair
from clip_har_jax.data.shards import Shard, beside, fault_of, list_shards, open_shard
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.specs import Spec

ROWS_AT_ONCE = 64
FOOTERS_AT_ONCE = 16  # requests; a store answers each within its latency


class ParquetPairs(PairReader):
    """The rows of Parquet files. Images are bytes, a struct with `bytes` as Hugging Face writes it, or paths.

    Raises:
      UserError: no such files, a damaged one, or columns that are missing or of another type.
    """

    def __init__(self, spec: Spec):
        files = list_shards(spec.path, (".parquet",), str(spec))
        self.image, self.caption = spec.options.get("image", "image"), spec.options.get("caption", "caption")
        self.folder = spec.options.get("images", "")
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            counts = list(pool.map(self._count_rows, files))
        self.groups = [
            (file.path, group) for file, rows in zip(files, counts, strict=True) for group in range(len(rows))
        ]
        self.names = [f"{path}, row group {group}" for path, group in self.groups]
        self.num_pairs = sum(map(sum, counts))
        if not self.num_pairs:
            raise UserError(f"{spec}: the files hold no rows; choose others")
        identity = [(file.path.rpartition("/")[2], file.size) for file in files]
        self.fingerprint = fingerprint_of("parquet", self.image, self.caption, identity)

    def _count_rows(self, file: Shard) -> list[int]:
        """Return the number of rows of each row group, once the columns are known to be right."""
        try:
            with open_shard(file.path) as opened:
                found = pq.ParquetFile(opened)
                schema, metadata = found.schema_arrow, found.metadata
        except Exception as error:
            reason = fault_of(error, pa.ArrowException)
            raise UserError(f"{file.path}: not a whole Parquet file ({reason}); copy it again") from error
        for option, name in (("image", self.image), ("caption", self.caption)):
            if name not in schema.names:
                raise UserError(
                    f"{file.path}: no column {name!r}, which ?{option}=COLUMN changes; {nearest(name, schema.names)}"
                )
        if not _is_image(schema.field(self.image).type):
            raise UserError(
                f"{file.path}: the column {self.image!r} holds {schema.field(self.image).type}; bytes, paths, or a "
                "struct with a field bytes are needed"
            )
        if not _is_text(schema.field(self.caption).type):
            raise UserError(
                f"{file.path}: the column {self.caption!r} holds {schema.field(self.caption).type}, not text"
            )
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, shard: int, start: int) -> Iterator[tuple[Found, int]]:
        """Yield the pairs of a row group; a position is a number of rows."""
        path, group = self.groups[shard]
        row = 0
        if start == END:
            return
        try:
            with open_shard(path) as file:
                columns = [self.image, self.caption]
                batches = pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
                for batch in batches:
                    first, row = row, row + batch.num_rows
                    if row <= start:
                        continue
                    images, captions = batch.column(self.image), _as_bytes(batch.column(self.caption))
                    for i in range(max(0, start - first), batch.num_rows):
                        name = f"{self.names[shard]}, row {first + i}"
                        yield self._pair(name, path, images[i].as_py(), captions[i].as_py()), first + i + 1
        except Exception as error:
            reason = fault_of(error, pa.ArrowException)
            yield BadPair(self.names[shard], f"it can't be read after row {row} ({reason}); copy the file again"), END

    def _pair(self, name: str, path: str, image: Any, caption: bytes | None) -> Found:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            place = beside(f"{self.folder}/" if self.folder else path, image)
            try:
                with open_shard(place) as file:
                    image = file.read()
            except Exception as error:
                return BadPair(name, f"{place} can't be read ({fault_of(error)}); say ?images=DIR if it is elsewhere")
        return make_pair(name, image, caption)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _as_bytes(texts: Any) -> Any:
    """Return texts as bytes, since they may not be UTF-8 in spite of their type."""
    return texts.cast(pa.large_binary() if pa.types.is_large_string(texts.type) else pa.binary())


class CsvPairs(PairReader):
    """The rows of a CSV with the columns `filename` and `caption`; each is a shard, so the order is wholly shuffled.

    Raises:
      UserError: as `csv_files.list_captions`.
    """

    def __init__(self, spec: Spec):
        self.where = spec.path
        self.rows = list_captions(spec)
        self.names: Sequence[str] = [str(row.file) for row in self.rows]
        self.num_pairs = len(self.rows)
        self.fingerprint = fingerprint_of("csv", [(row.file.name, row.caption) for row in self.rows])

    def read(self, shard: int, start: int) -> Iterator[tuple[Found, int]]:
        """Yield the pair of a row; the position after it is 1."""
        if start:
            return
        row = self.rows[shard]
        name = f"{self.where}, line {row.line}: {row.file}"
        try:
            yield make_pair(name, row.file.read_bytes(), row.caption), 1
        except OSError as error:
            yield BadPair(name, f"it can't be read ({error.strerror})"), 1
