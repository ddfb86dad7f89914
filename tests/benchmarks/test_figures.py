"""The documentation states what docs/figures.json holds, and each figure there names the command that measures it."""

import json
import shutil

import pytest

from benchmarks import figures
from clip_har_jax.errors import UserError


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the documentation."""
    for page in figures.pages():
        target = tmp_path / page.relative_to(figures.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    return tmp_path


def test_the_texts_say_what_was_measured():
    known = json.loads(figures.FILE.read_text())
    assert list(figures.differences(known)) == []


def test_each_figure_says_where_it_comes_from():
    for name, figure in json.loads(figures.FILE.read_text()).items():
        assert set(figure) == set(figures.FIELDS), name
        assert figure["command"].startswith(("python ", "bash ")), name
        assert figure["machine"] and figure["date"], name


def test_a_figure_that_moved_is_found_and_written(copy):
    page = copy / "docs" / "performance.md"
    page.write_text("It takes <!--f:a.b-->1,234.5 s<!--/f--> and <!--f:a.c-->9<!--/f-->.\n")
    known = {"a.b": {"value": 1234.5}, "a.c": {"value": 9.4}}
    assert not [line for line in figures.differences(known, copy) if "a." in line]  # a text may round
    known["a.b"]["value"] = 2000.04
    (found,) = [line for line in figures.differences(known, copy) if "a.b" in line]
    assert "a.b is 2000.04, the text says 1,234.5 s" in found
    figures.write_pages(known, copy)
    assert page.read_text() == "It takes <!--f:a.b-->2,000.0 s<!--/f--> and <!--f:a.c-->9<!--/f-->.\n"
    del known["a.c"]
    assert [line for line in figures.differences(known, copy) if "no figure is called a.c" in line]


def test_numbers_of_a_benchmark_have_names():
    line = {"benchmark": "x", "ratio": 1.5, "ok": True, "rows": {"10,000 rows": {"s": 2}}}
    assert dict(figures.numbers(line, "x")) == {"x.ratio": 1.5, "x.rows.10_000_rows.s": 2}
    with pytest.raises(UserError, match="needs a number"):
        figures.shown(1.0, "many")
