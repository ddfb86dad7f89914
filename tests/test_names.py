"""Which names are the same, which are refused, and the order of classes."""

import pytest

from clip_har_jax.errors import UserError
from clip_har_jax.names import check_distinct, clean_name, label_ids, name_key, sort_labels


def test_labels_follow_the_classes_given() -> None:
    assert label_ids(["sit", "run", "sit"], ["run", "walk", "sit"], "x") == [2, 0, 2]
    with pytest.raises(UserError, match=r"x: label 'runing' \(2 images\) is none of the 2 classes; did you mean 'run'"):
        label_ids(["runing", "sit", "runing"], ["run", "sit"], "x")
    with pytest.raises(UserError, match="class 'run' is listed twice"):
        label_ids(["run"], ["run", "sit", "run"], "x")


def test_differences_that_nobody_sees_are_removed() -> None:
    for written in ("caf\u00e9", "cafe\u0301", " caf\u00e9 ", "caf\u00e9\u200b", "\ufeffcaf\u00e9"):
        assert clean_name(written, "x") == "caf\u00e9"
    assert clean_name("riding  a\u00a0bike", "x") == "riding a bike"


@pytest.mark.parametrize(
    "invisible", ["\ufe0f", "\u034f", "\u115f", "\u3164", "\u2800", "\uffa0", "\u180b", "\U000e0100"]
)
def test_characters_that_show_nothing_are_removed(invisible: str) -> None:
    assert clean_name(f"{invisible}run{invisible}", "x") == "run"
    assert name_key(f"run{invisible}") == "run"
    with pytest.raises(UserError, match="shows nothing"):
        clean_name(invisible, "x")


@pytest.mark.parametrize("name", ["a\nb", "a\x00", "run\udcff", "", " ", "\u200b"])
def test_names_that_are_no_text_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^x: the name"):
        clean_name(name, "x")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Run", "run"),
        ("0", "0.0"),
        ("riding_a_bike", "riding a bike"),
        ("run", "\uff52\uff55\uff4e"),
        ("STRASSE", "straße"),
        ("1" * 40, "1" * 40 + ".0"),
        ("7" * 5000, "0" + "7" * 5000),
        ("-0.50", "-0.5"),
        ("1", "1e0"),
        ("0.015", "1.50e-2"),
        ("120", "1.2e+02"),
        (".5", "0.5"),
        ("12", "\u0661\u0662"),
        ("riding-bike", "riding\u2010bike"),
        ("riding-bike", "riding \u2013bike".replace(" ", "")),
        ("don't run", "don\u2019t run"),
        ("running", "running."),
    ],
)
def test_classes_that_read_alike_are_refused(first: str, second: str) -> None:
    assert name_key(first) == name_key(second)
    with pytest.raises(UserError, match="differ only in"):
        check_distinct([first, "walk", second], "x")


def test_classes_that_differ_are_kept() -> None:
    check_distinct(
        ["run", "running", "0", "1", "0.5", "10", "100", "a-b", "ab", "-1", "e1", "1" * 40, "1" * 39 + "2"], "x"
    )


def test_numbers_in_names_sort_as_numbers() -> None:
    assert sort_labels(["10", "2", "1", "2"]) == ("1", "2", "10")
    assert sort_labels(["kick10", "kick2", "jump"]) == ("jump", "kick2", "kick10")
    assert sort_labels(["sitting", "calling", "using_laptop"]) == ("calling", "sitting", "using_laptop")
    assert sort_labels(["9" * 5000, "1" + "0" * 5000, "01", "1"]) == ("01", "1", "9" * 5000, "1" + "0" * 5000)


def test_digits_of_other_scripts_sort_as_characters() -> None:
    assert sort_labels(["\u0663", "3", "\uff11", "a2"]) == ("3", "a2", "\u0663", "\uff11")
