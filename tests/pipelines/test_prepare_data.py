"""Preparing data: copies are found and stay in one split, what changed is named, and the page shows what there is."""

import io
import json
import shutil
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clip_har_jax.config import make_config
from clip_har_jax.data import synthetic
from clip_har_jax.data.duplicates import (
    MAX_BITS,
    MIN_CORRELATION,
    Signature,
    find_pairs,
    group,
    make_signature,
    similarity,
)
from clip_har_jax.data.examples import Example, Source
from clip_har_jax.data.manifest import read_manifest
from clip_har_jax.data.quality import Facts, find_drift, find_suspects
from clip_har_jax.data.scan import Pooled, Scanned, place_files
from clip_har_jax.data.sources import make_source
from clip_har_jax.data.splits import Shares, assign_splits
from clip_har_jax.data.workers import map_in_workers
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.pipelines.prepare_data import Prepared, PrepareOptions, prepare_data
from clip_har_jax.trainer.features import examples_digest
from clip_har_jax.trainer.train import train
from tests.support.batches import read_bytes
from tests.support.model_folders import write_image, write_images, write_model
from tests.support.squares import Deadly, square

ROOT = Path(__file__).parents[2]
COUNT, SIDE_PX = 150, 160


def encoded(image: Image.Image, quality: int) -> Image.Image:
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(buffer)


