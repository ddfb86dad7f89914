"""Preparing clips: copies are found, clips of one recording stay together, and the manifest is a source of clips."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from clip_har_jax.config import DataConfig
from clip_har_jax.data import synthetic
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.duplicates import FRAMES, find_clip_pairs, make_signature
from clip_har_jax.data.pipeline import eval_batches
from clip_har_jax.data.scan import find_groups, recording_of
from clip_har_jax.data.sources import ClipFile, make_source
from clip_har_jax.data.splits import Shares
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines.prepare_data import Prepared, PrepareOptions, prepare_data
from clip_har_jax.preprocess import Preprocess
from tests.support.model_folders import write_image

COUNT, SIDE_PX, LENGTH = 20, 128, 24
COPIES = {  # codec, bit rate, side, frames cut off at the start and at the end
    "re-encoded": ("mpeg4", 300_000, SIDE_PX, 0, 0),
    "rescaled": ("libx264", 400_000, SIDE_PX * 3 // 4, 0, 0),
    "trimmed": ("libx264", 400_000, SIDE_PX, 3, 2),
}


def drawn_frames(number: int) -> list[np.ndarray]:
    """Return a window that moves over a drawn picture."""
    picture = synthetic.draw("test", number, SIDE_PX + 32)
    ways = [round(32 * i / LENGTH) for i in range(LENGTH)]
    return [picture[way : way + SIDE_PX, 32 - way : 32 - way + SIDE_PX] for way in ways]


def write_frames(
    path: Path, frames: Sequence[np.ndarray], codec: str = "libx264", rate: int = 800_000, side: int = SIDE_PX
) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=12)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = side, side, "yuv420p", rate
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(side, side, "yuv420p")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """Drawn clips and a copy of each in every way; one broken file."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(COUNT):
        folder = root / "data" / ("jump", "wave")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        frames = drawn_frames(number)
        write_frames(folder / f"{number}.mp4", frames)
        for kind, (codec, rate, side, start, end) in COPIES.items():
            write_frames(folder / f"{number}-{kind}.mp4", frames[start : LENGTH - end], codec, rate, side)
    shutil.copy(root / "data" / "jump" / "0.mp4", root / "data" / "jump" / "0-same.mp4")
    shutil.copy(root / "data" / "wave" / "1.mp4", root / "data" / "jump" / "1-conflict.mp4")
    (root / "data" / "wave" / "broken.mp4").write_bytes(b"no clip")
    options = PrepareOptions(num_workers=0, shares=Shares(0.2, 0.2), max_bad_fraction=0.02)
    return prepare_data([f"video:{root / 'data'}"], root / "out", options), root


def test_planted_copies_of_clips_are_found_and_no_others_joined(prepared: tuple[Prepared, Path]) -> None:
    found = {
        frozenset(Path(member["path"]).stem.split("-")[0] for member in entry["members"])
        for entry in prepared[0].duplicates
    }
    assert found == {frozenset([str(number)]) for number in range(COUNT)}
    sizes = Counter(len(entry["members"]) for entry in prepared[0].duplicates)
    assert sizes == {4: COUNT - 2, 5: 2}, "each clip with its three copies, and two with one more"


