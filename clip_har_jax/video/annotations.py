"""Annotations with times: the actions in videos, with start and end.

Two layouts are read. A table has the columns `filename,start_s,end_s,label`, with one row per action and any number per
video; a row labelled `background`, or without a label, says that no action happens. ActivityNet's JSON has
`{"database": {ID: {"subset", "duration", "annotations": [{"segment": [start, end], "label"}]}}}`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_har_jax.csv_files import read_table
from clip_har_jax.errors import UserError
from clip_har_jax.listing import VIDEO_SUFFIXES, Tally
from clip_har_jax.names import clean_name
from clip_har_jax.specs import Spec, find_split
from clip_har_jax.video.clips import video_duration
from clip_har_jax.video.decoding import BadVideo
from clip_har_jax.video.segments import BACKGROUND, Segment

COLUMNS = ("filename", "start_s", "end_s", "label")
SUBSETS = {"training": "train", "validation": "val", "testing": "test"}  # ActivityNet's names
ROUNDING_S = 0.1  # a segment may end this much after its video without a note, as durations are rounded


@dataclass(frozen=True)
class AnnotatedVideo:
    """A video file and its actions.

    Attributes:
      path: of the file.
      duration_s: of the video.
      segments: the actions, in the order of their starts; those of one class don't overlap.
    """

    path: Path
    duration_s: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class _Row:
    """An annotation as written; `where` names its line or entry."""

    video: str
    segment: Segment
    where: str


def read_annotations(spec: Spec, split: str, tally: Tally | None = None) -> list[AnnotatedVideo]:
    """Return the videos of a table or an ActivityNet JSON, sorted by name.

    Files lie in `?videos=DIR`, or else beside the annotations or in the folder of their name. A segment that ends after
    its video is cut; overlapping segments of one class are merged. Both are noted in the tally.

    Args:
      spec: its path is the annotations' file. With `?missing=skip`, missing videos are left out.
      split: train, val or test, if the annotations have splits (a column `split`, or ActivityNet's subsets).
      tally: records what is kept, left out and changed.

    Raises:
      UserError: not annotations, an end that isn't after its start, a start outside the video, or a missing video;
        names the line or entry.
    """
    tally = Tally() if tally is None else tally
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of {spec}")
    rows, durations = (_read_json if path.suffix.lower() == ".json" else _read_csv)(path, spec, split)
    by_video: dict[str, list[_Row]] = {video: [] for video in durations}
    for row in rows:
        by_video[row.video].append(row)
    files = _find_videos(path, spec, list(by_video), tally)
    videos = [
        _annotated(files[video], by_video[video], durations[video], tally)
        for video in sorted(by_video)
        if video in files
    ]
    tally.kept = len(videos)
    if not videos:
        raise UserError(f"{spec}: no videos of this split in it; choose another ?split=NAME")
    return videos


def _annotated(file: Path, rows: Sequence[_Row], duration_s: float | None, tally: Tally) -> AnnotatedVideo:
    """Check the segments of a video against its duration, and merge overlapping ones of a class."""
    if duration_s is None:
        try:
            duration_s = video_duration(file)
        except BadVideo:  # reported when the file is read, like any unreadable file
            duration_s = max((row.segment.end_s for row in rows), default=0.0)
    kept: dict[str, list[Segment]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.segment):
        segment = row.segment
        if segment.start_s >= duration_s:
            raise UserError(
                f"{row.where}: {segment.label!r} starts at {segment.start_s:g} s, but {file.name} ends at "
                f"{duration_s:.1f} s; correct the times"
            )
        if segment.end_s > duration_s:
            if segment.end_s > duration_s + ROUNDING_S:
                tally.notes.append(
                    f"{row.where}: {segment.label!r} ends at {segment.end_s:g} s, behind the end of {file.name} at "
                    f"{duration_s:.1f} s; it is taken to end there"
                )
            segment = segment._replace(end_s=duration_s)
        before = kept[segment.label]
        if before and segment.start_s < before[-1].end_s:
            tally.notes.append(f"{row.where}: {segment.label!r} overlaps another segment of its class; they are one")
            before[-1] = before[-1]._replace(end_s=max(before[-1].end_s, segment.end_s))
        else:
            before.append(segment)
    segments = sorted(segment for label, ones in kept.items() if label != BACKGROUND for segment in ones)
    return AnnotatedVideo(file, duration_s, tuple(segments))


def _segment(start: Any, end: Any, label: str, where: str) -> Segment:
    """Return an annotation's segment.

    Raises:
      UserError: times that aren't numbers, a start below 0, or an end that isn't after the start.
    """
    try:
        start_s, end_s = float(start), float(end)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {start!r} to {end!r} aren't times in seconds; write numbers") from None
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s >= 0):
        raise UserError(f"{where}: {start_s:g} to {end_s:g} s lies outside the video; times begin at 0")
    if end_s <= start_s:
        raise UserError(f"{where}: the end, {end_s:g} s, isn't behind the start, {start_s:g} s; correct the times")
    return Segment(start_s, end_s, clean_name(label, where) if label else BACKGROUND)


def _read_csv(path: Path, spec: Spec, split: str) -> tuple[list[_Row], dict[str, float | None]]:
    """Return the rows of a table and its videos, without durations."""
    table = read_table(path, COLUMNS, ("split",))
    splits = sorted({row["split"] for _, row in table if row.get("split")})
    if splits or "split" in spec.options:
        wanted = _chosen(spec, split, splits)
        table = [(line, row) for line, row in table if row.get("split") == wanted]
    rows = []
    for line, row in table:
        where = f"{path}, line {line}"
        if not row["filename"]:
            raise UserError(f"{where}: no filename; fill it in")
        rows.append(_Row(row["filename"], _segment(row["start_s"], row["end_s"], row["label"], where), where))
    return rows, {row.video: None for row in rows}


def _chosen(spec: Spec, split: str, available: Sequence[str]) -> str:
    exactly = "split" in spec.options
    wanted = spec.options.get("split", split)
    found = find_split(wanted, available, exactly)
    if found is None:
        raise UserError(f"{spec}: no split {wanted!r}; it has {', '.join(map(repr, available)) or 'none'}")
    return found


def _read_json(path: Path, spec: Spec, split: str) -> tuple[list[_Row], dict[str, float | None]]:
    """Return the annotations of ActivityNet's layout, and the videos' durations."""
    try:
        database = json.loads(path.read_text(encoding="utf-8"))["database"]
        entries = {str(name): dict(entry) for name, entry in database.items()}
        subsets = {name: str(entry["subset"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not ActivityNet's layout ({type(error).__name__}: {error}); write "
            '{"database": {ID: {"subset", "duration", "annotations"}}}'
        ) from error
    names = {SUBSETS.get(subset, subset): subset for subset in sorted(set(subsets.values()))}
    wanted = names[_chosen(spec, split, list(names))]
    rows: list[_Row] = []
    durations: dict[str, float | None] = {}
    for name, entry in entries.items():
        if subsets[name] != wanted:
            continue
        durations[name] = float(entry["duration"]) if entry.get("duration") else None
        for i, annotation in enumerate(entry.get("annotations") or ()):
            where = f"{path}, {name}, annotation {i}"
            try:
                (start, end), label = annotation["segment"], str(annotation["label"])
            except (KeyError, TypeError, ValueError):
                raise UserError(f'{where}: write {{"segment": [start, end], "label": NAME}}') from None
            rows.append(_Row(name, _segment(start, end, label, where), where))
    return rows, durations


def _find_videos(path: Path, spec: Spec, names: Sequence[str], tally: Tally) -> Mapping[str, Path]:
    """Return the file of each video, by its name with or without suffix, or ActivityNet's `v_NAME`."""
    places = [path.parent, path.with_suffix("")]
    for option in ("videos", "images"):
        if option in spec.options:
            places = [Path(spec.options[option]).expanduser()]
    by_stem = _stems(places)
    found: dict[str, Path] = {}
    for name in names:
        direct = next((place / name for place in places if (place / name).is_file()), None)
        file = direct or by_stem.get(name) or by_stem.get(f"v_{name}")
        if file is not None:
            found[name] = file
        else:
            tally.leave_out("annotated videos that are missing", name)
    missing = [name for name in names if name not in found]
    if missing and spec.options.get("missing") != "skip":
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} annotated videos are missing, the first is {missing[0]!r}; looked "
            f"in {' and '.join(map(str, places))}; say ?videos=DIR if they are elsewhere, or ?missing=skip to leave "
            "them out"
        )
    return found


def _stems(places: Iterable[Path]) -> dict[str, Path]:
    files = [
        file
        for place in places
        if place.is_dir()
        for file in sorted(place.iterdir())
        if file.suffix.lower() in VIDEO_SUFFIXES
    ]
    return {file.stem: file for file in reversed(files)}
