"""Multi-label data: what each kind of data gives, what is refused, and how it is split."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from clip_har_jax.config import AugmentConfig, DataConfig
from clip_har_jax.data import synthetic
from clip_har_jax.data.multi_label import make_multi_label_source
from clip_har_jax.data.sources import SubsetSource, make_source
from clip_har_jax.data.splits import Shares, assign_multi_label_splits, hold_out_multi_label, stratify
from clip_har_jax.errors import UserError
from clip_har_jax.pipelines.classed import ClassedSource
from clip_har_jax.pipelines.prepare_data import PrepareOptions, prepare_data
from tests.support.batches import evaluation, train
from tests.support.listings import write_csv
from tests.support.sources import encoded

SETS = [("run", "wave"), ("sit",), (), ("run",)]
TARGETS = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]]


def write_files(root: Path, names: list[str]) -> None:
    """Pictures of one grey level each, so that each content occurs once."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(40 * level))


def make_csv(root: Path) -> str:
    write_files(root, ["a.png", "b.png", "c.png", "d.png"])
    return write_csv(root / "data.csv", ["a.png,wave | run", "b.png,sit", "c.png,", "d.png,run"])


def make_parquet(root: Path) -> str:
    images = [{"bytes": encoded(40 * level), "path": None} for level in range(4)]
    pq.write_table(pa.table({"image": images, "actions": [list(own) for own in SETS]}), root / "data.parquet")
    return f"parquet:{root}/data.parquet?label=actions"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("make", [make_csv, make_parquet])
def test_labels_become_rows_of_targets(tmp_path: Path, make) -> None:
    source = make_multi_label_source(make(tmp_path), "train")
    assert source.labels == ("run", "sit", "wave")
    assert source.targets is not None
    assert source.targets.tolist() == TARGETS
    assert source.class_counts.tolist() == [2, 1, 1]
    assert [source.names_of(i) for i in range(4)] == SETS
    assert source[2].data == encoded(80)
    np.testing.assert_array_equal(source[0].label, [1, 0, 1])
    with pytest.raises(UserError, match=r"several labels each"):
        _ = source.label_ids  # whatever counts on one label is refused
    part = SubsetSource(source, np.array([3, 0]))
    assert part.targets is not None
    assert part.targets.tolist() == [TARGETS[3], TARGETS[0]]


