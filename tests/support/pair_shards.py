"""Small shards of image-text pairs, written with tarfile, as a person would."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.sources import encoded

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair_members(numbers: Sequence[int]) -> list[Member]:
    """Return the members of pairs whose image and caption tell their number."""
    return [
        member
        for i in numbers
        for member in ((f"{i:06d}.png", encoded(i % 256)), (f"{i:06d}.txt", f"picture {i}".encode()))
    ]


def write_shards(folder: Path, sizes: Sequence[int]) -> str:
    """Write numbered pairs, so many in each shard; return the SPEC."""
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(folder / f"{shard:03d}.tar", pair_members(range(first, first + size)))
        first += size
    return (
        f"webdataset:{folder}/{{000..{len(sizes) - 1:03d}}}.tar" if len(sizes) > 1 else f"webdataset:{folder}/000.tar"
    )


def write_parquet(path: Path, rows: Sequence[tuple[Any, str | None]], kind: pa.DataType) -> str:
    """Write images and captions in row groups of two; return the SPEC."""
    images, texts = zip(*rows, strict=True)
    table = pa.table({"image": pa.array(images, kind), "caption": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=2)
    return f"parquet:{path}"
