"""Sources: the same examples, labels and names from every kind of data, and refusals for data that can't serve."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax.config import AugmentConfig
from clip_har_jax.data import sources, synthetic
from clip_har_jax.data.augment import augment
from clip_har_jax.data.manifest import make_manifest, write_split_manifest
from clip_har_jax.data.sources import SubsetSource, has_clips, make_source
from clip_har_jax.data.splits import hold_out
from clip_har_jax.errors import UserError
from clip_har_jax.preprocess import Preprocess
from tests.support.sources import CLASSES, check_source, encoded


def make_folder(root: Path, count: int = 3) -> None:
    """Images run/0.png ... and sit/0.png ..., of values 0 ... and 100 ..."""
    for i, label in enumerate(CLASSES):
        (root / label).mkdir(parents=True)
        for k in range(count):
            (root / label / f"{k}.png").write_bytes(encoded(100 * i + k))


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as info:
        make()
    assert "\n" not in str(info.value)
    return str(info.value)


def test_folder_source(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    source = make_source(f"folder:{tmp_path}/data", "train")
    check_source(source, CLASSES, [0, 0, 0, 1, 1, 1])
    assert source[4].name == str(tmp_path / "data/sit/1.png")
    assert source[4].data == encoded(101)


def test_csv_source_in_the_order_of_the_file_and_the_classes_given(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    (tmp_path / "data.csv").write_text("filename,label\nsit/0.png,sit\nrun/0.png,run\nsit/1.png,sit\n")
    check_source(make_source(f"csv:{tmp_path}/data.csv", "train"), ("run", "sit"), [1, 0, 1])
    check_source(
        make_source(f"csv:{tmp_path}/data.csv", "train", ("walk", "sit", "run")), ("walk", "sit", "run"), [1, 2, 1]
    )
    message = refusal(lambda: make_source(f"csv:{tmp_path}/data.csv", "train", ("run", "site")))
    assert "label 'sit' (2 images) is none of the 2 classes; did you mean 'site'?" in message


def test_fingerprint_tells_listings_apart(tmp_path: Path) -> None:
    make_folder(tmp_path / "one/data")
    make_folder(tmp_path / "two/data")
    first, second = (make_source(f"folder:{tmp_path}/{name}/data", "train").fingerprint for name in ("one", "two"))
    assert first == second, "where the data lies doesn't matter"
    (tmp_path / "two/data/run/0.png").write_bytes(encoded(0) + b"x")
    third = make_source(f"folder:{tmp_path}/two/data", "train").fingerprint
    (tmp_path / "two/data/run/0.png").rename(tmp_path / "two/data/sit/9.png")
    fourth = make_source(f"folder:{tmp_path}/two/data", "train").fingerprint
    assert len({first, third, fourth}) == 3


def test_file_that_vanished_is_an_os_error_with_its_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    source = make_source(f"folder:{tmp_path}/data", "train")
    (tmp_path / "data/run/1.png").unlink()
    with pytest.raises(OSError, match=r"run/1\.png"):
        source[1]


def test_one_class_is_refused_where_several_are_needed(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    for path in (tmp_path / "data/sit").iterdir():
        path.unlink()
    spec = f"folder:{tmp_path}/data"
    assert len(make_source(spec, "test")) == 3
    message = refusal(lambda: make_source(spec, "train", several_classes=True))
    assert message == f"{spec}: all 3 images are of one class, 'run'; training needs two"


def test_synthetic_source() -> None:
    source = make_source("synthetic", "val")
    assert source.labels == synthetic.LABELS
    assert len(source) == synthetic.SPLITS["val"]
    example = source[17]
    assert example.label == source.label_ids[17] == synthetic.label_of("val", 17)
    assert example.name == "synthetic/val/17"
    np.testing.assert_array_equal(example.data, synthetic.draw("val", 17))
    backwards = make_source("synthetic?split=val", "train", synthetic.LABELS[::-1])
    assert backwards.labels[backwards[17].label] == source.labels[example.label]
    assert len({make_source(f"synthetic?split={name}", "train").fingerprint for name in synthetic.SPLITS}) == 3
    assert "no split 'dev'" in refusal(lambda: make_source("synthetic?split=dev", "train"))


@pytest.mark.parametrize("kind", ["synthetic", "motion"])
def test_all_drawn_examples_are_kept(kind: str) -> None:
    source = make_source(kind, "val")
    assert len(source) > 0 and source.tally.to_json() == {"kept": len(source), "ignored": {}, "empty": [], "notes": []}


def test_subset_source(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    whole = make_source(f"folder:{tmp_path}/data", "train")
    subset = SubsetSource(whole, np.array([5, 1]))
    check_source(subset, CLASSES, [1, 0])
    assert [subset[i] for i in range(2)] == [whole[5], whole[1]]
    assert subset.fingerprint not in (whole.fingerprint, SubsetSource(whole, np.array([5, 2])).fingerprint)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a place for Hugging Face data sets, whose cache goes with it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_parquet(path: Path, ids: Sequence[int | None], names: Sequence[str] = CLASSES) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": encoded(k), "path": None} for k in range(len(ids))]
    datasets.Dataset.from_dict({"image": images, "label": list(ids)}, features=features).to_parquet(str(path))


def test_hugging_face_folder_of_images(hub: Path) -> None:
    for split in ("train", "test"):
        make_folder(hub / "data" / split)
    source = make_source(f"hf:{hub}/data", "val")
    check_source(source, CLASSES, [0, 0, 0, 1, 1, 1])
    assert source[3].data == encoded(100)
    assert source[3].name == f"hf:{hub}/data#3"


def test_hugging_face_parquet_and_its_unlabelled_test_split(hub: Path) -> None:
    write_parquet(hub / "data/train-0.parquet", [1, 0, 1, 0])
    write_parquet(hub / "data/test-0.parquet", [0, 0, 0])
    spec = f"hf:{hub}/data"
    check_source(make_source(spec, "train"), CLASSES, [1, 0, 1, 0])
    check_source(make_source(f"{spec}?split=train[1:3]", "test", ("sit", "run")), ("sit", "run"), [1, 0])
    message = refusal(lambda: make_source(spec, "test"))
    assert f"the test split of {hub}/data carries no labels (all 3 rows say 'run'); use ?split=train" in message
    message = refusal(lambda: make_source(f"{spec}?split=dev", "test"))
    assert "no split 'dev'; it has train, test" in message


@pytest.mark.parametrize(
    ("ids", "said"),
    [([None, None], "all 2 rows say no class"), ([-1, -1], "all 2 rows say no class"), ([0, 1, -1], "1 of 3 rows")],
)
def test_hugging_face_rows_without_a_class_are_refused(hub: Path, ids: Sequence[int | None], said: str) -> None:
    write_parquet(hub / "data/train-0.parquet", ids)
    assert said in refusal(lambda: make_source(f"hf:{hub}/data", "train"))


def test_hugging_face_without_network_or_labels(hub: Path) -> None:
    message = refusal(lambda: make_source("hf:nobody/nothing", "train"))
    assert message.startswith("hf:nobody/nothing: the Hub at https://")
    assert "check the name and the network" in message
    import datasets

    (hub / "data").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(hub / "data/train-0.parquet"))
    assert "has no image column, only text" in refusal(lambda: make_source(f"hf:{hub}/data", "train"))


def test_damaged_row_is_an_os_error_with_its_name(hub: Path) -> None:
    make_folder(hub / "data/train")
    source = make_source(f"hf:{hub}/data", "train")
    (hub / "data/train/sit/0.png").unlink()
    with pytest.raises(OSError, match="No such file") as info:
        source[3]
    assert info.value.filename == f"hf:{hub}/data#3"


# In a process of its own: TensorFlow must stay out of it, and other tests may have imported it.
TFDS_CHECK = """
import pickle, sys
from pathlib import Path
import tensorflow_datasets as tfds
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from tests.support.sources import CLASSES, check_source, encoded

