"""SPEC: what a person types to name data, the same in every flag and config."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.names import name_key

# kind -> (what follows the colon, the options after the question mark)
KINDS = {
    "synthetic": ("", ("split",)),
    "motion": ("", ("split",)),
    "folder": ("PATH", ("split",)),
    "csv": ("FILE", ("images",)),
    "manifest": ("FILE", ("split", "images", "cache")),
    "video": ("PATH", ("split", "fold")),
    "tfds": ("NAME", ("split", "data_dir")),
    "hf": ("OWNER/NAME", ("split",)),
}
CLIPS = ("motion", "video")  # kinds whose examples are clips

# What the folders of a split, or the splits of a prepared data set, are called; the first one found serves.
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
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        path = self.path.replace("?", "%3F")
        return self.kind + (f":{path}" if self.path else "") + (f"?{options}" if options else "")


def parse_spec(text: str) -> Spec:
    """Parse a SPEC.

    A path that is there as it is written wins, with `?`, `#` and `%` in it; else options begin at the `?`, and escapes
    of an address (`%3F`) are read where the path as written isn't there. Options are taken as typed.

    >>> spec = parse_spec("synthetic?split=test")
    >>> spec.kind, spec.options
    ('synthetic', {'split': 'test'})

    Raises:
      UserError: an unknown kind or option, an option without a value, a path missing or where none goes.
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
    """Split what follows the kind into path, `?` and options; the longest path that is there wins."""
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
    name, _, value = item.partition("=")
    if not name or not value:
        raise UserError(f"data {text!r}: option {item!r} has no value; write ?name=value")
    return name, value


def find_split(split: str, available: Sequence[str], exactly: bool) -> str | None:
    """Return the name of a split among those available, in any case; None where there is no such.

    Args:
      split: a name; where it isn't meant `exactly`, train, val or test, which go by several names.
      available: the names to choose from.
      exactly: whether a person named the split, so that no other serves.
    """
    names = (split,) if exactly else SPLIT_NAMES.get(split, (split,))
    by_key = {name_key(name): name for name in reversed(available)}
    return next(
        (name if name in available else by_key[name_key(name)] for name in names if name_key(name) in by_key), None
    )
