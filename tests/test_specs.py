"""What a person types to name data, and every mistake in it: one line that names the place and says what to do."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax.errors import UserError
from clip_har_jax.specs import KINDS, Spec, find_images, label_ids, list_files, parse_spec


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


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("synthetic", Spec("synthetic", "")),
        ("synthetic?split=val", Spec("synthetic", "", {"split": "val"})),
        ("folder:/a b/c:d", Spec("folder", "/a b/c:d")),
        ("csv:x/train.csv?images=/a+b/100%20", Spec("csv", "x/train.csv", {"images": "/a+b/100%20"})),
        (
            "tfds:name/config:1.0.0?split=test&data_dir=/d",
            Spec("tfds", "name/config:1.0.0", {"split": "test", "data_dir": "/d"}),
        ),
        ("hf:owner/name?split=train[:10%]", Spec("hf", "owner/name", {"split": "train[:10%]"})),
    ],
)
def test_spec_is_parsed_as_typed(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foldr:/x", "did you mean 'folder'"),
        ("", "accepted: 'synthetic', 'folder', 'csv', 'manifest', 'video', 'tfds', 'hf'"),
        ("audio:/x", "unknown kind 'audio'"),
        ("data/train.csv", "write csv:data/train.csv"),
        ("folder:", "write folder:PATH"),
        ("hf", "write hf:OWNER/NAME"),
        ("synthetic:train", "write synthetic"),
        ("folder:/x?splt=test", "unknown option 'splt'; did you mean 'split'?"),
        ("csv:/x.csv?split=test", "unknown option 'split'; accepted: 'images'"),
        ("synthetic?split", "option 'split' has no value"),
        ("synthetic?", "option '' has no value"),
    ],
)
def test_wrong_spec_is_refused_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(UserError) as info:
        parse_spec(text)
    assert repr(text) in str(info.value)
    assert said in str(info.value)


def test_bare_folder_is_told_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"write folder:{tmp_path}$"):
        parse_spec(str(tmp_path))


@given(st.builds(str.__add__, st.sampled_from([*KINDS, ""]), st.text(":?=&/ splitv\0é", max_size=16)))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        spec = parse_spec(text)
    except UserError:
        return
    assert spec.kind in KINDS
    assert set(spec.options) <= set(KINDS[spec.kind][1])


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


@pytest.mark.parametrize("place", [".", "train", "elsewhere"])
def test_csv_finds_its_files(tmp_path: Path, place: str) -> None:
    touch(tmp_path / place, "b.jpg", "sub/a.jpg")
    spec = write_csv(tmp_path / "train.csv", ["b.jpg,run", '"sub/a.jpg", sit '])
    spec += f"?images={tmp_path / place}" if place == "elsewhere" else ""
    files = list_files(parse_spec(spec), "train")
    assert files == [(tmp_path / place / "b.jpg", "run"), (tmp_path / place / "sub/a.jpg", "sit")]


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    touch(tmp_path, "ä.jpg")
    (tmp_path / "x.csv").write_bytes("\ufefflabel,id,filename\r\nrun,7,ä.jpg\r\n\r\n".encode())
    assert [label for _, label in listed(f"csv:{tmp_path}/x.csv")] == ["run"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"file,class\na.jpg,run\n", "it has 'file,class'"),
        (b"filename;label\na.jpg;run\n", "comma-separated"),
        (b"", "it has 'nothing'"),
        (b"filename,label\n", "no rows below the header"),
        (b"filename,label\na.jpg,run\na.jpg\n", "line 3 has no filename or no label"),
        (b"filename,label\na.jpg,run\n\n,run\n", "line 4 has no filename or no label"),
        (b"\xff\xfef\x00i\x00", "save it as comma-separated UTF-8"),
        (
            b"filename,label\na.jpg,run\nb.jpg,run\nc.jpg,run\n",
            "2 of 3 files are missing, the first is 'b.jpg' (line 3)",
        ),
    ],
)
def test_unusable_csv_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "data.csv").write_bytes(content)
    message = refusal(f"csv:{tmp_path}/data.csv")
    assert message.startswith(f"{tmp_path}/data.csv: ")
    assert said in message


def test_missing_csv_and_folder_of_images_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(f"csv:{tmp_path}/none.csv")
    assert "not a file" in refusal(f"csv:{tmp_path}")
    spec = write_csv(tmp_path / "data.csv", ["a.jpg,run"])
    assert f"looked in {tmp_path}/nowhere;" in refusal(f"{spec}?images={tmp_path}/nowhere")
    assert f"looked in {tmp_path} and {tmp_path}/data;" in refusal(spec)
    assert f"csv:{tmp_path}/data.csv?images=DIR" in refusal(spec)


def test_labels_follow_the_classes_given() -> None:
    assert label_ids(["sit", "run", "sit"], ["run", "walk", "sit"], "x") == [2, 0, 2]
    with pytest.raises(UserError, match=r"x: label 'runing' \(2 images\) is none of the 2 classes; did you mean 'run'"):
        label_ids(["runing", "sit", "runing"], ["run", "sit"], "x")
    with pytest.raises(UserError, match="class 'run' is listed twice"):
        label_ids(["run"], ["run", "sit", "run"], "x")
