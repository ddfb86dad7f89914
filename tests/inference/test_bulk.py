"""Bulk prediction: killed and continued, in shards, with bad files among good ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clip_har_jax.errors import UserError
from clip_har_jax.inference.bulk import predict_bulk
from clip_har_jax.inference.bulk_engine import LocalEngine, Part, Piece
from clip_har_jax.inference.predictor import Predictor
from tests.support.model_folders import write_image, write_model

ROOT = Path(__file__).parents[2]
LABELS = ("running", "sleeping", "eating")
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bulk") / "model", LABELS)


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor(model, batch_size=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(NUM_IMAGES):
        write_image(root / f"{i:03d}.png", seed=i)
    (root / "007.png").write_bytes(b"not an image")
    (root / "020.png").write_bytes(b"")
    return root


def read(output: Path, what: str = "predictions") -> list[dict[str, object]]:
    return [row for path in sorted(output.glob(f"{what}-*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def files(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.parquet")}


def test_predicts_as_the_predictor_does(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    end = predict_bulk(predictor, str(photos), tmp_path, part_size=9)
    assert (end.done, end.failed) == (NUM_IMAGES, 2)
    assert len(list(tmp_path.glob("predictions-*/*.parquet"))) == 5
    expected = {one.input: one for one in predictor.predict(sorted(photos.glob("*.png")))}
    rows = read(tmp_path)
    assert [row["input"] for row in rows] == [name for name, one in expected.items() if one.error is None]
    for row in rows:
        assert row["label"] == expected[str(row["input"])].label
        assert row["score"] == pytest.approx(expected[str(row["input"])].score, abs=1e-6)
        assert len(row["probs"]) == len(LABELS)  # type: ignore[arg-type]
    bad = read(tmp_path, "bad_inputs")
    assert [Path(str(row["input"])).name for row in bad] == ["007.png", "020.png"]
    assert [row["error"] for row in bad] == [expected[str(row["input"])].error for row in bad]


def test_shards_are_disjoint_and_whole(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(str(path) for path in sorted(photos.glob("*.png"))) + "\n")
    for index in range(3):
        predict_bulk(predictor, str(listing), tmp_path / "out", (index, 3), part_size=5)
    rows = [str(row["input"]) for what in ("predictions", "bad_inputs") for row in read(tmp_path / "out", what)]
    assert sorted(rows) == sorted(map(str, photos.glob("*.png")))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_names_files_beside_it(predictor: Predictor, photos: Path, tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    manifest = photos / f"manifest.{kind}"
    names = ["003.png", "001.png"]
    if kind == "csv":
        manifest.write_text("path,label\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8-sig")
    else:
        pq.write_table(pa.table({"path": names}), manifest)
    try:
        predict_bulk(predictor, str(manifest), tmp_path)
    finally:
        manifest.unlink()
    assert [Path(str(row["input"])).name for row in read(tmp_path)] == names


@pytest.mark.parametrize("kind", ["bom", "windows", "heading"])
def test_lists_as_other_systems_write_them(predictor: Predictor, photos: Path, tmp_path: Path, kind: str) -> None:
    name = sorted(photos.rglob("*.png"))[0].relative_to(photos.parent)
    lines = {
        "bom": ("list.txt", b"\xef\xbb\xbf" + os.fsencode(photos.parent / name) + b"\r\n\r\n"),
        "windows": ("list.csv", b"path\r\n" + str(name).replace("/", "\\").encode() + b"\r\n"),
        "heading": ("list.csv", b"\xef\xbb\xbf Path ,label\r\n" + str(name).encode() + b",x\r\n"),
    }[kind]
    source = photos.parent / lines[0]
    source.write_bytes(lines[1])
    end = predict_bulk(predictor, str(source), tmp_path / "out", workers=1)
    source.unlink()
    assert (end.done, end.failed) == (1, 0)


def test_a_list_in_utf_16_is_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a.png\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="list in UTF-16; save it as UTF-8"):
        predict_bulk(predictor, str(tmp_path / "list.txt"), tmp_path / "out")


def test_what_a_folder_leaves_out_is_told_and_written(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(sorted(photos.rglob("*.png"))[0].read_bytes())
    for name in ("c.jp2", ".hidden.png", "Thumbs.db", "notes.txt"):
        (folder / name).write_text("x")
    end = predict_bulk(predictor, str(folder), tmp_path / "out", workers=1)
    left_out = {".jp2": 1, "hidden": 1, "of the system": 1, ".txt": 1}
    assert end.tally is not None and end.tally.kept == 2 and end.tally.ignored == left_out
    written = json.loads((tmp_path / "out/predictions-00000-of-00001/listing.json").read_text())
    assert written["kept"] == 2 and written["ignored"] == left_out


def test_killed_and_continued_gives_the_same(model: Path, predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a part is there; what is there is not computed again."""
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(photos.glob("*.png")) * 40))
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "scripts/predict_bulk.py", f"--model={model}", f"--inputs={listing}", f"--output={out}"]
    command += ["--part_size=100", "--batch_size=4"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    first = out / "predictions-00000-of-00001" / "000001.parquet"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = first.stat().st_mtime_ns
    assert len(list(first.parent.glob("*.parquet"))) < 16
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1, done.stderr  # some files can't be read
    assert first.stat().st_mtime_ns == before
    predict_bulk(predictor, str(listing), whole, part_size=100)
    for what in ("predictions", "bad_inputs"):
        ours, expected = read(out, what), read(whole, what)
        assert [row["input"] for row in ours] == [row["input"] for row in expected]
        assert [row.get("label") for row in ours] == [row.get("label") for row in expected]


def test_each_process_of_a_job_takes_its_shard(model: Path, photos: Path, tmp_path: Path) -> None:
    """They come and go alone: the second is started after the first has ended."""
    for index in range(2):
        command = [sys.executable, "scripts/predict_bulk.py", f"--model={model}", f"--inputs={photos}"]
        command += [f"--output={tmp_path}", "--batch_size=4", "--distributed", "--coordinator_address=127.0.0.1:9"]
        done = subprocess.run([*command, "--num_processes=2", f"--process_id={index}"], cwd=ROOT, capture_output=True)
        assert done.returncode == 1, done.stderr  # a file of each shard can't be read
    assert sorted(path.name for path in tmp_path.glob("predictions-*")) == [
        "predictions-00000-of-00002",
        "predictions-00001-of-00002",
    ]
    rows = [str(row["input"]) for what in ("predictions", "bad_inputs") for row in read(tmp_path, what)]
    assert sorted(rows) == sorted(map(str, photos.glob("*.png")))


def test_another_unsealed_model_does_not_continue(photos: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_model(tmp_path / name)
    classes = ("running", "sleeping")
    predict_bulk(Predictor(tmp_path / "a", classes, batch_size=8), str(photos), tmp_path / "out", part_size=20)
    with pytest.raises(UserError, match="another model"):
        predict_bulk(Predictor(tmp_path / "b", classes, batch_size=8), str(photos), tmp_path / "out", part_size=20)


def test_a_part_cut_off_before_its_predictions_is_not_counted_twice(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    """Killed between the table of bad inputs and that of the predictions."""
    predict_bulk(predictor, str(photos), tmp_path, part_size=20)
    (tmp_path / "predictions-00000-of-00001" / "000001.parquet").unlink()
    assert len(list(tmp_path.glob("bad_inputs-*/*.parquet"))) == 2
    end = predict_bulk(predictor, str(photos), tmp_path, part_size=20)
    assert (end.done, end.failed) == (NUM_IMAGES, 2)


def test_what_can_be_read_after_a_kill_is_bad_no_more(predictor: Predictor, tmp_path: Path) -> None:
    for i in range(4):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)
    hidden = (tmp_path / "photos" / "2.png").read_bytes()
    (tmp_path / "photos" / "2.png").write_bytes(b"")
    assert predict_bulk(predictor, str(tmp_path / "photos"), tmp_path / "out").failed == 1
    (tmp_path / "out" / "predictions-00000-of-00001" / "000000.parquet").unlink()
    (tmp_path / "photos" / "2.png").write_bytes(hidden)
    end = predict_bulk(predictor, str(tmp_path / "photos"), tmp_path / "out")
    assert (end.done, end.failed, len(read(tmp_path / "out"))) == (4, 0, 4)
    assert not read(tmp_path / "out", "bad_inputs")


def test_inputs_that_came_later_are_not_passed_over(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    names = [f"{path}\n" for path in sorted(photos.glob("*.png"))]
    listing = tmp_path / "list.txt"
    listing.write_text("".join(names[:30]))
    predict_bulk(predictor, str(listing), tmp_path / "out", part_size=20)
    assert predict_bulk(predictor, str(listing), tmp_path / "out", part_size=20).done == 30
    listing.write_text("".join(names))
    with pytest.raises(UserError, match="more inputs have come"):
        predict_bulk(predictor, str(listing), tmp_path / "out", part_size=20)


def test_another_format_of_the_folder_does_not_continue(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    predict_bulk(predictor, str(photos), tmp_path, part_size=20)
    about = tmp_path / "predictions-00000-of-00001" / "about.json"
    about.write_text(about.read_text().replace('"format": null', '"format": "onnx_int8"'))
    with pytest.raises(UserError, match="another format"):
        predict_bulk(predictor, str(photos), tmp_path, part_size=20)


class OutOfOrderEngine(LocalEngine):
    """Give pieces as machines that work side by side do, and end in the middle as a killed one does."""

    name = "out of order"

    def __init__(self, predictor: Predictor, most: int):
        super().__init__(predictor, workers=1)
        self._most = most

    def run(self, parts: Iterator[Part]) -> Iterator[Piece]:
        pieces = list(super().run(parts))
        random.Random(0).shuffle(pieces)
        yield from pieces[: self._most]
        if self._most < len(pieces):
            raise KeyboardInterrupt


def test_pieces_in_any_order_give_the_same_files_and_holes_are_filled(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    predict_bulk(predictor, str(photos), tmp_path / "whole", part_size=8)
    with pytest.raises(KeyboardInterrupt):
        predict_bulk(predictor, str(photos), tmp_path / "out", part_size=8, engine=OutOfOrderEngine(predictor, 7))
    folder = tmp_path / "out" / "predictions-00000-of-00001"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert finished and sorted(int(path.stem) for path in finished) != list(range(len(finished)))
    end = predict_bulk(predictor, str(photos), tmp_path / "out", part_size=8)
    assert (end.done, end.failed) == (NUM_IMAGES, 2)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    ours, whole = (files(tmp_path / name) for name in ("out", "whole"))
    assert ours == whole and len(whole) == 5 + 2


def test_parts_of_an_earlier_version_are_checked_by_their_count_and_last_input(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    one = str(sorted(photos.glob("*.png"))[0])
    listing = tmp_path / "list.txt"
    listing.write_text(f"{one}\n" * 5)
    predict_bulk(predictor, str(listing), tmp_path / "out", part_size=5)
    part = tmp_path / "out" / "predictions-00000-of-00001" / "000000.parquet"
    table = pq.read_table(part)
    del (metadata := dict(table.schema.metadata))[b"inputs_sha256"]
    pq.write_table(table.replace_schema_metadata(metadata), part)
    assert predict_bulk(predictor, str(listing), tmp_path / "out", part_size=5).done == 5
    listing.write_text(f"{one}\n" * 4)
    with pytest.raises(UserError, match="the inputs have changed since part 0"):
        predict_bulk(predictor, str(listing), tmp_path / "out", part_size=5)


def test_the_summary_tells_counts_speed_and_errors_by_kind(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    predict_bulk(predictor, str(photos), tmp_path, part_size=20)
    summary = json.loads((tmp_path / "predictions-00000-of-00001" / "summary.json").read_text())
    assert (summary["inputs"], summary["unreadable"]) == (NUM_IMAGES, 2)
    assert sorted(summary["errors"].values()) == [1, 1] and "empty file" in summary["errors"]
    start = summary["this_start"]
    assert (start["engine"], start["inputs"]) == ("local", NUM_IMAGES)
    assert set(start["stages"]) == {"decode", "model"} and start["bottleneck"] in start["stages"]
    predict_bulk(predictor, str(photos), tmp_path, part_size=20)
    again = json.loads((tmp_path / "predictions-00000-of-00001" / "summary.json").read_text())
    assert again["inputs"] == NUM_IMAGES and again["errors"] == summary["errors"]
    assert again["this_start"]["inputs"] == 0 and again["this_start"]["bottleneck"] is None


def test_mistakes_are_one_line(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    predict_bulk(predictor, str(photos), tmp_path / "out", part_size=9)
    with pytest.raises(UserError, match="another part_size"):
        predict_bulk(predictor, str(photos), tmp_path / "out", part_size=8)
    with pytest.raises(UserError, match="not there; name a folder"):
        predict_bulk(predictor, str(tmp_path / "none"), tmp_path / "other")
    table = tmp_path / "t.csv"
    table.write_text("label\nx\n")
    with pytest.raises(UserError, match="has no column path"):
        predict_bulk(predictor, str(table), tmp_path / "other")
    for text, pattern in (("path,label\na.png,x\n\n,y\n", "column 'path' holds ''"), ("label,path\nx\n", "holds None")):
        table.write_text(text)
        with pytest.raises(UserError, match=pattern):
            predict_bulk(predictor, str(table), tmp_path / "holes")
    table.write_bytes(b"path\n\xff.png\n")
    with pytest.raises(UserError, match="UTF-8"):
        predict_bulk(predictor, str(table), tmp_path / "latin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="names no images"):
        predict_bulk(predictor, str(tmp_path / "empty"), tmp_path / "other")
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(photos.glob("*.png"))))
    predict_bulk(predictor, str(listing), tmp_path / "listed", part_size=20)
    listing.write_text("".join(f"{path}\n" for path in sorted(photos.glob("*.png"), reverse=True)))
    with pytest.raises(UserError, match="the inputs have changed since part 0"):
        predict_bulk(predictor, str(listing), tmp_path / "listed", part_size=20)
    names = sorted(str(path) for path in photos.glob("*.png"))
    listing.write_text("\n".join([names[1], names[0], *names[2:]]))  # in the middle of a part
    with pytest.raises(UserError, match="the inputs have changed since part 0"):
        predict_bulk(predictor, str(listing), tmp_path / "listed", part_size=20)
    listing.write_text("\n".join(names[:20]))
    with pytest.raises(UserError, match="the inputs have changed since part 1"):
        predict_bulk(predictor, str(listing), tmp_path / "listed", part_size=20)
    (tmp_path / "listed" / "predictions-00000-of-00001" / "000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"000000.parquet: can't be read .*; remove it"):
        predict_bulk(predictor, str(listing), tmp_path / "listed", part_size=20)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the exporter's dependencies warn of their own
def test_memory_stays_as_it_is_after_two_thousand_files(model: Path, tmp_path: Path) -> None:
    """18,000 files later it may have grown by 3 MB: less than 200 bytes for each of them."""
    from export.run import ExportOptions, export_model

    export_model(str(model), ["onnx"], tmp_path / "export", ExportOptions(num_examples=4))
    pictures = [write_image(tmp_path / "pictures" / f"{i}.jpg", seed=i) for i in range(8)]
    for i in range(20_000):
        folder = tmp_path / "photos" / f"{i // 1000:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(pictures[i % 8], folder / f"{i:05d}.jpg")
    flags = [f"--model={tmp_path / 'export'}", f"--inputs={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}"]
    command = [sys.executable, "scripts/predict_bulk.py", *flags, "--part_size=500", "--workers=2"]
    memory_mb: dict[int, float] = {}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            parts = len(list((tmp_path / "out").glob("predictions-*/*.parquet")))
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "VmRSS:" in status:  # not of one that has just ended
                memory_mb[parts] = int(status.split("VmRSS:")[1].split()[0]) / 1e3
            time.sleep(0.05)
    assert process.returncode == 0
    late = max(value for parts, value in memory_mb.items() if parts > 30)
    early = max(value for parts, value in memory_mb.items() if 3 <= parts <= 4)
    assert late - early < 3, (early, late)
