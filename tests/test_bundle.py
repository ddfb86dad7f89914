"""The model folder: actions.json is read strictly, a sealed folder refuses changes, replacing is all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_har_jax import bundle
from clip_har_jax.bundle import Actions
from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json
from clip_har_jax.folders import replace_folder

ACTIONS = Actions(("running", "riding a bike"), {"running": ("a", "b"), "riding a bike": ("c",)}, 1.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "nested" / "more.bin").write_bytes(b"more")
    (folder / "README.md").write_text("card")
    bundle.write_actions(folder, ACTIONS)
    return folder


def test_actions_round_trip(folder: Path) -> None:
    assert bundle.read_actions(folder) == ACTIONS
    assert json.loads((folder / "actions.json").read_text()) == {
        "labels": ["running", "riding a bike"],
        "prompts": {"running": ["a", "b"], "riding a bike": ["c"]},
        "temperature": 1.5,
        "head": "cosine",
    }


def test_temperature_and_head_have_defaults(folder: Path) -> None:
    write_json(folder / "actions.json", {"labels": ["x"], "prompts": {"x": ["y"]}})
    assert bundle.read_actions(folder) == Actions(("x",), {"x": ("y",)}, 1.0, "cosine")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": None}, "'labels'"),
        ({"labels": []}, "'labels'"),
        ({"labels": ["running", 3]}, "'labels'"),
        ({"labels": ["running", "running"]}, "'labels' holds a label twice"),
        ({"prompts": {"running": ["a"]}}, "'prompts'"),
        ({"prompts": {"running": ["a"], "riding a bike": []}}, "'prompts.riding a bike'"),
        ({"prompts": {"running": "a", "riding a bike": ["c"]}}, "'prompts.running'"),
        ({"temperature": 0}, "'temperature'"),
        ({"temperature": True}, "'temperature'"),
        ({"temperature": "1"}, "'temperature'"),
        ({"head": "linaer"}, "'head'"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_wrong_actions_name_file_and_key(folder: Path, change: dict[str, Any], named: str) -> None:
    path = folder / "actions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        bundle.read_actions(folder)
    assert str(path) in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"prompts": {}}', '{"labels": ["a"], "prompts": {"a": ["b"]}, "temperature": NaN}']
)
def test_damaged_actions_are_refused(folder: Path, text: str) -> None:
    (folder / "actions.json").write_text(text)
    with pytest.raises(UserError, match=r"actions\.json"):
        bundle.read_actions(folder)


def test_actions_not_utf8(folder: Path) -> None:
    (folder / "actions.json").write_bytes(b'{"labels": ["\xff"]}')
    with pytest.raises(UserError, match="not JSON"):
        bundle.read_actions(folder)


def test_seal_and_verify(folder: Path) -> None:
    assert bundle.verify(folder) is None
    digest = bundle.seal(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["digest"] == digest == bundle.verify(folder)
    assert manifest["format_version"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "nested/more.bin", "actions.json"}


def test_the_digest_depends_on_contents_and_names_alone(folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere"
    twin.mkdir()
    for name in ("actions.json", "model.safetensors", "nested/more.bin"):
        (twin / name).parent.mkdir(exist_ok=True)
        (twin / name).write_bytes((folder / name).read_bytes())
    assert bundle.seal(twin) == bundle.seal(folder)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"), "model.safetensors: changed"),
    "one bit": (lambda folder: (folder / "nested/more.bin").write_bytes(b"mora"), "nested/more.bin: changed"),
    "missing": (lambda folder: (folder / "actions.json").unlink(), "actions.json: missing"),
    "added": (lambda folder: (folder / "head.safetensors").write_bytes(b""), "head.safetensors: not part"),
    "renamed": (lambda folder: (folder / "nested/more.bin").rename(folder / "nested/most.bin"), "more.bin: missing"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_sealed_folder_refuses_changes(folder: Path, kind: str) -> None:
    change, named = CHANGES[kind]
    bundle.seal(folder)
    change(folder)
    with pytest.raises(UserError, match=named):
        bundle.verify(folder)


def test_the_card_and_hidden_files_are_outside_the_seal(folder: Path) -> None:
    digest = bundle.seal(folder)
    (folder / "README.md").write_text("another card")
    (folder / ".gitattributes").write_text("from the hub")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    assert bundle.verify(folder) == digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"files": None}, "'files'"),
        ({"files": {"actions.json": 3}}, "'files'"),
        ({"digest": "0" * 64}, "'digest'"),
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, change: dict[str, Any], named: str) -> None:
    bundle.seal(folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=named):
        bundle.verify(folder)


def test_a_folder_is_sealed_once(folder: Path) -> None:
    bundle.seal(folder)
    with pytest.raises(UserError, match="sealed already"):
        bundle.seal(folder)


def test_replace_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"
    for text in ("first", "second"):

        def fill(folder: Path, text: str = text) -> None:
            (folder / text).write_text(text)

        assert replace_folder(target, fill) == target
        assert [path.name for path in target.iterdir()] == [text]
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    target = replace_folder(tmp_path / "model", lambda folder: (folder / "old").write_text(""))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_between_the_renames_is_mended(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "old").write_text("")
    (tmp_path / ".model.partial").mkdir()

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["old"]
