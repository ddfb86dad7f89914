"""The documentation: builds strictly, names flags that there are, and its marked blocks run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^(<!-- runs -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
SHRUNK = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    config.train.num_steps, config.train.log_every_steps, config.train.global_batch_size = 4, 2, 16
    config.eval.every_steps = config.checkpoint.every_steps = 4
    return config
"""


def commands(page):
    """Each command of a page's shell blocks that runs a part of the project, as words."""
    for _, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("sh", "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "python" in words:
                    yield words[words.index("python") + 1 :]


@cache
def help_of(*call):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *call, "--help"], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


TEST_FILE = re.compile(r"`([\w/]*\btest_\w+\.py)(?:::(\w+))?[`\[]")
TEST_NAME = re.compile(r"`(test_\w+)`")


def test_every_test_that_the_documentation_names_is_one_that_there_is():
    """With its file's path from the root, or by its name alone; a name cut short is none."""
    names = {path.relative_to(ROOT).as_posix(): defined_in(path) for path in (ROOT / "tests").rglob("test_*.py")}
    all_names = set().union(*names.values())
    wrong, seen = [], 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for file, name in TEST_FILE.findall(text):
            seen += 1
            if file not in names or (name and name not in names[file]):
                wrong.append(f"{page.name}: {file}::{name}")
        for name in TEST_NAME.findall(text):
            if name not in all_names:
                wrong.append(f"{page.name}: {name}")
        wrong += [f"{page.name}: {cut}" for cut in re.findall(r"\btest_\w*\.\.\.", text)]
    assert not wrong
    assert seen > 40


def defined_in(path):
    """Return the names of a file's test functions."""
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.M))


def test_every_command_of_the_documentation_is_one_that_there_is():
    seen = 0
    for page in PAGES:
        for words in commands(page):
            if words[0].startswith("scripts/"):
                call, rest = words[:1], words[1:]
            elif words[0] == "-m" and words[1] in ("export", "serving"):
                call, rest = words[:2], words[2:]
            else:
                continue
            if call == ["scripts/registry.py"]:
                call, rest = words[:2], words[2:]
            if "--" in rest:  # what the launcher starts
                rest = rest[: rest.index("--")]
            flags = {word.split("=")[0] for word in rest if word.startswith("--") and not word.startswith("--config.")}
            unknown = {flag for flag in flags if flag not in help_of(*call)}
            assert not unknown, f"{page.name}: {' '.join(words)}: {unknown}"
            seen += 1
    assert seen > 20


def test_every_config_key_of_the_documentation_is_one_that_there_is():
    from clip_har_jax.config import RunConfig
    from clip_har_jax.settings import leaves

    known = {key for key, _ in leaves(RunConfig())}
    for page in PAGES:
        named = set(re.findall(r"--config\.([a-z_0-9.]+)=", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name}: {named - known}"


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(mkdocs, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands_page = (tmp_path / "reference" / "commands" / "index.html").read_text()
    assert "scripts/train.py" in commands_page and "--workdir" in commands_page
    assert "optim.learning_rate" in (tmp_path / "reference" / "config" / "index.html").read_text()
    assert "register" in (tmp_path / "reference" / "python" / "index.html").read_text()


def marked(page):
    return [text for mark, _, text in FENCE.findall(page.read_text(encoding="utf-8")) if mark]


RUN = [page for page in PAGES if marked(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_marked_blocks_run_as_they_stand(page, tmp_path):
    """In a fresh folder, one page after the other, on the demo's config cut to four steps."""
    for name in ("scripts", "export", "serving", "app", "clip_har_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (tmp_path / "configs" / path.name).symlink_to(path)
    demo = tmp_path / "configs" / "demo.py"
    demo.unlink()
    demo.write_text(SHRUNK.format(path=str(ROOT / "configs" / "demo.py")))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "WANDB_", "HAR_"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "set -euo pipefail\n" + "\n".join(marked(page))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_tree_of_the_architecture_is_the_real_one():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = set(re.findall(r"\b\w+[.]py\b", page))
    folders = ("clip_har_jax", "serving", "export", "app", "scripts", "configs")
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    modules = {path.name for folder in ("clip_har_jax", "serving") for path in (ROOT / folder).rglob("[!_]*.py")}
    assert modules <= said, "a module that the tree leaves out"
    assert said <= files, "one that it names and that isn't there"
