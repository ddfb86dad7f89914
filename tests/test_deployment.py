"""Images, compose, dashboards, alerts, Kubernetes and workflows: linted, checked by schema and against the code.

No container engine runs in the tests: each COPY and each pip line is run in a scratch folder instead (slow).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DOCKERFILES = ("Dockerfile.train", "Dockerfile.app")
MONITORING = ROOT / "serving" / "monitoring"
KUSTOMIZATIONS = sorted(path.parent for path in (ROOT / "kubernetes").rglob("kustomization.yaml"))


def tool(name, *arguments):
    """A program of this environment, wherever its packages lie."""
    found = shutil.which(name) or shutil.which(name, path=str(BIN))
    assert found, f"{name} is part of the extra `dev`"
    return subprocess.run([found, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def instructions(name):
    """(keyword, rest) of each instruction of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / name).read_text())
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [tuple(line.split(None, 1)) for line in lines]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_images_pass_hadolint(name):
    done = tool("hadolint", ROOT / name)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_images_are_pinned_and_not_root(name):
    given = instructions(name)
    for keyword, rest in given:
        if keyword == "FROM":
            assert re.match(r"python:3\.\d+\.\d+-slim-\w+", rest), rest
    users = [rest for keyword, rest in given if keyword == "USER"]
    assert users and users[-1].isdecimal() and int(users[-1]) > 0


def test_what_is_copied_is_let_through():
    """Each source of a COPY is there and isn't kept out by .dockerignore; nothing else is let through."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for name in DOCKERFILES:
        for keyword, rest in instructions(name):
            if keyword == "COPY" and not rest.startswith("--from"):
                copied.update(rest.split()[:-1])
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)


def test_the_app_image_has_what_its_extras_name_and_no_jax():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def names(lines):
        return {re.split(r"[\[<>=! ]", line)[0] for line in lines if line.strip() and not line.startswith(("#", "-"))}

    asked = names((ROOT / "requirements-app.txt").read_text().splitlines())
    assert names(extras["serving"] + extras["app"]) <= asked
    pinned = {name.lower() for name in names((ROOT / "requirements.txt").read_text().splitlines())}
    assert asked <= pinned
    assert not asked & {"jax", "flax", "tensorflow-cpu", "torch"}


def copy_as_the_image_does(name, target):
    """Runs the COPY instructions of the last stage into a folder."""
    given = instructions(name)
    last = max(i for i, (keyword, _) in enumerate(given) if keyword == "FROM")
    for keyword, rest in given[last:]:
        if keyword == "COPY" and not rest.startswith("--from"):
            *sources, where = rest.split()
            for source in sources:
                place = target / where / source if where.endswith("/") else target / where
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)


@pytest.mark.slow
def test_the_app_image_serves_from_its_own_files_and_packages(tmp_path):
    """Its pip line in a fresh virtual environment, its files in a fresh folder: the service is made, without JAX."""
    (line,) = (rest for keyword, rest in instructions("Dockerfile.app") if keyword == "RUN" and "pip" in rest)
    build = tmp_path / "build"
    build.mkdir()
    for name in ("requirements.txt", "requirements-app.txt"):
        shutil.copy(ROOT / name, build)
    line = line.replace("/opt/venv", str(tmp_path / "venv")).replace("python -m venv", f"{sys.executable} -m venv")
    done = subprocess.run(["bash", "-euc", line], cwd=build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    copy_as_the_image_does("Dockerfile.app", tmp_path / "srv")
    code = (
        "import importlib.util as u, sys, serving.app, serving.settings, clip_har_jax.inference.exported;"
        "from serving.settings import Settings;"
        "serving.app.make_app(Settings(model='/model'));"
        "print(serving.app.__file__);"
        "sys.exit(any(u.find_spec(name) for name in ('jax', 'flax', 'tensorflow', 'torch')))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HAR_"))}
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], cwd=tmp_path / "srv", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(str(tmp_path))
    command = [python, "-m", "serving", "--help"]
    assert subprocess.run(command, cwd=tmp_path / "srv", env=environment, capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_train_image_runs_from_its_own_files(tmp_path):
    """Its files in a fresh folder, its packages from the pinned list: every script of the image explains itself."""
    copy_as_the_image_does("Dockerfile.train", tmp_path)
    line = next(rest for keyword, rest in instructions("Dockerfile.train") if keyword == "RUN" and "pip" in rest)
    assert "-r requirements.txt" in line and '".[${EXTRA}]"' in line
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--no-build-isolation"]
    done = subprocess.run([*pip, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for script in ("train.py", "auto_train.py", "registry.py"):
        done = subprocess.run(
            [sys.executable, f"scripts/{script}", "--help"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
        )
        assert done.returncode == 0


def test_compose_follows_its_schema_and_names_what_is_there():
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert done.returncode == 0, done.stdout
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert set(compose["services"]) == {"server", "app", "mlflow", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
    from serving.settings import Settings

    fields = set(Settings.model_fields)
    given = {key for key in compose["services"]["server"]["environment"] if key.startswith("HAR_")}
    given |= set(re.findall(r"\b(HAR_[A-Z_]+)=", (ROOT / "Dockerfile.app").read_text()))
    assert {key.removeprefix("HAR_").lower() for key in given} <= fields


def known_metrics():
    """Every name that the service's exposition can hold."""
    from serving.telemetry import Metrics

    names = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[family.type]
        names.update(family.name + suffix for suffix in suffixes)
    return names


