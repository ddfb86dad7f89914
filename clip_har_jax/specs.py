"""SPEC: the text that names data, the same in every flag and config."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.names import name_key

# kind -> (what follows the colon, the options after the question mark)
KINDS = {
    "synthetic": ("", ("split",)),
    "motion": ("", ("split", "reversed", "untrimmed", "window_s")),
    "folder": ("PATH", ("split",)),
    "csv": ("FILE", ("images", "videos", "split", "missing", "window_s", "caption", "weight")),
    "manifest": ("FILE", ("split", "images", "cache")),
    "video": ("PATH", ("split", "fold", "videos", "missing", "window_s")),
    "tfds": ("NAME", ("split", "data_dir")),
    "hf": ("OWNER/NAME", ("split",)),
    "webdataset": ("PATTERN", ("caption", "weight")),
    "parquet": ("PATTERN", ("image", "caption", "label", "images", "weight")),
}
PAIRS = ("webdataset", "parquet")  # kinds whose examples are image-text pairs, unless an option names a label
FLAGS = ("reversed", "untrimmed")  # options that are said without a value
CLIPS = ("motion", "video")  # kinds whose examples are video clips

# Accepted names of the folders or splits; the first one found is used.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Spec:
    """A parsed SPEC: `kind:path?option=value`."""

    kind: str
    path: str
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "&".join(name if name in FLAGS else f"{name}={value}" for name, value in self.options.items())
        path = self.path.replace("?", "%3F")
        return self.kind + (f":{path}" if self.path else "") + (f"?{options}" if options else "")


def parse_spec(text: str) -> Spec:
    """Parse a SPEC.

    An existing path has precedence as written, even with `?`, `#` or `%` in it. Otherwise options begin at the `?`, and
    percent-escapes (`%3F`) are decoded if the path as written doesn't exist. Options are taken as typed.

    >>> spec = parse_spec("synthetic?split=test")
    >>> spec.kind, spec.options
    ('synthetic', {'split': 'test'})

    Raises:
      UserError: an unknown kind or option, an option without a value, a missing path, or a path where none is accepted.
    """
    head, mark, query = text.partition("?")
    kind, _, path = head.partition(":")
    if kind not in KINDS:
        raise UserError(f"data {text!r}: unknown kind {kind!r}; {_kind_hint(kind, head)}")
    if path:
        path, mark, query = _split_path(text.partition(":")[2])
    wanted, options = KINDS[kind]
    if bool(path) != bool(wanted):
        raise UserError(f"data {text!r}: write {f'{kind}:{wanted}' if wanted else kind}")
    given = dict(_option(text, item) for item in query.split("&")) if mark else {}
    if unknown := [name for name in given if name not in options]:
        raise UserError(f"data {text!r}: unknown option {unknown[0]!r}; {nearest(unknown[0], list(options))}")
    return Spec(kind, path, given)


def _split_path(text: str) -> tuple[str, str, str]:
    """Split the part after the kind into path, `?` and options; the longest existing path has precedence."""
    ends = [len(text), *(i for i in reversed(range(len(text))) if text[i] == "?")]
    for decode in (str, unquote):
        for end in ends:
            path = decode(text[:end])
            if _exists(path):
                return path, text[end : end + 1], text[end + 1 :]
    return text.partition("?")


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # a null byte
        return False


def _kind_hint(kind: str, head: str) -> str:
    if os.path.isdir(head):
        return f"write folder:{head}"
    return f"write csv:{head}" if head.endswith(".csv") else nearest(kind, list(KINDS))


def _option(text: str, item: str) -> tuple[str, str]:
    name, mark, value = item.partition("=")
    if name in FLAGS and not mark:
        return name, "yes"
    if not name or not value:
        raise UserError(f"data {text!r}: option {item!r} has no value; write ?name=value")
    return name, value


def find_split(split: str, available: Sequence[str], exactly: bool) -> str | None:
    """Return the name of a split among those available, in any case; None if there is none.

    Args:
      split: a name. If not `exactly`: train, val or test, each of which has several accepted names.
      available: the names to choose from.
      exactly: whether a person chose the name, so that no other name is accepted.
    """
    names = (split,) if exactly else SPLIT_NAMES.get(split, (split,))
    by_key = {name_key(name): name for name in reversed(available)}
    return next(
        (name if name in available else by_key[name_key(name)] for name in names if name_key(name) in by_key), None
    )
