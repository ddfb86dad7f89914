"""The modules of the package whose signatures hold shapes of arrays."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "clip_har_jax"


def modules_with_shapes() -> list[str]:
    """Return the dotted names of the package's modules that use jaxtyping.

    The types in the other modules are those that mypy checks; checking them at run time too takes a tenth of the tests'
    processor time.
    """
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "jaxtyping" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
