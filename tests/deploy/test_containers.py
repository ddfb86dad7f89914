"""The images, without an engine: linted, and their COPY and RUN lines carried out in a folder and an environment of
their own; the compose file and what it mounts."""

import fnmatch
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import yaml

from clip_har_jax.config import load_config
from clip_har_jax.trainer import provenance
from serving.security import new_key
from serving.settings import Settings
from tests.support.serving_setup import LABELS, write_export

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("Dockerfile.app", "Dockerfile.train")
USER_LINE = "useradd --uid=10001"  # not carried out here


def instructions(name: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, those of the stages that it starts from included."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for line in filter(str.strip, text.splitlines()):
        what, _, rest = line.strip().partition(" ")
        if what == "FROM":
            image, _, current = rest.partition(" AS ")
            stages[current] = [*stages.get(image, [("FROM", image)])]
        else:
            stages[current].append((what, rest.strip()))
    return stages


def context(folder: Path) -> Path:
    """What a build sees: the tracked files that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"\*|![\w.-]+|\*\*/[\w.*-]+", rule) for rule in rules), "only what is understood below"
    for name in subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split():
        parts, ignored = Path(name).parts, False
        for rule in rules:
            if rule == "*" or (rule.startswith("**/") and any(fnmatch.fnmatch(part, rule[3:]) for part in parts)):
                ignored = True
            elif rule == f"!{parts[0]}":
                ignored = False
        if not ignored and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(name: str, stage: str, folder: Path, pip: str = "pip install", **arguments: str) -> dict[str, str]:
    """Carries out a stage's lines: what is copied lies in folder/srv, what is installed in folder/venv.

    Args:
      pip: what takes the place of `pip install`.
      arguments: what --build-arg gives.

    Returns:
      The environment of what runs in it.
    """
    source, work = context(folder / "context"), folder / "srv"
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HAR_", "JAX", "XLA", "PYTEST"))}
    kept.pop("PYTHONPATH", None)
    environment = kept | {"PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    given: dict[str, str] = {}
    work.mkdir()
    for what, rest in instructions(name)[stage]:
        if what == "ENV":
            environment |= dict(part.split("=", 1) for part in rest.split() if not part.startswith("HOME="))
        elif what == "ARG":
            key, _, value = rest.partition("=")
            given[key] = arguments.get(key, value.strip('"'))
        elif what == "COPY":
            *sources, target = rest.split()
            for item in sources:
                place = work / target
                if (source / item).is_dir():
                    shutil.copytree(source / item, place, dirs_exist_ok=True)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source / item, place)
        elif what == "RUN" and not rest.startswith(USER_LINE):
            subprocess.run(
                ["sh", "-ec", rest.replace("pip install", pip)],
                cwd=work,
                env=environment | given,
                check=True,
                timeout=900,
            )
    return environment


@pytest.mark.parametrize("name", DOCKERFILES)
def test_linted(name):
    done = subprocess.run(["hadolint", ROOT / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_run_as_nobody_and_hold_no_secret(name):
    for stage, lines in instructions(name).items():
        assert re.fullmatch(r"[\w./]+:\d+\.\d+\.\d+[\w.-]*", dict(lines)["FROM"])
        if stage == "base":
            continue
        assert [rest for what, rest in lines if what == "USER"] == ["10001"], stage
        assert not [rest for what, rest in lines if re.search("KEY|TOKEN|PASSWORD", rest) and what in ("ENV", "ARG")]
        assert any(rest.startswith(USER_LINE) for what, rest in lines if what == "RUN")
        if name == "Dockerfile.app":
            assert "HEALTHCHECK" in dict(lines)


def test_what_is_copied_is_there_and_nothing_else_gets_in(tmp_path):
    (ROOT / "serving" / ".env").write_text("HAR_API_KEYS=never")
    try:
        seen = context(tmp_path)
    finally:
        (ROOT / "serving" / ".env").unlink()
    copied = set()
    for name in DOCKERFILES:
        for lines in instructions(name).values():
            for what, rest in lines:
                if what == "COPY":
                    copied |= {item.split("/")[0] for item in rest.split()[:-1]}
                    assert not [item for item in rest.split()[:-1] if not (seen / item).exists()]
    assert {path.name for path in seen.iterdir()} == copied
    assert not list(seen.rglob(".env"))


def pins(path: Path) -> set[tuple[str, str]]:
    """(package, version), of a file of pins; some packages have several, for several machines."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), flags=re.MULTILINE)
    return {(re.sub(r"[_.]", "-", name.lower()), version) for name, version in found}


@pytest.mark.parametrize("name", ["serving", "app"])
def test_what_the_images_install_is_pinned(name):
    lines = [line for line in (ROOT / name / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    known = {package for package, _ in pins(ROOT / "requirements.txt")}
    assert {line.partition("[")[0] for line in lines} <= known


def test_accelerators_fit_the_pinned_jax():
    ours, theirs = dict(pins(ROOT / "requirements-accelerators.txt")), dict(pins(ROOT / "requirements.txt"))
    assert not set(ours) & set(theirs)
    assert ours["jax-cuda12-plugin"] == ours["jax-cuda12-pjrt"] == theirs["jax"]


def test_a_run_in_the_image_names_the_code_it_was_built_from(monkeypatch, tmp_path):
    assert f"{provenance.GIT_SHA}=$REVISION" in [rest for _, rest in instructions("Dockerfile.train")[""]]
    config = load_config(ROOT / "configs" / "demo.py")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)  # no history there
    monkeypatch.setenv(provenance.GIT_SHA, "0a1b2c")
    assert provenance.make_record(config, {}, None)["git_sha"] == "0a1b2c"
    monkeypatch.setenv(provenance.GIT_SHA, "")
    assert provenance.make_record(config, {}, None)["git_sha"] is None


def read_only(folder: Path) -> list[str]:
    """What starts a command so that it can write in `folder` alone; root alone may."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return []
    mounts = f"mount --make-rprivate / && mount --bind {folder} {folder} && mount -o remount,ro,bind /"
    return ["unshare", "-m", "sh", "-ec", f'{mounts}\nexec "$@"', "sh"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def entrypoint(lines: list[tuple[str, str]]) -> list[str]:
    return json.loads(dict(lines)["ENTRYPOINT"])


def health_check(lines: list[tuple[str, str]], port: int) -> list[str]:
    command = json.loads(dict(lines)["HEALTHCHECK"].partition("CMD ")[2])
    return [re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", part) for part in command]


def post(address: str, body: bytes, key: str | None):
    headers = {"Content-Type": "image/png"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with urlopen(Request(address, body, headers), timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_server_of_its_image_serves_without_jax(tmp_path):
    """Its packages and files alone; on Linux as root also with all but one folder read-only."""
    export = write_export(tmp_path / "made")
    environment = build("Dockerfile.app", "server", tmp_path)
    lines = instructions("Dockerfile.app")["server"]

    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["python", "-c", code], cwd=tmp_path / "srv", env=environment, capture_output=True, text=True, timeout=60
        )

    assert python("import model_signing, OpenSSL").returncode == 0  # imported only where a signature is asked for
    for absent in ("jax", "flax", "tensorflow", "torch", "matplotlib"):
        assert "ModuleNotFoundError" in python(f"import {absent}").stderr
    listed = subprocess.check_output(
        ["python", "-m", "pip", "list", "--format=freeze"], env=environment, text=True, timeout=60
    )
    (tmp_path / "installed.txt").write_text(listed)
    installed = {pin for pin in pins(tmp_path / "installed.txt") if pin[0] not in ("pip", "setuptools")}
    assert ("onnxruntime" in dict(installed)) and installed <= pins(ROOT / "requirements.txt")

    closed = subprocess.run(
        entrypoint(lines), cwd=tmp_path / "srv", env=environment, capture_output=True, text=True, timeout=60
    )
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1), closed.stderr
    assert "HAR_API_KEYS" in closed.stderr

    key, line = new_key("alice")
    port, scratch = free_port(), tmp_path / "scratch"
    scratch.mkdir()
    settings = {"HAR_MODEL": str(export), "HAR_PORT": str(port), "HAR_API_KEYS": line, "HOME": str(scratch)}
    started = subprocess.Popen(
        [*read_only(scratch), *entrypoint(lines)],
        cwd=tmp_path / "srv",
        env=environment | settings | {"TMPDIR": str(scratch)},
    )
    try:
        check = health_check(lines, port)
        for _ in range(120):
            if subprocess.run(check, env=environment, capture_output=True, timeout=30).returncode == 0:
                break
            assert started.poll() is None
            time.sleep(0.5)
        else:
            pytest.fail("never healthy")
        photo = next((tmp_path / "made" / "photos").rglob("*.png")).read_bytes()
        address = f"http://127.0.0.1:{port}/v1/predict"
        with pytest.raises(HTTPError, match="401"):
            post(address, photo, None)
        answer = post(address, photo, key)
        assert {item["label"] for item in answer["top"]} <= set(LABELS)
        answer = post(f"{address}?classes=waving,juggling", photo, key)
        assert answer["label"] in ("waving", "juggling")
        assert post(f"http://127.0.0.1:{port}/v1/explain", photo, key)["heat_map"]
        started.terminate()
        assert started.wait(40) == 0
    finally:
        started.kill()
        started.wait()
    with pytest.raises(URLError):
        post(address, photo, key)
    assert subprocess.run(check, env=environment, capture_output=True, timeout=30).returncode != 0


@pytest.mark.slow
def test_the_app_of_its_image_starts(tmp_path):
    environment = build("Dockerfile.app", "app", tmp_path)
    lines = instructions("Dockerfile.app")["app"]
    port, scratch = free_port(), tmp_path / "scratch"
    scratch.mkdir()
    started = subprocess.Popen(
        [*read_only(scratch), *entrypoint(lines), f"--server.port={port}"],
        cwd=tmp_path / "srv",
        env=environment | {"HOME": str(scratch), "TMPDIR": str(scratch)},
    )
    try:
        check = health_check(lines, port)
        for _ in range(120):
            if subprocess.run(check, env=environment, capture_output=True, timeout=30).returncode == 0:
                break
            assert started.poll() is None
            time.sleep(0.5)
        else:
            pytest.fail("never healthy")
    finally:
        started.terminate()
        assert started.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the accelerators' packages are for Linux")
def test_the_training_image_resolves_to_the_pins(tmp_path):
    """Its pip line for all accelerators at once, asked what it would install, which is gigabytes."""
    report = tmp_path / "report.json"
    asked = f"pip install --dry-run --ignore-installed --quiet --report {report}"
    build("Dockerfile.train", "", tmp_path, pip=asked, EXTRA="cuda,tpu")
    named = (item["metadata"] for item in json.loads(report.read_text())["install"])
    found = {(re.sub(r"[_.]", "-", item["name"].lower()), item["version"]) for item in named}
    known = pins(ROOT / "requirements.txt") | pins(ROOT / "requirements-accelerators.txt")
    assert {pin for pin in found - known if pin[0] != "clip-har-jax"} == set()
    assert pins(ROOT / "requirements-accelerators.txt") <= found
    lines = instructions("Dockerfile.train")[""]
    for command in (json.loads(dict(lines)["CMD"]), ["scripts/auto_train.py", "--help"], ["-m", "export", "--help"]):
        subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "srv",
            env=os.environ | {"PYTHONPATH": str(tmp_path / "srv")},
            capture_output=True,
            check=True,
            timeout=120,
        )


KEYS = {"HAR_API_KEYS": "hashes", "APP_KEY": "use", "GRAFANA_PASSWORD": "secret"}


def compose() -> dict:
    """Return the file as Docker Compose itself reads it."""
    done = subprocess.run(
        ["docker-compose", "-f", ROOT / "docker-compose.yml", "config", "--format=json"],
        env={"PATH": os.environ["PATH"], **KEYS},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compose_stops_without_keys():
    done = subprocess.run(
        ["docker-compose", "-f", ROOT / "docker-compose.yml", "--env-file", os.devnull, "config"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert all(name in done.stderr for name in KEYS)


def test_compose_is_locked_and_open_to_this_machine_alone():
    services = compose()["services"]
    assert set(services) == {"server", "app", "mlflow", "mlflow-volume", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name
        if "build" in service:
            assert service["build"]["target"] in instructions(service["build"]["dockerfile"]), name
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    assert services["mlflow"]["image"].rpartition(":v")[2] == dict(pins(ROOT / "requirements.txt"))["mlflow"]


def test_compose_sets_what_is_read():
    services = compose()["services"]
    given = {name for name in services["server"]["environment"] if name.startswith("HAR_")}
    given |= set(re.findall(r"\b(HAR_\w+)=", (ROOT / "Dockerfile.app").read_text()))
    assert {name.removeprefix("HAR_").lower() for name in given} <= set(Settings.model_fields)
    app = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    assert all(f'"{name}"' in app for name in services["app"]["environment"])
    grace = float(services["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_timeout_s"].default


def test_what_compose_mounts_is_there():
    composed = compose()
    mounts = [volume for service in composed["services"].values() for volume in service.get("volumes", [])]
    files = [volume["source"] for volume in mounts if volume["type"] == "bind" and "/runs" not in volume["source"]]
    assert len(files) == 3
    assert all(Path(file).exists() for file in files)
    scrape = yaml.safe_load((ROOT / "serving" / "monitoring" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["server:8000"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{next(iter(composed['secrets']))}"
