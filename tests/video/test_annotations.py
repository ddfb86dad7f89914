"""Annotations with times: tables and ActivityNet's layout, and one clear sentence for each mistake in them."""

import json
from pathlib import Path

import pytest

from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.listing import Tally
from clip_har_jax.specs import parse_spec
from clip_har_jax.video.annotations import read_annotations
from clip_har_jax.video.segments import Segment
from tests.support.videos import write_clip

HEADER = "filename,start_s,end_s,label"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 3 s."""
    root = tmp_path_factory.mktemp("untrimmed")
    for name in ("a.mp4", "v_b.mp4"):
        write_clip(root / name)
    return root


def table(folder: Path, *rows: str, header: str = HEADER) -> str:
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return f"video:{path}"


def activitynet(folder: Path, database: object) -> str:
    path = folder / "activity_net.json"
    path.write_text(json.dumps({"version": "1.3", "database": database}))
    return f"video:{path}"


def read(spec: str, split: str = "train", tally: Tally | None = None) -> dict[str, tuple[Segment, ...]]:
    return {video.path.name: video.segments for video in read_annotations(parse_spec(spec), split, tally)}


def refused(spec: str) -> str:
    with pytest.raises(UserError) as info:
        read(spec)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_table_has_several_rows_a_video(folder: Path) -> None:
    spec = table(folder, "a.mp4,1.5,2,wave", "v_b,0,1,jump", "a.mp4,0.5,1,jump", "a.mp4,2.5,3,background", "v_b,2,3,")
    assert read(spec) == {
        "a.mp4": (Segment(0.5, 1.0, "jump"), Segment(1.5, 2.0, "wave")),
        "v_b.mp4": (Segment(0.0, 1.0, "jump"),),
    }


def test_a_column_chooses_the_split(folder: Path) -> None:
    rows = ("a.mp4,0,1,jump,training", "v_b,0,1,wave,test")
    spec = table(folder, *rows, header=HEADER + ",split")
    assert list(read(spec, "train")) == ["a.mp4"]
    assert list(read(f"{spec}?split=test", "train")) == ["v_b.mp4"]
    assert "no split 'tset'; it has 'test', 'training'" in refused(f"{spec}?split=tset")


def test_activitynets_layout(folder: Path) -> None:
    entry = {"subset": "training", "duration": 3.0, "url": "", "resolution": "64x48"}
    database = {
        "b": {**entry, "annotations": [{"segment": [0.5, 1.5], "label": "jump"}]},
        "a": {**entry, "subset": "validation", "annotations": []},
    }
    spec = activitynet(folder, database)
    assert read(spec) == {"v_b.mp4": (Segment(0.5, 1.5, "jump"),)}
    assert read(spec, "val") == {"a.mp4": ()}
    assert "not ActivityNet's layout" in refused(activitynet(folder, {"b": {"duration": 3}}))
    broken = {"b": {**entry, "annotations": [{"segment": [1], "label": "jump"}]}}
    assert 'b, annotation 0: write {"segment": [start, end]' in refused(activitynet(folder, broken))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.mp4,2,1,jump", "line 2: the end, 1 s, isn't behind the start, 2 s; correct the times"),
        ("a.mp4,1,1,jump", "the end, 1 s, isn't behind the start, 1 s"),
        ("a.mp4,-1,1,jump", "-1 to 1 s lies outside the video; times begin at 0"),
        ("a.mp4,nan,1,jump", "nan to 1 s lies outside the video"),
        ("a.mp4,one,2,jump", "'one' to '2' aren't times in seconds; write numbers"),
        ("a.mp4,3.5,4,jump", "'jump' starts at 3.5 s, but a.mp4 ends at 3.0 s; correct the times"),
        ("c.mp4,0,1,jump", "1 of 1 annotated videos are missing, the first is 'c.mp4'; looked in "),
        (",0,1,jump", "line 2: no filename; fill it in"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, row: str, said: str) -> None:
    assert said in refused(table(folder, row))


def test_a_missing_column_is_named(folder: Path) -> None:
    assert "its first line must be filename,start_s,end_s,label" in refused(
        table(folder, "a.mp4,0,jump", header="filename,start_s,label")
    )


def test_what_is_mended_is_told(folder: Path) -> None:
    tally = Tally()
    rows = ("a.mp4,2,9,wave", "a.mp4,0,1,jump", "a.mp4,0.5,1.5,jump", "a.mp4,0.5,2.5,wave", "gone,0,1,jump")
    found = read(table(folder, *rows) + "?missing=skip", tally=tally)
    assert found == {"a.mp4": (Segment(0.0, 1.5, "jump"), Segment(0.5, 3.0, "wave"))}
    notes = "\n".join(tally.lines)
    assert "left out: 1 annotated videos that are missing (gone)" in notes
    assert "line 2: 'wave' ends at 9 s, behind the end of a.mp4 at 3.0 s; it is taken to end there" in notes
    assert "line 4: 'jump' overlaps another segment of its class; they are one" in notes
    assert "line 2: 'wave' overlaps another segment of its class" in notes


def test_videos_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    spec = table(tmp_path, "b,0,1,jump")
    assert list(read(f"{spec}?videos={folder}")) == ["v_b.mp4"]


def test_csv_and_video_read_the_same_table(folder: Path) -> None:
    spec = table(folder, "a.mp4,0,1.5,wave", "v_b,1,3,jump")
    sources = [make_source(text, "train") for text in (spec, spec.replace("video:", "csv:"))]
    assert sources[0].labels == sources[1].labels == ("background", "jump", "wave")
    assert sources[0].fingerprint == sources[1].fingerprint and sources[0].clips


def test_options_of_tables_with_times_need_times(folder: Path) -> None:
    spec = table(folder, "a.mp4,jump", "v_b.mp4,wave", header="filename,label")
    plain = make_source(spec, "train")  # a table of whole clips
    assert plain.clips and plain.labels == ("jump", "wave") and len(plain) == 2
    with pytest.raises(UserError, match="missing is for annotations with times; leave it out"):
        make_source(f"{spec}?missing=skip", "train")
    with pytest.raises(UserError, match="window_s is for tables with the columns start_s and end_s"):
        make_source(spec.replace("video:", "csv:") + "?window_s=2", "train")
