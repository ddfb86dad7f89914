"""Labelled images -> tar shards of image-text pairs, captioned by the templates of prompts."""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_har_jax.data.sources import Source, make_source
from clip_har_jax.errors import UserError
from clip_har_jax.folders import replace_folder
from clip_har_jax.image_formats import sniff
from clip_har_jax.text import DEFAULT_TEMPLATES, make_prompts

SHARD = re.compile(r"\d{5}\.tar")


def write_pairs(
    data: str,
    output: str | Path,
    pairs_per_shard: int = 1000,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    max_pairs: int | None = None,
) -> list[Path]:
    """Write the images of a SPEC, in random order, as shards that `webdataset:` reads; return the shards.

    An image's caption is one of its class's prompts; they take turns. Equal arguments give equal bytes. The folder is
    replaced as a whole, and may hold only shards.

    Args:
      data: the SPEC of the images.
      output: the folder to write to.
      pairs_per_shard: in each shard; the last one may have fewer.
      templates: of the captions; {} is replaced by the phrase of the class.
      max_pairs: write only so many; None: all.

    Raises:
      UserError: data that can't be used, clips, numbers below 1, or other files in the folder.
    """
    for flag, value in (("pairs_per_shard", pairs_per_shard), ("max_pairs", max_pairs)):
        if value is not None and value < 1:
            raise UserError(f"--{flag}={value}: 1 or more is needed")
    if others := [path.name for path in _entries(output) if not SHARD.fullmatch(path.name)]:
        raise UserError(f"--output={output}: holds {others[0]!r}, and the folder would be replaced; name another")
    source = make_source(data, "train")
    if source.clips:
        raise UserError(f"--data={data}: clips; image-text pairs are images, so name images")
    order = np.random.default_rng(0).permutation(len(source))[:max_pairs]
    starts = range(0, len(order), pairs_per_shard)

    def fill(folder: Path) -> None:
        for number, start in enumerate(starts):
            with tarfile.open(folder / _name(number), "w", format=tarfile.PAX_FORMAT) as tar:
                for name, content in _members(source, templates, start, order[start : start + pairs_per_shard]):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    folder = replace_folder(output, fill)
    return [folder / _name(number) for number in range(len(starts))]


def _entries(folder: str | Path) -> list[Path]:
    path = Path(folder)
    return sorted(path.iterdir()) if path.is_dir() else []


def _name(shard: int) -> str:
    return f"{shard:05d}.tar"


def _members(
    source: Source, templates: Sequence[str], start: int, indices: Sequence[int] | np.ndarray
) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of a shard's members."""
    prompts = make_prompts(source.labels, templates)
    for number, index in enumerate(indices, start):
        example = source[int(index)]
        if isinstance(example.data, np.ndarray):
            Image.fromarray(example.data).save(buffer := io.BytesIO(), "PNG")
            image = buffer.getvalue()
        else:
            assert isinstance(example.data, bytes), "the source has no clips"
            image = example.data
        known = sniff(image)
        captions = prompts[source.labels[example.label]]
        yield f"{number:08d}{known.suffixes[0] if known else '.jpg'}", image
        yield f"{number:08d}.txt", captions[number % len(captions)].encode()