root = sys.argv[1]

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(root)

    def _info(self):
        label = tfds.features.ClassLabel(names=CLASSES)
        features = {"id": tfds.features.Text(), "photo": tfds.features.Image(), "action": label}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for k in range(count):
            yield k, {"id": str(k), "photo": encoded(k), "action": k % 2}

def refused(spec):
    try:
        make_source(spec, "train")
    except UserError as error:
        return str(error)

Tiny(data_dir=root, file_format="array_record").download_and_prepare()
spec = f"tfds:tiny?data_dir={root}"
source = make_source(spec, "val")
ids = source.label_ids.tolist()
assert sorted(ids) == [0, 0, 1, 1], ids
check_source(source, CLASSES, ids)
assert {(source[i].data, source[i].label) for i in range(4)} == {(encoded(k), k % 2) for k in range(4)}
assert len(make_source(spec, "train", ("sit", "run"))) == 6
assert len(make_source(spec + "&split=train[:2]", "test")) == 2
assert "no split 'dev'; it has train, test" in refused(spec + "&split=dev")
assert "TFDS can't open it" in refused(f"tfds:tinny?data_dir={root}")
info = Path(root, "tiny/1.0.0/dataset_info.json")
info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
assert "tfrecord files, which have no random access; prepare it with" in refused(spec), refused(spec)
print([name for name in ("tensorflow", "jax") if name in sys.modules])
"""


def test_tfds_source_without_tensorflow(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "error", "-c", TFDS_CHECK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(0, 2**40))
def test_hold_out_is_stratified(ids: list[int], fraction: float, seed: int) -> None:
    label_ids = np.asarray(ids, np.int32)
    train, val = hold_out(label_ids, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(ids)))
    for label, count in zip(*np.unique(label_ids, return_counts=True), strict=True):
        held = int((label_ids[val] == label).sum())
        assert 0 <= held < count
        if count > 1:
            assert held == min(max(1, round(fraction * count)), count - 1)
    again = hold_out(label_ids, fraction, seed)
    np.testing.assert_array_equal(again[1], val)


def test_hold_out_depends_on_the_seed() -> None:
    label_ids = np.repeat(np.arange(3, dtype=np.int32), 20)
    assert hold_out(label_ids, 0.5, 0)[1].tolist() != hold_out(label_ids, 0.5, 1)[1].tolist()
    assert hold_out(label_ids, 0.0, 0)[1].size == 0


def gradient(height: int, width: int) -> np.ndarray:
    """Return an image whose red tells the column and whose green tells the row, 0 to 255."""
    red, green = np.linspace(0, 255, width), np.linspace(0, 255, height)
    image = np.zeros((height, width, 3))
    image[..., 0], image[..., 1] = red[None], green[:, None]
    return image.round().astype(np.uint8)


def seen_box(image: np.ndarray) -> tuple[float, float]:
    """(width, height) shares of a gradient that a crop shows."""
    values = image.astype(float)
    return np.ptp(values[..., 0].mean(0)) / 255, np.ptp(values[..., 1].mean(1)) / 255


def test_crops_keep_the_area_and_aspect_asked_for() -> None:
    image, config = gradient(150, 200), AugmentConfig(crop_scale_min=0.3, flip=False)
    boxes = [seen_box(augment(image, Preprocess(96), config, np.random.default_rng(seed))) for seed in range(300)]
    areas = np.array([width * height for width, height in boxes])
    aspects = np.array([width * 200 / (height * 150) for width, height in boxes])
    assert 0.26 < areas.min() < 0.36
    assert areas.max() > 0.75
    assert 0.7 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.42


def test_augmentation_is_a_function_of_its_generator() -> None:
    image, config = gradient(40, 60), AugmentConfig(crop_scale_min=0.5)
    first, again, other = (augment(image, Preprocess(32), config, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_flip_mirrors_half_of_the_images() -> None:
    image = gradient(32, 32)
    off, on = AugmentConfig(crop_scale_min=1.0, flip=False), AugmentConfig(crop_scale_min=1.0)
    flipped = 0
    for seed in range(100):
        np.testing.assert_array_equal(augment(image, Preprocess(32), off, np.random.default_rng(seed)), image)
        result = augment(image, Preprocess(32), on, np.random.default_rng(seed))
        is_flipped = bool((result != image).any())
        np.testing.assert_array_equal(result, image[:, ::-1] if is_flipped else image)
        flipped += is_flipped
    assert 30 < flipped < 70


@pytest.mark.parametrize("shape", [(2, 2), (1000, 5), (3, 300)])
@pytest.mark.parametrize("scale_min", [0.0, 0.6, 1.0])
def test_any_shape_can_be_cropped(shape: tuple[int, int], scale_min: float) -> None:
    for seed in range(10):
        config = AugmentConfig(crop_scale_min=scale_min)
        assert augment(gradient(*shape), Preprocess(16), config, np.random.default_rng(seed)).shape == (16, 16, 3)


def test_contents_are_sampled_once_in_a_start(tmp_path: Path) -> None:
    for i, label in enumerate("aabb"):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / label / f"{i}.png").write_bytes(encoded(i))
    before = make_source(f"folder:{tmp_path}/images", "train").fingerprint
    read = sources._sample.cache_info().misses
    assert make_source(f"folder:{tmp_path}/images", "val").fingerprint == before
    assert sources._sample.cache_info().misses == read
    file = sorted((tmp_path / "images").rglob("*.png"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    assert make_source(f"folder:{tmp_path}/images", "train").fingerprint != before


def test_a_manifest_tells_by_its_metadata_whether_it_lists_clips(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    for clips in (False, True):
        write_split_manifest(make_manifest([], tmp_path, {"clips": True} if clips else {}), path)
        assert has_clips(f"manifest:{path}") is clips
    assert has_clips("motion") and has_clips(f"video:{tmp_path}") and not has_clips("synthetic")
    assert not has_clips(f"manifest:{tmp_path}/missing.parquet")
