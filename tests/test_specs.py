"""What a person types to name data, and every mistake in it: one line that names the place and says what to do."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_har_jax.errors import UserError
from clip_har_jax.specs import KINDS, Spec, parse_spec


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
        ("", "accepted: 'synthetic', 'motion', 'folder', 'csv', 'manifest', 'video', 'tfds', 'hf'"),
        ("audio:/x", "unknown kind 'audio'"),
        ("data/train.csv", "write csv:data/train.csv"),
        ("folder:", "write folder:PATH"),
        ("hf", "write hf:OWNER/NAME"),
        ("synthetic:train", "write synthetic"),
        ("folder:/x?splt=test", "unknown option 'splt'; did you mean 'split'?"),
        ("csv:/x.csv?spilt=test", "unknown option 'spilt'; did you mean 'split'"),
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


@pytest.mark.parametrize("name", ["a?b", "a#b", "what?split=train", "50%", "a%3Fb"])
def test_a_path_with_marks_can_be_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    spec = parse_spec(f"folder:{tmp_path}/{name}")
    assert spec == Spec("folder", f"{tmp_path}/{name}")
    assert parse_spec(f"folder:{tmp_path}/{name}?split=val") == Spec("folder", f"{tmp_path}/{name}", {"split": "val"})
    assert parse_spec(str(spec)) == spec


def test_a_path_may_be_escaped(tmp_path: Path) -> None:
    (tmp_path / "a?b").mkdir()
    assert parse_spec(f"folder:{tmp_path}/a%3Fb?split=val") == Spec("folder", f"{tmp_path}/a?b", {"split": "val"})