def cropped(image: Image.Image) -> Image.Image:
    x, y = round(0.03 * image.width), round(0.03 * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": lambda image: encoded(image, 40),
    "resized": lambda image: image.resize((image.width // 2, image.height // 2)),
    "cropped": cropped,
    "bordered": lambda image: ImageOps.expand(image, 8, "black"),
    "framed in white": lambda image: ImageOps.expand(image, 8, "white"),
}


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    return [Image.fromarray(synthetic.draw("test", i, SIDE_PX)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def signatures(drawn: list[Image.Image]) -> list[Signature]:
    return [make_signature(np.asarray(image)) for image in drawn]


@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found(kind: str, drawn: list[Image.Image], signatures: list[Signature]) -> None:
    copies = [make_signature(np.asarray(COPIES[kind](image).convert("RGB"))) for image in drawn]
    pairs = {(i, j) for i, j, _ in find_pairs([*signatures, *copies])}
    found = sum((i, COUNT + i) in pairs for i in range(COUNT))
    assert found / COUNT >= 0.95


def test_other_images_are_rarely_joined(signatures: list[Signature]) -> None:
    assert len(find_pairs(signatures)) / (COUNT * (COUNT - 1) / 2) <= 0.001


def test_a_pair_is_found_whatever_the_order_and_flat_images_never(signatures: list[Signature]) -> None:
    for other in signatures[1:40]:
        first, second = find_pairs([signatures[0], other]), find_pairs([other, signatures[0]])
        assert [pair[:2] for pair in first + second] in ([], [(0, 1)], [(0, 1)] * 2)
    blank = make_signature(np.full((50, 60, 3), 200, np.uint8))
    assert blank.flat
    assert find_pairs([blank, blank]) == []
    assert similarity(signatures[0].thumbnail, signatures[0].thumbnail) > 0.999
    assert MAX_BITS < 32 and MIN_CORRELATION > 0.5


@given(st.data())
def test_groups_are_what_hangs_together(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    place = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(place, place), max_size=10))
    groups = group(count, pairs)
    expected = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            expected[i] = expected[j] = min(expected[i], expected[j])
    assert (groups[:, None] == groups[None]).tolist() == [[a == b for b in expected] for a in expected]
    assert list(dict.fromkeys(groups.tolist())) == list(range(groups.max() + 1))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80), st.integers(0, 5))
def test_splits_keep_groups_together_and_leave_conflicts_out(rows: list[tuple[int, int]], seed: int) -> None:
    ids, groups = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    splits = assign_splits(ids, groups, Shares(0.2, 0.2), seed)
    assert splits == assign_splits(ids, groups, Shares(0.2, 0.2), seed)
    for number in np.unique(groups):
        members = np.flatnonzero(groups == number)
        assert len({splits[i] for i in members}) == 1
        assert (splits[members[0]] == "excluded") == (len(set(ids[members].tolist())) > 1)


def test_single_examples_are_split_exactly_and_by_seed() -> None:
    ids = np.repeat(np.arange(3, dtype=np.int32), (40, 80, 20))
    splits = [assign_splits(ids, np.arange(140, dtype=np.int32), Shares(0.1, 0.2), seed) for seed in (0, 1)]
    for label, count in enumerate((40, 80, 20)):
        of = Counter(split for split, i in zip(splits[0], ids, strict=True) if i == label)
        assert of == {"train": 0.7 * count, "val": 0.1 * count, "test": 0.2 * count}
    assert splits[0] != splits[1]


def test_a_large_group_takes_the_place_of_as_many() -> None:
    groups = np.concatenate([np.zeros(20, np.int32), np.arange(1, 81, dtype=np.int32)])
    splits = Counter(assign_splits(np.zeros(100, np.int32), groups, Shares(0.1, 0.2), 0))
    assert splits == {"train": 70, "val": 10, "test": 20}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, drawn: list[Image.Image]) -> Path:
    """Two classes of 20; of the first, a copy and an identical file in it, and a copy in the second; a damaged file."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(drawn[:40]):
        path = folder / ("run" if i < 20 else "sit") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    encoded(drawn[0], 60).save(folder / "run" / "copy.jpg")
    shutil.copy(folder / "run" / "01.png", folder / "run" / "same.png")
    cropped(drawn[2]).save(folder / "sit" / "conflict.png")
    (folder / "sit" / "damaged.png").write_bytes((folder / "run" / "03.png").read_bytes()[:900])
    return folder


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    output = tmp_path_factory.mktemp("prepared")
    return prepare_data([f"folder:{photos}"], output, PrepareOptions(max_bad_fraction=0.1, cache_px=64)), output


def splits_of(output: Path) -> dict[str, str]:
    manifest = read_manifest(output / "manifest.parquet")
    return dict(zip(manifest.column("path"), manifest.column("split"), strict=True))


def test_prepared_data_has_no_leaks(prepared: tuple[Prepared, Path]) -> None:
    found, output = prepared
    splits = splits_of(output)
    assert splits["run/00.png"] == splits["run/copy.jpg"] != "excluded"
    assert splits["run/01.png"] == splits["run/same.png"] != "excluded"
    assert splits["run/02.png"] == splits["sit/conflict.png"] == "excluded"
    planted = [
        (entry["identical"], entry["conflict"])
        for entry in found.duplicates
        if {"run/copy.jpg", "run/same.png", "sit/conflict.png"} & {member["path"] for member in entry["members"]}
    ]
    assert sorted(planted) == [(False, False), (False, True), (True, False)]
    (line,) = (output / "bad_inputs.jsonl").read_text().splitlines()
    assert json.loads(line)["input"].endswith("sit/damaged.png")
    summary = json.loads((output / "prepare.json").read_text())
    assert summary["num_unreadable"] == 1
    assert sum(summary["splits"].values()) == summary["num_examples"] == 43
    weights = dict(zip(found.manifest.column("path"), found.manifest.column("weight"), strict=True))
    assert weights["run/00.png"] == weights["run/same.png"] == 0.5


def test_page_stands_alone(prepared: tuple[Prepared, Path]) -> None:
    page = (prepared[1] / "report.html").read_text()
    for text in ("run/copy.jpg", "damaged.png", prepared[0].manifest.digest, "different labels", "data:image/jpeg"):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")


def test_same_data_and_seed_give_the_same_manifest(
    photos: Path, prepared: tuple[Prepared, Path], tmp_path: Path
) -> None:
    again, other = (
        prepare_data([f"folder:{photos}"], tmp_path, PrepareOptions(max_bad_fraction=0.1, seed=seed)).manifest.digest
        for seed in (0, 1)
    )
    assert again == prepared[0].manifest.digest != other


def test_manifest_is_a_source(prepared: tuple[Prepared, Path], photos: Path) -> None:
    found, output = prepared
    for split in ("train", "val", "test"):
        source = make_source(f"manifest:{output}/manifest.parquet", split)
        assert source.labels == ("run", "sit")
        assert source.manifest_sha256 == found.manifest.digest
        names = [source[i].name for i in range(len(source))]
        assert sorted(names) == sorted(str(photos / path) for path, of in splits_of(output).items() if of == split)
        assert [source.labels[i] for i in source.label_ids] == [Path(name).parent.name for name in names]
        assert source[0].data == Path(names[0]).read_bytes()
    named = make_source(f"manifest:{output}/manifest.parquet?split=test", "train")
    assert named.fingerprint == source.fingerprint


def test_cached_images_are_the_same_examples_made_small(prepared: tuple[Prepared, Path]) -> None:
    path = f"manifest:{prepared[1]}/manifest.parquet?split=train"
    plain, cached = make_source(path, "train"), make_source(f"{path}&cache=64", "train")
    assert len(plain) == len(cached)
    for i in range(len(plain)):
        assert plain[i].name == cached[i].name
        small = Image.open(io.BytesIO(read_bytes(cached, i)))
        assert min(small.size) == 64
        large = Image.open(io.BytesIO(read_bytes(plain, i))).convert("RGB").resize(small.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 4
    with pytest.raises(UserError, match="no cache"):
        make_source(f"{path}&cache=32", "train")


def refused(spec: str) -> str:
    with pytest.raises(UserError) as info:
        make_source(spec, "train")
    assert "\n" not in str(info.value)
    return str(info.value)


def test_changed_files_are_named_with_their_number(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ("run", "sit"), 8)
    prepare_data([f"folder:{tmp_path}/photos"], tmp_path / "out", PrepareOptions(shares=Shares(0.0, 0.0)))
    spec = f"manifest:{tmp_path}/out/manifest.parquet"
    first = tmp_path / "photos/run/0.png"
    data = first.read_bytes()
    first.write_bytes(data + b"more")
    (tmp_path / "photos/sit/3.png").unlink()
    assert "2 of 16 files changed" in refused(spec) and str(first) in refused(spec)
    first.write_bytes(data[:-1] + b"\1")  # as many bytes, but others
    shutil.copy(tmp_path / "photos/sit/2.png", tmp_path / "photos/sit/3.png")
    (tmp_path / "photos/sit/3.png").write_bytes(
        b"\0" * pq.read_table(f"{tmp_path}/out/manifest.parquet")["bytes"][11].as_py()
    )
    source = make_source(spec, "train")
    with pytest.raises(ValueError, match="changed since its manifest"):
        source[0]
    assert len(examples_digest(source)) == 64  # such images are told when they are read for good


def test_manifest_follows_its_files_by_option(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ("run", "sit"), 4)
    prepare_data([f"folder:{tmp_path}/photos"], tmp_path / "out")
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert "?images=DIR" in refused(f"manifest:{tmp_path}/out/manifest.parquet")
    assert len(make_source(f"manifest:{tmp_path}/out/manifest.parquet?images={tmp_path}/moved", "train")) == 6


def test_manifest_that_was_changed_is_refused(prepared: tuple[Prepared, Path], tmp_path: Path) -> None:
    path = prepared[1] / "manifest.parquet"
    table = pq.read_table(path)
    labels = table.column("label").to_pylist()
    changed = table.set_column(2, "label", [["sit", *labels[1:]]])
    pq.write_table(changed, tmp_path / "changed.parquet")
    assert "checksum differs" in refused(f"manifest:{tmp_path}/changed.parquet")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "plain.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    for name in ("plain", "text"):
        assert "not a manifest" in refused(f"manifest:{tmp_path}/{name}.parquet")
    assert "no such file" in refused(f"manifest:{tmp_path}/none.parquet")
    assert "it has test, train, val" in refused(f"manifest:{path}?split=dev")


def test_given_test_set_stays_and_what_is_near_it_is_left_out(tmp_path: Path, drawn: list[Image.Image]) -> None:
    for name, images in (("train", range(10, 40)), ("test", range(5, 15))):
        for i in images:
            path = tmp_path / name / ("run" if i % 2 else "sit") / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn[i].save(path, quality=90 if name == "train" else 50)
    found = prepare_data(
        [f"folder:{tmp_path}/train"],
        tmp_path / "out",
        PrepareOptions(test=f"folder:{tmp_path}/test", shares=Shares(0.2, 0.2)),
    )
    splits = splits_of(tmp_path / "out")
    assert all((split == "test") == path.startswith("test/") for path, split in splits.items())
    for i in range(10, 15):
        assert splits[f"train/{'run' if i % 2 else 'sit'}/{i}.jpg"] == "excluded"
    assert found.summary["crossing_groups"] >= 5


def test_data_without_files_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SPLITS, "val", 30)
    prepare_data(["synthetic?split=val"], tmp_path / "out", PrepareOptions(shares=Shares(0.0, 0.0)))
    source = make_source(f"manifest:{tmp_path}/out/manifest.parquet?split=train", "train")
    images = {np.asarray(Image.open(io.BytesIO(read_bytes(source, i)))).tobytes() for i in range(len(source))}
    assert images <= {synthetic.draw("val", i).tobytes() for i in range(30)}
    assert len(images) == len(source)


def test_too_many_bad_images_end_it(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ("run", "sit"), 3)
    (tmp_path / "photos/run/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 6 images .*run/0.png: empty file") as info:
        prepare_data([f"folder:{tmp_path}/photos"], tmp_path / "out")
    assert "--max_bad_fraction" in str(info.value)
    assert not (tmp_path / "out/manifest.parquet").exists()


def test_shares_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    for shares in (Shares(0.5, 0.5), Shares(-0.1, 0.2), Shares(float("nan"), 0.1)):
        with pytest.raises(UserError, match="nothing is left"):
            prepare_data(["synthetic"], tmp_path, PrepareOptions(shares=shares))


def test_drift_tells_sets_apart() -> None:
    rng = np.random.default_rng(0)

    def columns(brightness: float) -> dict[str, np.ndarray]:
        return {
            name: rng.normal(brightness if name == "brightness" else 1.0, 0.1, 400)
            for name in ("width", "height", "aspect", "brightness", "contrast", "bytes")
        }

    labels = ["run", "sit"] * 200
    rows = {row.measure: row for row in find_drift(columns(0.5), columns(0.7), labels, ["run"] * 400)}
    p_value = rows["brightness"].p_value
    assert rows["brightness"].distance > 0.5 and p_value is not None and p_value < 1e-6
    assert rows["width"].distance < 0.15
    assert rows["class shares"].distance == pytest.approx(0.5)


def test_suspects_are_those_among_another_class() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(2, dtype=np.int32), 30)
    features = rng.normal(0, 0.1, (60, 8)).astype(np.float32)
    features[np.arange(60), ids] += 1
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    wrong = ids.copy()
    wrong[[3, 40]] = 1 - wrong[[3, 40]]
    suspects = find_suspects(features, wrong, np.arange(60, dtype=np.int32))
    assert {(suspect.position, suspect.suggested) for suspect in suspects} == {(3, 0), (40, 1)}


def test_workers_give_the_results_in_order() -> None:
    for count, workers in ((10, 2), (1500, 2)):
        assert list(map_in_workers(square, 3, count, workers, "squaring")) == [3 * i * i for i in range(count)]


@pytest.mark.timeout(90)
def test_a_worker_that_dies_before_it_has_read_all_is_told() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        deque(map_in_workers(square, (Deadly(), bytes(10**6)), 1000, 2, "squaring"), maxlen=0)


def test_command(photos: Path, tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/prepare_data.py", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    out = tmp_path / "a long name of a folder " / ("and one below it" * 5)
    done = run(f"--data=folder:{photos}", f"--output={out}", "--max_bad_fraction=0.1")
    assert done.returncode == 0, done.stderr
    assert "43 (train" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f" {out}/report.html")  # in one piece
    assert (out / "report.html").is_file()
    wrong = run(f"--data=folder:{tmp_path}/none", f"--output={tmp_path}/out2")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1


def test_classes_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    for label in ("Running", "running", "sitting"):
        write_image(tmp_path / label / "0.png", seed=0)
    assert "'Running' and 'running' differ only in case" in refused(f"folder:{tmp_path}")


TFDS_CHECK = """
import sys
from pathlib import Path
from clip_har_jax.config import make_config
from clip_har_jax.data import synthetic
synthetic.SPLITS["val"] = 60
from clip_har_jax.data.sources import make_source
from clip_har_jax.data.splits import Shares
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines.prepare_data import PrepareOptions, prepare_data

