"""The one exception for a person's mistakes, so that programs can tell it from a bug."""

MOST_NAMED = 20  # accepted names in a message; a data set may have hundreds of classes


class UserError(ValueError):
    """A mistake in what a person gave: a flag, a file, a config.

    The message is one line: what is wrong, where, and what to do. Programs print it without a traceback and exit 2.
    """


def nearest(name: str, accepted: list[str], otherwise: str | None = None) -> str:
    """Words to append to an error: the accepted name most like `name`; else `otherwise`, or all of them."""
    import difflib

    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if otherwise is not None:
        return otherwise
    more = f" and {len(accepted) - MOST_NAMED} more" if len(accepted) > MOST_NAMED else ""
    return f"accepted: {', '.join(map(repr, accepted[:MOST_NAMED]))}{more}"
