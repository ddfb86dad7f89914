"""Cached shards: images resized once and stored in ArrayRecord files with random access."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clip_har_jax.data.manifest import Manifest
from clip_har_jax.data.workers import map_in_workers
from clip_har_jax.errors import UserError
from clip_har_jax.image_files import decode

JPEG_QUALITY = 95
SHARD_BYTES = 256 * 2**20


def make_small(data: bytes, side_px: int) -> bytes:
    """Return an image as a JPEG whose shorter side is `side_px`; unchanged if it isn't larger."""
    image = Image.fromarray(decode(data))
    scale = side_px / min(image.size)
    if scale >= 1:
        return data
    size = (max(side_px, round(image.width * scale)), max(side_px, round(image.height * scale)))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _make_small(job: tuple[Sequence[str], int], i: int) -> bytes:
    paths, side_px = job
    return make_small(Path(paths[i]).read_bytes(), side_px)


def write_cache(manifest: Manifest, folder: Path, side_px: int, num_workers: int | None) -> None:
    """Write the shards of each split in the manifest's order, and about.json with the manifest's digest."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.array_record"):
        old.unlink()
    (folder / "about.json").unlink(missing_ok=True)
    shards: dict[str, list[str]] = {}
    splits = manifest.column("split")
    for split in sorted(set(splits) - {"excluded"}):
        paths = [
            str(manifest.root / path) for path, of in zip(manifest.column("path"), splits, strict=True) if of == split
        ]
        writer, written = None, 0
        for record in map_in_workers(_make_small, (paths, side_px), len(paths), num_workers, f"caching {split}"):
            if writer is None or written > SHARD_BYTES:
                if writer is not None:
                    writer.close()
                name = f"{split}-{len(shards.setdefault(split, [])):05d}.array_record"
                shards[split].append(name)
                writer, written = ArrayRecordWriter(str(folder / name), "group_size:1"), 0
            writer.write(record)
            written += len(record)
        if writer is not None:
            writer.close()
    about = {"manifest_sha256": manifest.digest, "side_px": side_px, "shards": shards}
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


class CachedRecords:
    """The records of a split with random access. Files are opened at first use, so it can be sent to a worker.

    Raises:
      UserError: no such cache, or a cache of another manifest.
    """

    def __init__(self, folder: Path, split: str, digest: str):
        path = folder / "about.json"
        if not path.is_file():
            raise UserError(f"{folder}: no cache in it; prepare_data.py --cache_px=N writes one beside the manifest")
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["manifest_sha256"] != digest:
            raise UserError(f"{folder}: was made from another manifest; run prepare_data.py with --cache_px again")
        self.files = [str(folder / name) for name in about["shards"].get(split, [])]
        self._records: Any = None

    def __getitem__(self, i: int) -> bytes:
        if self._records is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._records = ArrayRecordDataSource(self.files)
        return self._records[i]

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_records": None}
