"""UserError: the exception for a person's mistakes, to tell them from bugs."""

MOST_NAMED = 20  # accepted names in a message; a data set may have hundreds of classes


class UserError(ValueError):
    """A mistake in the input: a flag, a file or a config.

    The message is one line: what is wrong, where, and what to do. Programs print it without a traceback and exit 2.
    """


def nearest(name: str, accepted: list[str], otherwise: str | None = None) -> str:
    """Return the hint of an error message: the accepted name most similar to `name`; else `otherwise` or all names."""
    import difflib

    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if otherwise is not None:
        return otherwise
    more = f" and {len(accepted) - MOST_NAMED} more" if len(accepted) > MOST_NAMED else ""
    return f"accepted: {', '.join(map(repr, accepted[:MOST_NAMED]))}{more}"