root = Path(sys.argv[1])
options = {"shares": Shares(0.25, 0.25), "tfds_dir": f"{root}/tfds"}
found = prepare_data(["synthetic?split=val"], root / "out", PrepareOptions(**options))
for split in ("train", "val", "test"):
    ours = make_source(f"manifest:{root}/out/manifest.parquet?split={split}", split)
    theirs = make_source(f"tfds:har15?split={split}&data_dir={root}/tfds", split)
    assert theirs.labels == synthetic.LABELS
    assert {ours[i].data for i in range(len(ours))} == {theirs[i].data for i in range(len(theirs))}
    assert {(ours[i].data, ours[i].label) for i in range(len(ours))} == {
        (theirs[i].data, theirs[i].label) for i in range(len(theirs))
    }
try:
    prepare_data(["synthetic?split=val"], root / "out", PrepareOptions(**options))
except UserError as error:
    assert "there already" in str(error)
else:
    raise AssertionError("built twice")
assert "tensorflow" not in sys.modules
"""


def test_tfds_har15_holds_the_splits_of_the_manifest(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", TFDS_CHECK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_runs_record_the_checksum_and_reports_show_it(prepared: tuple[Prepared, Path], tmp_path: Path) -> None:
    spec, digest = f"manifest:{prepared[1]}/manifest.parquet", prepared[0].manifest.digest
    config = make_config(
        {
            "data": {"train": spec, "val": spec, "num_workers": 0, "sampling": "weights"},
            "model": {"name": str(write_model(tmp_path / "start"))},
            "train": {"global_batch_size": 8, "num_steps": 1},
            "eval": {"batch_size": 8},
        }
    )
    model = Path(str(train(config, tmp_path / "run", quiet=True).model))
    data = json.loads((model / "run.json").read_text())["data"]
    assert data["train"]["manifest_sha256"] == data["val"]["manifest_sha256"] == digest
    evaluate_model(str(model), f"{spec}?split=test", tmp_path / "test", batch_size=8)
    assert digest in (tmp_path / "test" / "report.html").read_text()


@pytest.mark.slow
def test_labels_that_a_models_features_contradict_are_listed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(48):  # dark and light noise, of which two are in the wrong folder
        dark = i % 2 == 0
        folder = tmp_path / "photos" / ("night" if dark != (i in (6, 7)) else "day")
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 60, (40, 40, 3)) + (0 if dark else 190)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i:02d}.png")
    model = write_model(tmp_path / "model", ("a", "b"))
    found = prepare_data([f"folder:{tmp_path}/photos"], tmp_path / "out", PrepareOptions(model=str(model)))
    assert {(Path(row["path"]).name, row["suggested"]) for row in found.suspects} == {
        ("06.png", "night"),
        ("07.png", "day"),
    }
    assert "06.png" in (tmp_path / "out" / "report.html").read_text()
    assert found.summary["num_suspects"] == 2


class Unfiled(Source):
    """Images as a data set without files holds them, one of each format."""

    formats = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
    labels, label_ids, fingerprint = ("run",), np.zeros(len(formats), np.int32), ""

    def __len__(self) -> int:
        return len(self.formats)

    def __getitem__(self, i: int) -> Example:
        Image.new("RGB", (16, 16), (90, 20, 200)).save(buffer := io.BytesIO(), self.formats[i])
        return Example(buffer.getvalue(), 0, str(i))


def test_images_without_files_are_written_with_the_suffix_of_their_format(tmp_path: Path) -> None:
    scanned = [Scanned("0" * 64, 0, Facts(16, 16, 0.5, 0.1), ())] * len(Unfiled.formats)
    paths, _ = place_files(Pooled([Unfiled()]), range(len(scanned)), scanned, tmp_path)
    # An MPO of one picture is a JPEG
    assert [Path(path).suffix for path in paths] == [".jpg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".gif", ".avif"]
