"""One walk over class folders: what is kept, what is left out and told, and what is refused."""

import os
from pathlib import Path

import pytest

from clip_har_jax.errors import UserError
from clip_har_jax.listing import VIDEO_SUFFIXES, Tally, find_images, list_folder
from clip_har_jax.specs import parse_spec
from tests.support.listings import list_files, listed, refusal, touch


def test_folder_lists_classes_and_images_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/10.jpeg", "a/z.webp", "a/deep/y.tiff", "a/notes.txt", ".hidden/x.jpg", "top.jpg")
    assert [label for _, label in listed(f"folder:{tmp_path}")] == ["a", "a", "b", "b"]
    names = [path.name for path, _ in list_files(parse_spec(f"folder:{tmp_path}"), "test")]
    assert names == ["z.webp", "y.tiff", "10.jpeg", "2.PNG"]


@pytest.mark.parametrize(
    ("folders", "split", "used"),
    [
        ("train test val", "train", "train"),
        ("train test val", "val", "val"),
        ("train test val", "test", "test"),
        ("train test", "val", "test"),
        ("train validation test", "val", "validation"),
        ("test", "test", "test"),
    ],
)
def test_folder_of_splits_gives_the_split(tmp_path: Path, folders: str, split: str, used: str) -> None:
    touch(tmp_path, *(f"{name}/run/{name}.jpg" for name in folders.split()))
    assert listed(f"folder:{tmp_path}", split) == [(f"{used}/run/{used}.jpg", "run")]


def test_named_split_overrides_the_default(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1.jpg", "test/run/2.jpg", "extra/run/3.jpg")
    assert listed(f"folder:{tmp_path}?split=train", "test") == [("train/run/1.jpg", "run")]
    assert listed(f"folder:{tmp_path}?split=extra", "test") == [("extra/run/3.jpg", "run")]
    assert "no folder 'val'" in refusal(f"folder:{tmp_path}?split=val")
    assert "'extra', 'test', 'train'" in refusal(f"folder:{tmp_path}?split=val")


def test_actions_may_be_called_like_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "test/2.jpg", "rest/3.jpg")
    assert [label for _, label in listed(f"folder:{tmp_path}")] == ["rest", "test", "train"]


def test_split_that_a_folder_lacks_is_not_taken_for_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1.jpg", "val/run/1.jpg")
    message = refusal(f"folder:{tmp_path}", "test")
    assert str(tmp_path) in message
    assert "no folder 'test'" in message
    assert f"folder:{tmp_path}?split=NAME" in message


def test_a_missing_split_of_clips_is_named_by_their_own_kind(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1.mp4", "val/run/1.mp4")
    with pytest.raises(UserError, match=f"choose one with video:{tmp_path}\\?split=NAME"):
        list_folder(parse_spec(f"video:{tmp_path}"), "test", VIDEO_SUFFIXES, "clips")


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"folder:{tmp_path}/none")
    touch(tmp_path, "file.jpg")
    assert "not a folder" in refusal(f"folder:{tmp_path}/file.jpg")
    assert f"{tmp_path}: no class folders" in refusal(f"folder:{tmp_path}")
    touch(tmp_path, "run/readme.txt")
    assert "no images in its 1 class folders" in refusal(f"folder:{tmp_path}")


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "run/1.jpg")

    def denied(path: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", denied)
        message = refusal(f"folder:{tmp_path}")
    assert message.startswith(str(tmp_path))
    assert "Permission denied" in message


@pytest.mark.timeout(20)
def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "data/run/1.jpg", "data/sit/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "data/run/up").symlink_to(tmp_path / "data")  # would give run the images of sit
    (tmp_path / "data/run/self").symlink_to(tmp_path / "data/run")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/endless").symlink_to(tmp_path / "data/endless")
    (tmp_path / "data/walk").symlink_to(tmp_path / "elsewhere")
    files = list_files(parse_spec(f"folder:{tmp_path}/data"), "train")
    assert [(path.name, label) for path, label in files] == [("1.jpg", "run"), ("2.jpg", "sit"), ("3.jpg", "walk")]
    assert [path.name for path in find_images(tmp_path / "data/run")] == ["1.jpg"]


def tally_of(spec: str, split: str = "train") -> Tally:
    tally = Tally()
    list_files(parse_spec(spec), split, tally)
    return tally


def test_everything_below_a_root_is_kept_or_told(tmp_path: Path) -> None:
    touch(
        tmp_path, "run/1.jpg", "run/2.JPE", "run/3.heic", "run/4.avif", "run/5.jp2", "run/6.hdr", "run/noend", "x.jpg"
    )
    touch(
        tmp_path, "run/._1.jpg", "run/.DS_Store", "run/@eaDir/1.jpg", "__MACOSX/run/1.jpg", ".git/x.jpg", "walk/7.jp2"
    )
    tally = tally_of(f"folder:{tmp_path}")
    assert tally.kept == 4
    assert dict(tally.ignored) == {
        ".jp2": 2,
        ".hdr": 1,
        "without a suffix": 1,
        "hidden": 2,
        "folders of the system": 2,
        "folders hidden": 1,
        "beside the class folders": 1,
    }
    assert tally.empty == ["walk"]
    assert tally.to_json()["ignored"] == dict(tally.ignored)
    assert f"2 .jp2 ({tmp_path}/run/5.jp2, ...)" in tally.lines[0]
    assert tally.lines[1] == "no examples in the folders 'walk'"


def test_the_ignore_rule_holds_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "run/a/b/1.jpg", "run/a/b/._2.jpg", "run/a/__MACOSX/3.jpg", "run/a/.cache/deep/4.jpg")
    assert [path.name for path in find_images(tmp_path)] == ["1.jpg"]


