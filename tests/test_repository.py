"""What a public repository needs: workflows, hooks, updates, and the files that people look for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def tool(*arguments: str | Path) -> str:
    """What a program says that finds nothing to complain of."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def jobs() -> dict[str, dict]:
    return {name: job for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        *(("github-workflows", path) for path in WORKFLOWS),
        ("dependabot", ROOT / ".github" / "dependabot.yml"),
        ("citation-file-format", ROOT / "CITATION.cff"),
        ("compose-spec", ROOT / "docker-compose.yml"),
        ("github-issue-forms", ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"),
        ("github-issue-forms", ROOT / ".github" / "ISSUE_TEMPLATE" / "feature.yml"),
        ("github-issue-config", ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_follows_its_schema(schema, path):
    tool("check-jsonschema", "--builtin-schema", f"vendor.{schema}", path)


def test_workflows_have_no_known_weakness():
    tool("zizmor", "--offline", "--no-progress", "--format=plain", ".github")


# What a release needs beyond reading: to publish without a password, and to write the release itself.
PERMISSIONS = {"pypi": {"id-token": "write"}, "github": {"contents": "write"}}


def test_workflows_are_bounded_closed_and_pinned():
    for name, job in jobs().items():
        assert job["timeout-minutes"] <= 120, name
        assert job["permissions"] == PERMISSIONS.get(name, {"contents": "read"}), name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            if "uses:" in line:
                assert re.search(r"  # v\d+\.\d+\.\d+$", line), f"{path.name}: {line.strip()}: which version is it?"


def test_ci_does_what_the_project_does_by_itself():
    """The commands of .ci/run after the set-up are those of the workflow, and the hooks' are among them."""
    steps = (ROOT / ".ci" / "run").read_text().partition('step "linter"')[2]
    own = {line for line in steps.splitlines() if line and not line.startswith("step ")}
    done = {line for job in jobs().values() for step in job["steps"] for line in step.get("run", "").splitlines()}
    assert own and own <= done, f"not in CI: {own - done}"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["entry"].split()[0] for hook in hooks}
    assert {"ruff", "mypy", "lint-imports"} <= entries


def test_the_task_runner_has_the_same_commands():
    recipes = json.loads(tool("just", "--dump", "--dump-format=json"))["recipes"]
    commands = {
        name: ["".join(part for part in line if isinstance(part, str)).strip() for line in recipe["body"]]
        for name, recipe in recipes.items()
    }
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    for name in ("check", "test", "slow"):
        assert commands[name] and set(commands[name]) <= set(steps), name
    done = {line for job in jobs().values() for step in job["steps"] for line in step.get("run", "").splitlines()}
    assert set(commands["docs"]) <= done and "just coverage" in done
    assert commands["demo"][0] in (ROOT / "README.md").read_text()
    assert commands["ci"] == [".ci/run"]


def test_a_tag_is_released_with_its_section_of_the_changelog():
    def notes(tag):
        return subprocess.run([sys.executable, ".ci/release_notes.py", tag], cwd=ROOT, capture_output=True, text=True)

    version = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    done = notes(f"v{version}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("### Added\n") and "## [" not in done.stdout
    for tag in ("v9.9.9", version):
        refused = notes(tag)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"error: the tag is {tag}, but pyproject.toml has version {version}")


def test_ci_runs_on_what_the_readme_names():
    systems = {entry["os"].split("-")[0] for entry in jobs()["test"]["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "macos"}
    pythons = {entry["python"] for entry in jobs()["test"]["strategy"]["matrix"]["include"]}
    assert {"3.11", "3.13"} <= pythons  # oldest and newest
    assert jobs()["gpu"]["if"] == "vars.HAS_GPU_RUNNER == 'true'"


def test_ci_runs_scripts_and_modules_that_there_are():
    for name, job in jobs().items():
        for line in (line for step in job["steps"] for line in step.get("run", "").splitlines()):
            for script in re.findall(r"scripts/\w+\.py", line):
                assert (ROOT / script).is_file(), name
            for config in re.findall(r"--config=(\S+)", line):
                assert (ROOT / config).is_file(), name
            for module in re.findall(r"python -m ((?:benchmarks|export|serving)[\w.]*)", line):
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_people_find_what_they_look_for():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{name}: {target}"
    project = (ROOT / "pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project


def test_the_changelog_keeps_its_form():
    """Keep a Changelog 1.1.0: versions, newest first, and known kinds of change."""
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert versions[0] == "Unreleased" and "0.1.0" in versions
    kinds = set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_prepared_data_depends_on_the_code_that_lists_and_reads_it():
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["prepare"]["deps"]
    assert all((ROOT / name).exists() for name in deps)
    code = [path.relative_to(ROOT).as_posix() for path in (ROOT / "clip_har_jax" / "data").glob("*.py")]
    imported = set()
    for name in ["clip_har_jax/pipelines/prepare_data.py", *code]:
        imported |= set(re.findall(r"^from clip_har_jax\.(\w+)", (ROOT / name).read_text(), re.MULTILINE))
    # These say nothing about what is in a data set: messages, processes, output files and pages
    elsewhere = {"batch", "config", "cores", "errors", "evaluation", "files", "folders", "processes", "tokenization"}
    named = {Path(name).relative_to("clip_har_jax").parts[0].removesuffix(".py") for name in deps if "clip_har" in name}
    assert imported - elsewhere <= named
