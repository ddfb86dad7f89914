"""A CSV is checked as a table, and each fault is told with its lines."""

from pathlib import Path

import pytest

from clip_har_jax.csv_files import list_csv
from clip_har_jax.listing import Tally
from clip_har_jax.specs import parse_spec
from tests.support.listings import list_files, listed, refusal, touch, write_csv


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
    "content",
    [
        b"filename;label\r\na.jpg;run\r\n",
        b"sep=;\r\nlabel;filename\r\nrun;a.jpg\r\n",
        b"filename\tlabel\na.jpg\trun\n",
        '\ufeff"filename"\t"label"\r\na.jpg\trun\r\n'.encode("utf-16-le"),
        b"filename,label\ra.jpg,run\r",
    ],
)
def test_csv_of_other_spreadsheets(tmp_path: Path, content: bytes) -> None:
    """With semicolons where a comma is the decimal point, with tabs, as Unicode text, with a Mac's line ends."""
    touch(tmp_path, "a.jpg")
    (tmp_path / "x.csv").write_bytes(content)
    assert [label for _, label in listed(f"csv:{tmp_path}/x.csv")] == ["run"]


def test_csv_names_a_file_in_another_unicode_form(tmp_path: Path) -> None:
    """As macOS and Linux write them."""
    touch(tmp_path, "cafe\u0301.jpg", "b\u00e4r.jpg")
    write_csv(tmp_path / "x.csv", ["caf\u00e9.jpg,run", "ba\u0308r.jpg,walk"])
    assert [label for _, label in listed(f"csv:{tmp_path}/x.csv")] == ["run", "walk"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"file,class\na.jpg,run\n", "it has 'file,class'"),
        (b"filename|label\na.jpg|run\n", "comma-separated"),
        (b"", "it has 'nothing'"),
        (b"filename,label\n", "no rows below the header"),
        (b"filename,label\na.jpg,run\na.jpg\n", "line 3 has no filename or no label"),
        (b"filename,label\na.jpg,run\n\n,run\n", "line 4 has no filename or no label"),
        (b"filename,label\na.jpg,caf\xe9\n", "save it as comma-separated UTF-8"),
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"filename,label\na.jpg,run\na.jpg,run,x\nb.jpg,sit,\n", "lines 3, 4 have more cells than the header"),
        (b"filename,label,label\na.jpg,run,sit\n", "names the column 'label' 2 times"),
        (b"Filename,filename,label\na.jpg,b.jpg,run\n", "names the column 'filename' 2 times"),
        (b"filename,label\na.jpg,run\nb.jpg,run\na.jpg,sit\n", "'a.jpg' is 'run' in line 2 and 'sit' in line 4"),
        (b"filename,label\na\x07.jpg,run\n", "line 2: the name 'a\\x07.jpg' holds a control character"),
        (b"filename,label\na.jpg,r\x00n\n", "control character"),
    ],
)
def test_a_table_with_a_fault_is_told_with_its_lines(tmp_path: Path, content: bytes, said: str) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "data.csv").write_bytes(content)
    assert said in refusal(f"csv:{tmp_path}/data.csv")


def test_headers_are_found_in_any_case_and_with_spaces(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    spec = write_csv(tmp_path / "data.csv", ["7,a.jpg,run"], "id, FileName ,\u200bLabel")
    assert [label for _, label in listed(spec)] == ["run"]


def test_windows_paths_and_repeated_rows_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.jpg", "b.jpg")
    spec = write_csv(tmp_path / "data.csv", [r"sub\a.jpg,run", "b.jpg,sit", "b.jpg,sit", "sub/a.jpg,run"])
    tally = Tally()
    assert [label for _, label in list_csv(parse_spec(spec), tally)] == ["run", "sit"]
    assert tally.notes == ["line 2 has a Windows path; its backslashes were read as slashes"]
    assert tally.ignored == {"repeated rows": 2} and tally.kept == 2


def test_a_file_written_in_two_ways_is_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "sub/b.jpg")
    spec = write_csv(tmp_path / "data.csv", ["a.jpg,run", "sub/../a.jpg,sit"])
    assert "'sub/../a.jpg' is 'run' in line 2 and 'sit' in line 3" in refusal(spec)
    tally = Tally()
    spec = write_csv(tmp_path / "data.csv", ["a.jpg,run", "sub/../a.jpg,run", "sub/b.jpg,sit"])
    assert list_csv(parse_spec(spec), tally) == [(tmp_path / "a.jpg", "run"), (tmp_path / "sub/b.jpg", "sit")]
    assert tally.ignored == {"repeated rows": 1} and tally.kept == 2


def test_labels_of_a_table_follow_the_rule_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    spec = write_csv(tmp_path / "data.csv", ["a.jpg,run ", "b.jpg,ru\u200bn", "c.jpg,None"])
    tally = Tally()
    assert [label for _, label in list_csv(parse_spec(spec), tally)] == ["run", "run", "None"]
    assert tally.notes == ["label 'None' (1 examples) reads like a missing value; is it an action?"]
