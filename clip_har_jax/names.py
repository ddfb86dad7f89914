"""The rules for names of classes, columns and splits: which are equal, which are refused, and how they are sorted.

- Invisible differences are removed: outer and repeated spaces, the Unicode form (NFC), invisible characters.
- Two classes that then differ only by case, by `_` for a space, by a compatibility form (full-width letters), by the
  kind of a dash or an apostrophe, by a dot at the end, or as spellings of one number (`0`, `0.0`, `0e0`) are refused: a
  reader can't tell them apart.
- Control characters and bytes that aren't text are refused.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from clip_har_jax.errors import UserError, nearest

SEPARATOR = "|"  # between the labels of one image
NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(?:e([+-]?[0-9]{1,3}))?")
# Dashes and apostrophes that look the same, and those that word processors write instead
LOOK_ALIKE = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'")
)
LIKE_MISSING = frozenset({"nan", "none", "na", "n/a", "null", "nil", "unknown", "?", "-"})
JOINERS = "\u200c\u200d"  # parts of words in Persian and in Indic scripts, and of emoji
# Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt, less JOINERS
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
BLANK = "\u2800"  # an empty Braille cell: looks like a space, but Unicode doesn't count it as one


def clean_name(name: str, where: str) -> str:
    """Return a name without invisible differences.

    Args:
      name: as a person or a file system gave it.
      where: the file or folder that an error names.

    Raises:
      UserError: control characters or undecodable bytes, or no visible character.
    """
    check_text(name.strip(), where)
    text = unicodedata.normalize("NFC", _strip_invisible(name, JOINERS))
    if not text.strip(JOINERS):
        raise UserError(f"{where}: the name {name!r} shows nothing; give it letters")
    return text


def _strip_invisible(name: str, kept: str = "") -> str:
    """Return a name without invisible characters other than `kept`, and with single spaces between words."""
    text = IGNORABLE.sub("", name).replace(BLANK, " ")
    text = "".join(one for one in text if unicodedata.category(one) != "Cf" or one in kept)
    return " ".join(text.split())


def check_text(name: str, where: str) -> None:
    """Refuse a name that can't be written unchanged to JSON, CSV and terminals.

    Raises:
      UserError: control characters or undecodable bytes.
    """
    if found := NOT_TEXT.search(name):
        kind = "bytes that are no UTF-8" if found[0] >= "\ud800" else "a control character"
        raise UserError(f"{where}: the name {name!r} holds {kind}; rename it")


def name_key(name: str) -> str:
    """Return a key that is equal for names that a reader can't tell apart."""
    plain = _strip_invisible(name).translate(LOOK_ALIKE)  # before NFKC, which splits some of them
    text = _strip_invisible(unicodedata.normalize("NFKC", plain).replace("_", " ").casefold())
    text = "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)
    text = text.rstrip(" .") or text  # Windows drops them from the names of folders
    if number := NUMBER.fullmatch(text):
        sign, whole, fraction = number[1], number[2], number[3] or ""
        point = len(whole) + int(number[4] or 0)
        digits = "0" * -point + whole + fraction + "0" * (point - len(whole + fraction))
        whole, fraction = digits[: max(0, point)].lstrip("0"), digits[max(0, point) :].rstrip("0")
        digits = f"{whole or '0'}.{fraction}" if fraction else whole or "0"
        return f"-{digits}" if sign == "-" and digits != "0" else digits
    return text


def check_distinct(names: Iterable[str], where: str) -> None:
    """Refuse classes that a reader can't tell apart.

    Raises:
      UserError: two such names, or one name twice.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = name_key(name)
        if key not in seen:
            seen[key] = name
        elif seen[key] == name:
            raise UserError(f"{where}: class {name!r} is listed twice; list each class once")
        else:
            other = seen[key]
            how = "in case" if other.casefold() == name.casefold() else "in how they are written"
            raise UserError(f"{where}: classes {other!r} and {name!r} differ only {how}; give both one name")


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Return a sort key that puts "2" before "10", and other names in the order of their characters."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for i in range(1, len(parts), 2):  # a number, as its length and digits, so that any size sorts correctly
        digits = str(parts[i]).lstrip("0")
        parts[i] = (len(digits), digits)
    return parts, name


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in natural order."""
    return tuple(sorted(set(names), key=natural_key))


def mixed_scripts(label: str) -> list[str]:
    """Return the alphabets of a word whose letters look the same in several alphabets; empty for most labels.

    >>> mixed_scripts("\u0441at")
    ['CYRILLIC', 'LATIN']
    """
    for word in label.split():
        scripts = {unicodedata.name(one, "").partition(" ")[0] for one in word if one.isalpha()}
        if len(found := scripts & {"LATIN", "CYRILLIC", "GREEK"}) > 1:
            return sorted(found)
    return []


def like_missing(labels: Sequence[str]) -> list[str]:
    """Return the labels that look like a missing value."""
    return [label for label in labels if label.casefold() in LIKE_MISSING]


def label_ids(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """Return the position of each example's label in the list of classes.

    Raises:
      UserError: a label that isn't in the list (names it and the nearest one), or two classes that a reader can't tell
        apart.
    """
    check_distinct(labels, where)
    ids = {label: i for i, label in enumerate(labels)}
    if unknown := sorted(set(names) - set(ids)):
        raise UserError(
            f"{where}: label {unknown[0]!r} ({names.count(unknown[0])} images) is none of the {len(labels)} classes; "
            f"{nearest(unknown[0], list(labels))}"
        )
    return [ids[name] for name in names]


def split_labels(text: str, where: str) -> tuple[str, ...]:
    """Return the labels of an image from a text such as `run|wave`, in natural order; none for a blank text.

    Args:
      text: labels joined by `|`.
      where: the file and line that an error names.

    Raises:
      UserError: nothing between two `|`, or a label that `clean_name` refuses.
    """
    if not text.strip():
        return ()
    parts = text.split(SEPARATOR)
    if not all(part.strip() for part in parts):
        raise UserError(f"{where}: the labels {text!r} hold an empty one; write e.g. run{SEPARATOR}wave")
    return sort_labels(clean_name(part, where) for part in parts)


def join_labels(labels: Iterable[str]) -> str:
    """Return the labels of an image as one text, in natural order; equal sets give equal texts."""
    return SEPARATOR.join(sort_labels(labels))