def expressions():
    """(where, PromQL) of each dashboard panel and each alert."""
    for path in (MONITORING / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"].replace("$__rate_interval", "1m")
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alerts.yml: {rule['alert']}", rule["expr"]


def test_dashboards_and_alerts_ask_for_metrics_that_there_are():
    import promql_parser

    known, asked = known_metrics(), set()
    for where, expression in expressions():
        promql_parser.parse(expression)  # raises where it isn't PromQL
        names = set(re.findall(r"\bhar_[a-z_]+", expression))
        assert names and names <= known, f"{where}: {names - known}"
        asked |= names
    # Each family that the service offers is looked at somewhere.
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known}
    seen = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert families == seen


def test_kubernetes_alerts_are_the_same():
    rule = yaml.safe_load((ROOT / "kubernetes/serving/monitoring/prometheusrule.yaml").read_text())
    assert rule["spec"]["groups"] == yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]


def resources(folder):
    """What a kustomization names, patched as it says (RFC 6902), images aside."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = []
    for entry in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = folder / entry
        assert path.exists(), path
        found += resources(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", ()):
        hit = [item for item in found if item["kind"] == patch["target"]["kind"]]
        assert hit, f"{folder}: no {patch['target']['kind']} to patch"
        for item in hit:
            for operation in yaml.safe_load(patch["patch"]):
                apply(item, operation)
    return found


def apply(item, operation):
    """One operation of a JSON patch."""
    *path, last = operation["path"].strip("/").split("/")
    for key in path:
        item = item[int(key)] if isinstance(item, list) else item[key]
    if isinstance(item, list):
        assert last == "-"
        item.append(operation["value"])
    else:
        assert operation["op"] == "add" or last in item
        item[last] = operation["value"]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kubernetes_follows_its_schemas(folder):
    import kubernetes_validate

    for item in resources(folder):
        if item["apiVersion"].split("/")[0] in ("jobset.x-k8s.io", "monitoring.coreos.com", "serving.kserve.io"):
            assert item["metadata"]["name"]  # defined outside Kubernetes; their pods are checked below
        else:
            kubernetes_validate.validate(item, "1.31", strict=True)
    for pod in pods(resources(folder)):
        workload = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(workload, "1.31", strict=True)


def pods(node):
    """Each pod's spec, wherever it stands."""
    if isinstance(node, list):
        for item in node:
            yield from pods(item)
    elif isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)


def test_pods_run_what_there_is():
    """Their commands are scripts of the image, with flags that the scripts know."""
    for folder in KUSTOMIZATIONS:
        for pod in pods(resources(folder)):
            for container in (*pod.get("initContainers", ()), *pod["containers"]):
                assert container["image"] in ("clip-har-jax-train", "clip-har-jax-app")
                script, *arguments = container.get("args", ["serving/__main__.py"])
                assert (ROOT / script).is_file(), script
                text = (ROOT / script).read_text() + (ROOT / "clip_har_jax/cli.py").read_text()
                for flag in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
                    if not flag.startswith("--config."):
                        name = "_timeout_s" if flag.endswith("_timeout_s") else flag
                        assert name in text, f"{script} has no {flag}"
                for argument in arguments:
                    if argument.startswith("--config=configs/"):
                        assert (ROOT / argument.removeprefix("--config=")).is_file()


def test_the_grace_is_long_enough():
    from serving.settings import Settings

    for pod in pods(resources(ROOT / "kubernetes/serving/base")):
        sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > sleep + Settings.model_fields["drain_timeout_s"].default
    for folder in ("train/base", "auto_train"):
        for pod in pods(resources(ROOT / "kubernetes" / folder)):
            assert pod["terminationGracePeriodSeconds"] >= 300


def test_the_probes_ask_for_what_needs_no_key():
    from serving.security import PUBLIC

    for pod in pods(resources(ROOT / "kubernetes/serving/production")):
        server = pod["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[probe]["httpGet"]["path"] in PUBLIC


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_follow_their_schema(path):
    done = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)
    assert done.returncode == 0, done.stdout
    workflow = yaml.safe_load(path.read_text())
    assert "permissions" in workflow, "closed by default"
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]


def test_dependabot_and_hooks_follow_their_schemas():
    done = tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    assert done.returncode == 0, done.stdout
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = {hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"] if "entry" in hook}
    steps = (ROOT / ".ci" / "run").read_text()
    for command in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert any(entry.startswith(command) for entry in entries) and command in steps