def test_a_copy_that_fades_out_is_found_whatever_the_order() -> None:
    whole = [make_signature(synthetic.draw("test", number, SIDE_PX)) for number in range(FRAMES)]
    black = make_signature(np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8))
    faded = [*whole[: FRAMES // 2], *[black] * (FRAMES // 2)]
    assert [pair[:2] for pair in find_clip_pairs([whole, faded])] == [(0, 1)]
    assert [pair[:2] for pair in find_clip_pairs([faded, whole])] == [(0, 1)]
    assert find_clip_pairs([[*whole[:2], *[black] * (FRAMES - 2)], whole]) == []


def test_splits_of_clips_have_no_leaks(prepared: tuple[Prepared, Path]) -> None:
    manifest = prepared[0].manifest
    splits: dict[int, set[str]] = {}
    for number, split in zip(manifest.column("group"), manifest.column("split"), strict=True):
        splits.setdefault(number, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "val", "test"} < set.union(*splits.values())
    conflicting = {path for path in manifest.column("path") if Path(path).stem.split("-")[0] == "1"}
    excluded = {
        path
        for path, split in zip(manifest.column("path"), manifest.column("split"), strict=True)
        if split == "excluded"
    }
    assert excluded == conflicting
    ((name, reason),) = prepared[0].bad
    assert name.endswith("broken.mp4") and "not a video" in reason


def test_page_shows_clips(prepared: tuple[Prepared, Path]) -> None:
    page = (prepared[1] / "out" / "report.html").read_text()
    assert "82 clips of 2 classes" in page and "images of" not in page
    assert page.count("data:image/jpeg;base64,") == COUNT + 2


def test_manifest_of_clips_is_a_source_of_clips(prepared: tuple[Prepared, Path]) -> None:
    spec = f"manifest:{prepared[1]}/out/manifest.parquet?split=train"
    source = make_source(spec, "train")
    assert source.clips and source.labels == ("jump", "wave")
    assert isinstance(source[0].data, ClipFile)
    config = DataConfig(num_workers=0)
    bad = BadInputs(source, 0.0)
    with eval_batches(source, config, Preprocess(16), batch_size=4, bad_inputs=bad) as batches:
        batch = next(batches)
    assert batch.image.shape == (4, config.video.num_frames, 16, 16, 3) and batch.mask.all()


def test_a_changed_clip_is_named(prepared: tuple[Prepared, Path], tmp_path: Path) -> None:
    shutil.copytree(prepared[1] / "data", tmp_path / "data")
    spec = f"manifest:{prepared[1]}/out/manifest.parquet?split=train&images={tmp_path}/data"
    source = make_source(spec, "train")
    first = source.path(0)
    assert first is not None
    path = Path(first)
    path.write_bytes(bytes(reversed(path.read_bytes())))  # of the same size
    bad = BadInputs(source, 0.0)
    batches = eval_batches(source, DataConfig(num_workers=0), Preprocess(16), batch_size=2, bad_inputs=bad)
    with batches, pytest.raises(UserError, match=rf"1 of \d+ clips can't be read.*{path.name}: changed since"):
        next(batches)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"1 of \d+ files changed.*{path.name}"):
        make_source(spec, "train")


def test_clips_of_one_recording_stay_together(tmp_path: Path) -> None:
    numbers = iter(range(100, 140))
    for label in ("Jump", "Wave"):
        (tmp_path / "ucf" / label).mkdir(parents=True)
        for recording in range(5):
            for clip in range(2):
                path = tmp_path / "ucf" / label / f"v_{label}_g{recording:02d}_c{clip:02d}.avi"
                write_frames(path, drawn_frames(next(numbers))[:6], "mpeg4")
    found = prepare_data(
        [f"video:{tmp_path / 'ucf'}"], tmp_path / "out", PrepareOptions(shares=Shares(0.2, 0.2), num_workers=0)
    )
    assert found.duplicates == []
    splits: dict[str, list[str]] = {}
    for path, split in zip(found.manifest.column("path"), found.manifest.column("split"), strict=True):
        splits.setdefault(path.rpartition("_c")[0], []).append(split)
    assert len(splits) == 10 and all(len(set(of)) == 1 for of in splits.values())
    assert Counter(of[0] for of in splits.values()) == {"train": 6, "val": 2, "test": 2}
    assert set(found.manifest.column("weight")) == {1.0}, "clips of one recording are no copies"


def test_recordings_by_the_names_of_ucf101_and_hmdb51() -> None:
    assert recording_of("x/v_HandStandPushups_g01_c04.avi", "a") == recording_of("v_HandStandPushups_g01_c01.avi", "a")
    assert recording_of("v_HandStandPushups_g01_c04.avi", "a") != recording_of("v_HandStandPushups_g02_c04.avi", "a")
    first = recording_of("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair")
    assert first == recording_of("April_09_brush_hair_u_cm_np1_fr_med_11.avi", "brush_hair") is not None
    assert recording_of("clip.mp4", "a") is None


def test_a_conflict_takes_no_recording_with_it() -> None:
    copies, groups = find_groups([(0, 3, 1.0)], np.array([0, 0, 0, 1, 1]), ["a", "a", "a", "b", "b"])
    assert copies.tolist() == [0, 1, 2, 0, 3]
    assert groups[1] == groups[2] != groups[0] == groups[3] != groups[4]


def test_images_and_clips_together_and_what_is_for_images_alone_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "run" / "0.png", seed=0)
    (tmp_path / "clips" / "run").mkdir(parents=True)
    (tmp_path / "clips" / "run" / "0.mp4").write_bytes(b"")
    both = [f"folder:{tmp_path}/images", f"video:{tmp_path}/clips"]
    with pytest.raises(UserError, match="images and clips together"):
        prepare_data(both, tmp_path / "out")
    with pytest.raises(UserError, match="--cache_px=64: is for images"):
        prepare_data(both[1:], tmp_path / "out", PrepareOptions(cache_px=64))
    with pytest.raises(UserError, match=r"^motion: drawn clips need no preparation; .*data\.val=motion"):
        prepare_data(["motion"], tmp_path / "out")
    with pytest.raises(UserError, match=r"1 of 1 clips can't be read.*0\.mp4: empty file"):
        prepare_data(both[1:], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bad_inputs.jsonl").read_text())["error"] == "empty file"