@pytest.mark.parametrize("name", ["Train", "TRAIN", "Training"])
def test_splits_are_found_in_any_case(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/run/1.jpg", "TEST/run/2.jpg", "extra/run/3.jpg")
    assert listed(f"folder:{tmp_path}", "train") == [(f"{name}/run/1.jpg", "run")]
    assert listed(f"folder:{tmp_path}", "val") == [("TEST/run/2.jpg", "run")]
    assert listed(f"folder:{tmp_path}?split={name.lower()}", "val") == [(f"{name}/run/1.jpg", "run")]
    assert tally_of(f"folder:{tmp_path}").notes == ["folders beside the splits, of no split: 'extra'"]


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "Train/run/1.jpg", "train/run/2.jpg")
    assert listed(f"folder:{tmp_path}?split=train") == [("train/run/2.jpg", "run")]
    touch(tmp_path, "TEST/run/1.jpg", "Test/run/2.jpg")
    assert "are one split by name" in refusal(f"folder:{tmp_path}", "test")


def test_images_in_deeper_folders_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "sports/run/1.jpg", "sports/jump/2.jpg", "home/cook/3.jpg")
    assert tally_of(f"folder:{tmp_path}").notes == [
        "3 images lie in folders below their class folders, as home/cook, and count as 'home'; if the inner folders "
        "are the classes, name the folder around them"
    ]


def test_folders_whose_names_show_no_difference_are_one_class(tmp_path: Path) -> None:
    touch(tmp_path, "caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "run/3.jpg", "run /4.jpg")
    assert {label for _, label in listed(f"folder:{tmp_path}")} == {"caf\u00e9", "run"}


def test_names_that_are_no_text_are_refused_at_listing(tmp_path: Path) -> None:
    touch(tmp_path, "run/1.jpg", "run/a\nb.jpg")
    assert "holds a control character" in refusal(f"folder:{tmp_path}")
    os.rename(tmp_path / "run/a\nb.jpg", os.fsencode(tmp_path) + b"/run/\xff.jpg")
    assert "bytes that are no UTF-8" in refusal(f"folder:{tmp_path}")


def test_classes_in_natural_order_and_missing_values_pointed_out(tmp_path: Path) -> None:
    touch(tmp_path, "10/1.jpg", "9/1.jpg", "nan/1.jpg")
    assert [label for _, label in listed(f"folder:{tmp_path}")] == ["9", "10", "nan"]
    assert tally_of(f"folder:{tmp_path}").notes == [
        "label 'nan' (1 examples) reads like a missing value; is it an action?"
    ]


@pytest.mark.timeout(60)  # it would wait for a writer
def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "run/1.jpg", "walk/2.jpg")
    os.mkfifo(tmp_path / "run" / "pipe.jpg")
    os.symlink(tmp_path / "run" / "pipe.jpg", tmp_path / "walk" / "link.jpg")
    assert tally_of(f"folder:{tmp_path}").ignored == {"pipes, sockets or devices": 2}


def test_two_classes_that_are_one_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "run/1.jpg", "walk/2.jpg")
    os.symlink(tmp_path / "run", tmp_path / "jog")
    assert "classes 'jog' and 'run' are one folder by a link" in refusal(f"folder:{tmp_path}")


def test_a_split_with_two_folders_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "Train/run/1.jpg", "train/run/2.jpg")
    assert "are one split by name" in refusal(f"folder:{tmp_path}", "train")


def test_a_letter_of_another_alphabet_is_pointed_out(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "c\u0430t/2.jpg")
    assert any("mixes cyrillic and latin letters" in note for note in tally_of(f"folder:{tmp_path}").notes)