def test_two_labels_of_one_class_of_a_model_add_up(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png", "b.png", "c.png"])
    spec = write_csv(tmp_path / "data.csv", ["a.png,cycling", "b.png,riding_a_bike|sit", "c.png,sit"])
    classed = ClassedSource(make_multi_label_source(spec, "test"), ("sit", "riding a bike"), spec)
    assert classed.targets is not None
    assert classed.targets.tolist() == [[0, 1], [1, 1], [1, 0]]


def test_labels_change_the_fingerprint(tmp_path: Path) -> None:
    spec = make_csv(tmp_path)
    before = make_multi_label_source(spec, "train").fingerprint
    assert make_multi_label_source(spec, "train").fingerprint == before
    write_csv(tmp_path / "data.csv", ["a.png,run", "b.png,sit|wave", "c.png,", "d.png,run"])
    assert make_multi_label_source(spec, "train").fingerprint != before


def test_rows_of_one_file_add_up(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png", "b.png"])
    spec = write_csv(tmp_path / "data.csv", ["a.png,run", "b.png,sit", "./a.png,wave|run"])
    source = make_multi_label_source(spec, "train")
    assert [source.names_of(i) for i in range(len(source))] == [("run", "wave"), ("sit",)]


def test_a_content_in_several_class_folders_is_one_image(tmp_path: Path) -> None:
    """By content, not by name: cameras number their pictures from 1 in each folder."""
    write_files(tmp_path, ["run/1.png", "sit/1.png", "wave/2.png"])
    (tmp_path / "wave" / "copy.png").write_bytes((tmp_path / "run" / "1.png").read_bytes())
    os.link(tmp_path / "sit" / "1.png", tmp_path / "wave" / "linked.png")
    source = make_multi_label_source(f"folder:{tmp_path}", "train")
    named = {Path(source.path(i) or "").relative_to(tmp_path).as_posix(): source.names_of(i) for i in range(3)}
    assert named == {"run/1.png": ("run", "wave"), "sit/1.png": ("sit", "wave"), "wave/2.png": ("wave",)}
    assert source.tally.kept == len(source) == 3
    assert "2 files repeat the contents of another" in source.tally.notes[0]
    assert len(make_source(f"folder:{tmp_path}", "train")) == 5  # with one label each, all files are examples


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a.png,run||wave"], "line 2: the labels 'run||wave' hold an empty one"),
        (["a.png,run|Run"], "classes 'Run' and 'run' differ only in case"),
        ([",run"], "line 2 has no filename"),
        (["a.png,"], "none of its 1 images has a label"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, rows: list[str], said: str) -> None:
    write_files(tmp_path, ["a.png"])
    with pytest.raises(UserError) as info:
        make_multi_label_source(write_csv(tmp_path / "data.csv", rows), "train", for_training=True)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


def test_a_label_that_would_be_read_as_several_is_refused(tmp_path: Path) -> None:
    """A manifest joins labels by a bar, so the label `run|wave` would come back as two."""
    write_files(tmp_path, ["run|wave/1.png", "sit/1.png"])
    pq.write_table(pa.table({"image": [encoded(0)], "actions": [["run|wave"]]}), tmp_path / "data.parquet")
    for spec in (f"folder:{tmp_path}", f"parquet:{tmp_path}/data.parquet?label=actions"):
        with pytest.raises(UserError, match=r"the label 'run[|]wave' holds '[|]', which divides labels"):
            make_multi_label_source(spec, "train")


def test_a_label_outside_the_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"label 'wave' \(1 images\) is none of the 2 classes"):
        make_multi_label_source(make_csv(tmp_path), "val", ("run", "sit"))


def test_data_with_one_label_each_says_how_to_give_several(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png"])
    spec = write_csv(tmp_path / "data.csv", ["a.png,run", "a.png,sit"])
    with pytest.raises(UserError, match=r"data[.]multi_label=True"):
        make_source(spec, "train")
    write_csv(tmp_path / "data.csv", ["a.png,run|sit"])
    source = make_source(spec, "train")
    assert source.labels == ("run|sit",)
    assert "data.multi_label=True" in source.tally.notes[0]
    with pytest.raises(UserError, match=r"holds lists of labels; set data[.]multi_label=True"):
        make_source(make_parquet(tmp_path), "train")


def test_data_of_other_kinds_is_refused() -> None:
    with pytest.raises(UserError, match=r"synthetic: gives each image one label; multi-label data is read from csv"):
        make_multi_label_source("synthetic", "train")


def test_parquet_with_one_label_a_row(tmp_path: Path) -> None:
    table = {"image": [encoded(40 * level) for level in range(3)], "action": ["sit", "run", "sit"]}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    spec = f"parquet:{tmp_path}/data.parquet"
    source = make_source(f"{spec}?label=action", "train")
    assert (source.labels, source.label_ids.tolist()) == (("run", "sit"), [1, 0, 1])
    assert source[1].data == encoded(40)
    with pytest.raises(UserError, match=r"no column 'verb', which [?]label=COLUMN names"):
        make_source(f"{spec}?label=verb", "train")
    with pytest.raises(UserError, match=r"name the column of the labels by [?]label=COLUMN"):
        make_multi_label_source(spec, "train")


def test_paths_in_a_parquet_file_are_below_the_images_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "pictures", ["a.png", "b.png"])
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "action": ["sit", "run"]}), tmp_path / "data.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = make_source(f"parquet:{tmp_path}/data.parquet?label=action&images=~/pictures", "train")
    assert [source[i].data for i in range(2)] == [encoded(0), encoded(40)]


def test_class_labels_of_a_parquet_file_are_without_invisible_differences(tmp_path: Path) -> None:
    features = Features({"image": Value("binary"), "action": ClassLabel(names=["wave ", "run"])})
    rows = Dataset.from_dict({"image": [encoded(0), encoded(40)], "action": [0, 1]}, features)
    rows.to_parquet(tmp_path / "data.parquet")
    source = make_source(f"parquet:{tmp_path}/data.parquet?label=action", "train")
    assert (source.labels, source.label_ids.tolist()) == (("wave", "run"), [0, 1])


def test_batches_have_rows_of_targets(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(make_multi_label_source(make_csv(tmp_path), "train")))  # as a worker gets it
    first, last = evaluation(source, 3)
    assert first.label.dtype == np.uint8
    assert np.concatenate([first.label, last.label]).tolist() == [*TARGETS, [0, 0, 0], [0, 0, 0]]
    assert np.concatenate([first.mask, last.mask]).tolist() == [1, 1, 1, 1, 0, 0]
    (batch,) = train(source, 1)
    np.testing.assert_array_equal(batch.label, source.targets[batch.index])


