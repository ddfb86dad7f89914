"""The clips of `video:PATH`: one folder per class, or UCF101 and HMDB51 with their official split files."""

import re
from collections.abc import Iterator
from pathlib import Path

from clip_har_jax.errors import UserError
from clip_har_jax.listing import VIDEO_SUFFIXES, Tally, list_folder
from clip_har_jax.specs import Spec

FOLDS = (1, 2, 3)
HMDB_USE = {"1": "train", "2": "test"}  # 0: in neither


def list_videos(spec: Spec, split: str, tally: Tally | None = None) -> list[tuple[Path, str]]:
    """Return the (file, label) pairs of a video SPEC, in the same order on every machine.

    Where PATH holds UCF101's `ucfTrainTestlist` or HMDB51's `testTrainMulti_7030_splits`, they say what is train and
    test (`?fold=1`, 2 or 3); validation clips are then the test clips, as there are no others.

    Raises:
      UserError: nothing is there, or clips in the split files are missing; names the first one and their number.
    """
    tally = Tally() if tally is None else tally
    root = Path(spec.path).expanduser()
    split = spec.options.get("split", split)
    lists = next((path for path in _ucf_lists(root)), None)
    if lists is not None:
        return _resolve(spec, lists.parent, _read_ucf(lists, _official(spec, split), _fold(spec)), tally)
    lists = next((path for path in _hmdb_lists(root)), None)
    if lists is not None:
        return _resolve(spec, lists.parent, _read_hmdb(lists, _official(spec, split), _fold(spec)), tally)
    if "fold" in spec.options:
        raise UserError(f"{spec}: no official split files in {root}, so it has no folds; leave ?fold out")
    return list_folder(spec, split, VIDEO_SUFFIXES, "clips", tally)


def _ucf_lists(root: Path) -> Iterator[Path]:
    places = (root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist")
    return (path for path in places if (path / "trainlist01.txt").is_file())


def _hmdb_lists(root: Path) -> Iterator[Path]:
    names = ("testTrainMulti_7030_splits", "test_train_splits", "splits")
    places = [folder / name for folder in (root, root.parent) for name in names]
    return (path for path in places if any(path.glob("*_test_split1.txt")))


def _official(spec: Spec, split: str) -> str:
    official = {"train": "train", "val": "test", "test": "test"}.get(split)
    if official is None:
        raise UserError(f"{spec}: no split {split!r}; its official split files know train and test")
    return official


def _fold(spec: Spec) -> int:
    fold = spec.options.get("fold", "1")
    if fold not in map(str, FOLDS):
        raise UserError(f"{spec}: fold {fold!r}; the official ones are 1, 2 and 3")
    return int(fold)


def _read_ucf(lists: Path, split: str, fold: int) -> list[tuple[str, str]]:
    """Return (file below the classes' folder, label) pairs; lines: `Class/clip.avi`, in train lists with a number."""
    text = (lists / f"{split}list{fold:02d}.txt").read_text(encoding="utf-8")
    names = [re.sub(r"\s+\d+$", "", line.strip()).replace("\\", "/") for line in text.splitlines() if line.strip()]
    return [(name, name.split("/")[0]) for name in names]


def _read_hmdb(lists: Path, split: str, fold: int) -> list[tuple[str, str]]:
    """Return (file below the classes' folder, label) pairs; one file per class, with lines `clip.avi 1`."""
    ending = f"_test_split{fold}.txt"
    rows = []
    for path in sorted(lists.glob(f"*{ending}")):
        label = path.name.removesuffix(ending)
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, use = line.strip().rpartition(" ")
            if name and HMDB_USE.get(use) == split:
                rows.append((f"{label}/{name.strip()}", label))
    return rows


def _resolve(spec: Spec, parent: Path, rows: list[tuple[str, str]], tally: Tally) -> list[tuple[Path, str]]:
    """Return the rows' files: below PATH, or the folder of classes in it or beside the split files."""
    root = Path(spec.path).expanduser()
    if not rows:
        raise UserError(f"{spec}: its split files name no clips of this split")
    label = rows[0][1]
    places = [root, *sorted(path for path in [*root.iterdir(), *parent.iterdir()] if path.is_dir())]
    base = next((place for place in places if (place / label).is_dir()), None)
    if base is None:
        raise UserError(f"{spec}: no folder {label!r} of clips in {root}, which its split files name; unpack the clips")
    missing = [name for name, _ in rows if not (base / name).is_file()]
    if missing:
        raise UserError(
            f"{spec}: {len(missing)} of the {len(rows)} clips that its split files name are missing in {base}, the "
            f"first is {missing[0]}; unpack them all"
        )
    tally.kept = len(rows)
    return [(base / name, label) for name, label in rows]
