"""Data on disk for tests of listings, and what is listed of it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from clip_har_jax.csv_files import list_csv
from clip_har_jax.errors import UserError
from clip_har_jax.listing import Tally, list_folder
from clip_har_jax.specs import Spec, parse_spec


def list_files(spec: Spec, split: str, tally: Tally | None = None) -> list[tuple[Path, str]]:
    return list_csv(spec, tally) if spec.kind == "csv" else list_folder(spec, split, tally=tally)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write_csv(path: Path, rows: Sequence[str], header: str = "filename,label") -> str:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return f"csv:{path}"


def listed(spec: str, split: str = "train") -> list[tuple[str, str]]:
    """(path below the last two folders, label) of what a SPEC lists."""
    return [("/".join(path.parts[-3:]), label) for path, label in list_files(parse_spec(spec), split)]


def refusal(spec: str, split: str = "train") -> str:
    with pytest.raises(UserError) as info:
        list_files(parse_spec(spec), split)
    assert "\n" not in str(info.value)
    return str(info.value)
