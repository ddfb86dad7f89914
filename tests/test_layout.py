"""The tests stand where the code does, and none depends on another or on the speed of the machine."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.order import LONGEST

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# What the tests share, what golden files hold, and what stands at the root: images, manifests, the DVC pipeline.
OF_NO_PACKAGE = {"support", "golden", "deploy"}
FILES = sorted(TESTS.rglob("*.py"))
SOURCES = sorted(
    path for name in ("clip_har_jax", "serving", "export", "app", "scripts") for path in (ROOT / name).rglob("*.py")
)
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that a file imports, wherever in it, with the names taken from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def bounded_durations(tree: ast.AST) -> list[int]:
    """Return the lines of assertions that something took less than a limit; a slow machine fails them."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        for part in ast.walk(node.test)
        if isinstance(part, ast.Compare)
        for smaller, operator, larger in zip([part.left, *part.comparators], part.ops, part.comparators, strict=False)
        if (isinstance(operator, ast.Lt | ast.LtE) and is_duration(smaller))
        or (isinstance(operator, ast.Gt | ast.GtE) and is_duration(larger))
    ]


def is_duration(tree: ast.AST) -> bool:
    """Return whether an expression is a clock's reading less something, such as an earlier one."""
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and name_of(node.func) in CLOCKS
        for part in ast.walk(tree)
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub)
        for node in ast.walk(part)
    )


def name_of(function: ast.Attribute | ast.Name) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id


def test_the_files_that_come_first_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_each_folder_is_of_a_package_of_the_same_name() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS} - OF_NO_PACKAGE
    homeless = {name for name in folders if not any((home / name).is_dir() for home in (ROOT / "clip_har_jax", ROOT))}
    assert folders and not homeless


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_another_or_asserts_how_long_something_takes(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    others = {name for name in imports(tree) if any(part.startswith("test_") for part in name.split("."))}
    assert not others, "shared parts belong into tests/support or a conftest.py"
    assert not re.search(r"^\s*(from|import) test_", text, re.MULTILINE), "in a program that a test runs"
    assert not bounded_durations(tree), "speed is measured in benchmarks/, not asserted"


def test_a_bound_on_a_duration_is_found() -> None:
    found = "begin = time.monotonic()\nassert time.monotonic() - begin < 2"
    assert bounded_durations(ast.parse(found)) == [2]
    assert bounded_durations(ast.parse("assert perf_counter() - start < limit, 'slow'")) == [1]
    assert bounded_durations(ast.parse("assert a and 5 > time.time() - start")) == [1]
    for allowed in ("time.monotonic() < deadline", "time.monotonic() - begin >= 1.0", "1 <= time.time() - begin"):
        assert bounded_durations(ast.parse(f"assert {allowed}")) == []


def too_long(tree: ast.AST) -> list[str]:
    """Return the functions of more than 80 lines, and those of more than 8 parameters beside `self`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            lines = (node.end_lineno or 0) - node.lineno + 1
            if count > 8 or lines > 80:
                found.append(f"{node.name}: {lines} lines, {count} parameters")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_are_short_or_say_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert too_long(tree) == []
    assert len(text.splitlines()) <= 300 or "over 300 lines" in (ast.get_docstring(tree) or "")


def test_a_long_function_is_found() -> None:
    assert too_long(ast.parse("def f(a, b, c, d, e, f, g, *, h, i): pass")) == ["f: 1 lines, 9 parameters"]
    assert too_long(ast.parse("class A:\n def f(self, a, b, c, d, e, f, g, h):\n" + "  pass\n" * 79)) == []
    assert too_long(ast.parse("def f():\n" + " pass\n" * 80)) == ["f: 81 lines, 0 parameters"]