def test_an_image_is_not_mirrored_if_one_of_its_labels_forbids_it(tmp_path: Path) -> None:
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(half).save(tmp_path / name)
    source = make_multi_label_source(write_csv(tmp_path / "data.csv", ["a.png,wave|turn", "b.png,wave"]), "train")
    config = DataConfig(augment=AugmentConfig(crop_scale_min=1.0, no_flip_labels=("turn",)))
    batches = train(source, 20, config, global_batch_size=2)
    mirrored = {i: sum(b.image[list(b.index).index(i), 0, 0, 0] > 0 for b in batches) for i in (0, 1)}
    assert mirrored[0] == 0
    assert 3 < mirrored[1] < 17


def test_splits_give_each_label_its_share() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((600, 5)) < (0.5, 0.3, 0.1, 0.05, 0.02)
    train_rows, val_rows = hold_out_multi_label(targets, 0.2, 0)
    assert sorted([*train_rows, *val_rows]) == list(range(600))
    assert abs(len(val_rows) - 120) <= 3
    wanted = 0.2 * targets.sum(axis=0)
    assert np.abs(targets[val_rows].sum(axis=0) - wanted).max() <= 2
    assert hold_out_multi_label(targets, 0.2, 0)[1].tolist() == val_rows.tolist()
    assert hold_out_multi_label(targets, 0.2, 1)[1].tolist() != val_rows.tolist()
    assert len(hold_out_multi_label(targets, 0.0, 0)[1]) == 0


def test_groups_stay_together_and_conflicts_are_excluded() -> None:
    targets = np.random.default_rng(0).random((300, 3)) < 0.4
    groups = np.arange(300, dtype=np.int32) // 3 * 3
    targets[:] = targets[groups]
    targets[4] = ~targets[3]  # copies under other labels
    splits = np.array(assign_multi_label_splits(targets, groups, Shares(0.1, 0.2), 0))
    assert all(len(set(splits[groups == number])) == 1 for number in set(groups.tolist()))
    assert set(np.flatnonzero(splits == "excluded")) == {3, 4, 5}
    counts = {name: int((splits == name).sum()) for name in ("train", "val", "test")}
    assert np.abs(np.array(list(counts.values())) - 297 * np.array([0.7, 0.1, 0.2])).max() <= 6


def test_prepared_data_keeps_all_labels(tmp_path: Path) -> None:
    """A re-encoded copy under the same labels stays with its original, one under other labels is excluded with it."""
    rows = []
    for i in range(12):
        picture = Image.fromarray(synthetic.draw("test", i, 96))
        picture.save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('run|wave', 'sit', '')[i % 3]}")
        if i < 2:
            picture.save(tmp_path / f"copy{i}.jpg", quality=60)
            rows.append(f"copy{i}.jpg,{('wave|run', 'run')[i]}")
    options = PrepareOptions(shares=Shares(0.25, 0.25), multi_label=True, num_workers=1)
    prepared = prepare_data([write_csv(tmp_path / "data.csv", rows)], tmp_path / "out", options)
    rows_of = {row["path"]: row for row in prepared.manifest.table.to_pylist()}
    assert (rows_of["0.png"]["label"], rows_of["2.png"]["label"]) == ("run|wave", "")
    assert rows_of["0.png"]["split"] == rows_of["copy0.jpg"]["split"] != "excluded"
    assert [row["path"] for row in rows_of.values() if row["split"] == "excluded"] == ["1.png", "copy1.jpg"]
    spec = f"manifest:{tmp_path}/out/manifest.parquet"
    sources = [make_multi_label_source(spec, split) for split in ("train", "val", "test")]
    assert {source.labels for source in sources} == {("run", "sit", "wave")}
    for source in sources:
        for i in range(len(source)):
            assert "|".join(source.names_of(i)) == rows_of[Path(source.path(i) or "").name]["label"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "14 images of 3 classes" in page
    assert "(no label)" in page
    with pytest.raises(UserError, match=r"several labels each; set data[.]multi_label=True"):
        make_source(spec, "train")
    with pytest.raises(UserError, match=r"--model=x: is for images with one label each"):
        prepare_data([f"csv:{tmp_path}/data.csv"], tmp_path / "other", PrepareOptions(model="x", multi_label=True))


def test_a_part_without_a_share_stays_empty() -> None:
    targets = np.random.default_rng(0).random((50, 4)) < 0.3
    assert set(stratify(targets, np.ones(50, np.int64), (0.7, 0.0, 0.3), 0).tolist()) == {0, 2}
