"""The Ray engine: on clusters of several nodes on this machine, with workers, models and nodes killed by process id."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from clip_har_jax.errors import UserError
from clip_har_jax.inference import ray_cluster, ray_engine, ray_models
from clip_har_jax.inference.backends import Backend
from clip_har_jax.inference.bulk_engine import Part
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.inference.ray_engine import SKIPPED, Segment, Work, cut
from clip_har_jax.inference.ray_models import ModelFlags, _Model
from clip_har_jax.preprocess import Preprocess
from tests.support.unreliable_ray import UnreliableRay

ROOT = Path(__file__).parents[2]
WAIT_S = 120
NUM_KILLS = 20
# Ends a process that opens a file of this name, as a decoder does that has a fault. Ray's workers import it.
POISON = """
import os, signal, sys
def end(event, arguments):
    if event == "open" and str(arguments[0]).endswith("poison.jpg"):
        os.kill(os.getpid(), signal.SIGSEGV)
sys.addaudithook(end)
"""


def test_a_file_that_ends_its_process_is_found_by_halving() -> None:
    names = [f"{i}.jpg" for i in range(128)]
    work = Work(0, 0, [Segment(names)])
    crashes = 0
    while pending := [segment for segment in work.segments if segment.loaded is None]:
        for segment in pending:
            if "77.jpg" in segment.inputs:
                crashes += 1
                work.replace(segment, segment.after_crash())
            else:
                segment.loaded = list(segment.inputs)
    assert work.is_decoded and crashes == 7 + 3  # halves down to one file, and that one three times
    outcomes = [outcome for segment in work.segments for outcome in segment.loaded]
    assert outcomes == [*names[:77], SKIPPED, *names[78:]]


def test_parts_are_cut_on_demand_and_pieces_know_their_place() -> None:
    read: list[int] = []

    def parts() -> Iterator[Part]:
        for number, length in enumerate((5, 2)):
            read.append(number)
            yield Part(number, [f"{number}-{i}" for i in range(length)])

    works = cut(parts(), size=2)
    first = next(works)
    assert read == [0] and first.segments[0].inputs == ["0-0", "0-1"]
    assert [(work.part, work.start, len(work.segments[0].inputs)) for work in works] == [
        (0, 2, 2),
        (0, 4, 1),
        (1, 0, 2),
    ]


def test_without_ray_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine=ray needs Ray .*; pip install 'clip-har-jax\[ray\]'"):
        ray_cluster.import_ray()


def test_an_own_ray_that_does_not_start_is_not_called_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no free port")

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: MagicMock(init=init, **{"exceptions.RayError": OSError}))
    with pytest.raises(UserError) as refused, ray_cluster.connected(None):
        pass
    assert str(refused.value) == "--engine=ray: Ray can't start on this machine (no free port)"


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Give the address of a port that answers each connection with some bytes, or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            connection, _ = server.accept()
            held.append(connection)  # closed, it would be an answer
            if answer is not None:
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            thread.join()
            for connection in held:
                connection.close()


def test_an_address_where_no_ray_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"--ray_address={closed}: .* doesn't answer \(.*refused.*\); start it with"):
        ray_cluster.find_address(closed)
    with listening(None) as silent, pytest.raises(UserError, match=r"doesn't answer .*timed out"):
        ray_cluster.find_address(silent)
    with (
        listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as web,
        pytest.raises(UserError, match="isn't the head of a Ray"),
    ):
        ray_cluster.find_address(web)
    with listening(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as head:
        assert ray_cluster.find_address(head) == head
    for wrong in ("head", "ray://10.0.0.1:10001", "10.0.0.1:"):
        with pytest.raises(UserError, match="write HOST:PORT"):
            ray_cluster.find_address(wrong)


def test_the_cluster_of_this_machine_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no Ray runs on this machine"):
        ray_cluster.find_address("auto")
    with listening(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as head:
        monkeypatch.setenv("RAY_ADDRESS", head)
        assert ray_cluster.find_address("auto") == head


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A predictor whose inputs name numbers, and whose probabilities are those; 13 can't be read."""

    def load(path: str, _: object) -> np.ndarray | str:
        number = int(Path(path).name)
        return "unlucky" if number == 13 else np.full((1, 1, 3), number, np.uint8)

    backend = MagicMock(spec=Backend, digest="d", labels=("a",), preprocess=Preprocess(1))
    backend.predict = lambda images: images[:, 0, 0, :1].astype(np.float32)
    predictor = Predictor.__new__(Predictor)
    predictor.backend, predictor.batch_size = backend, 2
    monkeypatch.setattr(ray_engine, "try_load", load)
    monkeypatch.setattr(ray_engine, "PIECE_SIZE", 8)
    monkeypatch.setattr(ray_models, "Predictor", lambda *_: predictor)
    monkeypatch.setattr(ray_models, "only_on", str)
    monkeypatch.setattr(ray_models, "LOOK_S", 0.0)
    return predictor


@pytest.mark.parametrize("loss", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_losses_by_chance_cost_no_row(
    monkeypatch: pytest.MonkeyPatch, numbers: Predictor, seed: int, loss: float
) -> None:
    ray = UnreliableRay(seed, loss)
    for module in (ray_engine, ray_models):
        monkeypatch.setattr(module, "import_ray", lambda: ray)
    expected = {(part, i): 50 * part + i for part in range(4) for i in range(50)}
    parts = (Part(part, [str(50 * part + i) for i in range(50)]) for part in range(4))
    found: dict[tuple[int, int], object] = {}
    for piece in ray_engine.RayEngine(numbers, "model", ()).run(parts):
        for i, outcome in enumerate(piece.outcomes, piece.start):
            assert (piece.part, i) not in found
            found[piece.part, i] = 13 if outcome == "unlucky" else int(outcome[0])
    assert found == expected
    assert len(set(ray.losses)) >= 3 if loss else not ray.losses
    assert ray.most_waiting < 20  # of 28 pieces


def test_a_model_that_never_lives_ends_the_job(monkeypatch: pytest.MonkeyPatch, numbers: Predictor) -> None:
    ray = UnreliableRay(0, 1.0, lost=("predict",))
    for module in (ray_engine, ray_models):
        monkeypatch.setattr(module, "import_ray", lambda: ray)
    engine = ray_engine.RayEngine(numbers, "model", ())
    with pytest.raises(UserError, match=r"node 10.0.0.1: the model's process has ended 20 times in a row"):
        list(engine.run(iter([Part(0, ["1", "2"])])))


def test_a_node_without_the_model_is_named() -> None:
    with pytest.raises(UserError, match=r"node 10.0.0.5: .*nowhere.*; each node needs the model's folder at the same"):
        _Model().open(ModelFlags("/nowhere/model", (), 4), "10.0.0.5")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program that has nothing of the tests' own settings."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "RAY_", "PYTEST"))
    }
    return kept | {"PYTHONPATH": str(ROOT)} | more


ON_CLUSTER = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Nodes:
    """A cluster of three nodes, `tests.support.ray_nodes`."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self.address, self.raylets = "", list[int]()
        self._read()

    def _read(self) -> None:
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline())
        self.address, self.raylets = said["address"], said["raylets"]

    def add(self) -> None:
        """Add a node."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._read()

    def workers(self) -> list[psutil.Process]:
        """Return the processes that the living nodes have started."""
        found = []
        for pid in self.raylets:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(pid).children(recursive=True)
        return found


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def end_tree(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for other in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                other.kill()
    process.communicate()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("poison")
    (folder / "sitecustomize.py").write_text(POISON)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_nodes", "1", "1", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{folder}:{ROOT}"),
    )
    try:
        yield Nodes(process)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=WAIT_S)  # its standard input ends
    finally:
        end_tree(process)


@pytest.fixture(scope="module")
def listing(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a list of photographs, some of them unreadable."""
    root = tmp_path_factory.mktemp("listed")
    photos = sorted(path for path in (served_folder.parent / "photos").rglob("*") if path.is_file())
    (root / "bad.jpg").write_bytes(b"not an image")
    (root / "last.jpg").write_bytes(photos[0].read_bytes())
    paths = [*[*photos, root / "bad.jpg"] * 150, root / "last.jpg"]
    (root / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    return root / "list.txt"


def command(model: Path, listing: Path, output: Path, *more: str) -> list[str]:
    flags = [f"--model={model}", f"--inputs={listing}", f"--output={output}", "--batch_size=8", "--part_size=100"]
    return [sys.executable, "scripts/predict_bulk.py", *flags, *more]


def files(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.parquet")}


@pytest.fixture(scope="module")
def by_local_engine(served_folder: Path, listing: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("local")
    done = subprocess.run(command(served_folder, listing, output), cwd=ROOT, capture_output=True, env=environment())
    assert done.returncode == 1, done.stderr  # some can't be read
    return files(output)


@pytest.mark.slow
def test_a_killed_driver_continues_and_the_files_are_those_of_the_local_engine(
    served_folder: Path, listing: Path, tmp_path: Path, by_local_engine: dict[str, bytes]
) -> None:
    ray = command(served_folder, listing, tmp_path, "--engine=ray")
    last = listing.parent / "last.jpg"
    photo = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # who reads it waits, so the job can't end before it is killed
    process = subprocess.Popen(ray, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment())
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + WAIT_S
        while len(list(tmp_path.glob("predictions-*/*.parquet"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        # Ray ends with its driver; its two agents, which do nothing without it, notice that a minute later.
        working = [other for other in started if "Agent" not in name_of(other)]
        _, alive = psutil.wait_procs(working, timeout=WAIT_S)
        assert started and not alive
    finally:
        for other in started:
            with suppress(psutil.NoSuchProcess):
                other.kill()
        end_tree(process)
        last.unlink()
        last.write_bytes(photo)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions-*/*.parquet")}
    assert 2 <= len(finished) < 14  # of 1,351 inputs, 100 each
    done = subprocess.run(ray, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files(tmp_path) == by_local_engine
    summary = json.loads(next(tmp_path.glob("predictions-*/summary.json")).read_text())
    assert summary["this_start"]["engine"] == "ray" and summary["unreadable"] == 150


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_cost_no_row(
    nodes: Nodes, served_folder: Path, listing: Path, tmp_path: Path, by_local_engine: dict[str, bytes]
) -> None:
    """Workers, models and nodes are killed at random times, in as many runs as 20 kills need."""
    chance, kills, run = random.Random(0), list[str](), 0
    while len(kills) < NUM_KILLS:
        output, run = tmp_path / str(run), run + 1
        ray = command(served_folder, listing, output, "--engine=ray", f"--ray_address={nodes.address}")
        with open(tmp_path / "said.txt", "w+") as said:
            process = subprocess.Popen(ray, cwd=ROOT, stdout=said, stderr=said, env=environment(**ON_CLUSTER))
            try:
                while process.poll() is None:
                    time.sleep(chance.uniform(0.1, 1.0))
                    started = (output / "predictions-00000-of-00001" / "about.json").is_file()
                    if started and len(kills) < NUM_KILLS:
                        kills += kill_one(nodes, chance, wants_node=len(kills) % 6 == 5)
            finally:
                end_tree(process)
            said.seek(0)
            assert process.returncode == 1, said.read()  # some can't be read
        assert files(output) == by_local_engine, kills
    assert set(kills) == {"raylet", "ray::decode_all", "ray::_Model"} and len(kills) == NUM_KILLS, kills


def kill_one(nodes: Nodes, chance: random.Random, wants_node: bool) -> list[str]:
    """Kill a node other than the driver's, which another one replaces, or a worker that decodes or holds a model.

    Return its name in a list; an empty one if no worker is at work.
    """
    if wants_node:
        living = [pid for pid in nodes.raylets[1:] if psutil.pid_exists(pid) and name_of(psutil.Process(pid))]
        raylet = psutil.Process(chance.choice(living))
        others = raylet.children(recursive=True)
        for process in (raylet, *others):  # as with a machine
            with suppress(psutil.NoSuchProcess):
                process.kill()
        nodes.add()
        return ["raylet"]
    name = chance.choice(("ray::decode_all", "ray::decode_all", "ray::_Model"))
    for _ in range(100):  # a task is short: look until one is met
        for worker in nodes.workers():
            if name_of(worker).startswith(name):
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
                    return [name]
        time.sleep(0.01)
    return []


@pytest.mark.slow
def test_a_file_that_ends_the_decoder_is_skipped_and_named(
    nodes: Nodes, served_folder: Path, listing: Path, tmp_path: Path
) -> None:
    names = [*listing.read_text().splitlines()[:7], str(tmp_path / "poison.jpg")]
    (tmp_path / "poison.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("\n".join(sorted(names)))
    flags = "--engine=ray", f"--ray_address={nodes.address}"
    ray = command(served_folder, tmp_path / "list.txt", tmp_path / "out", *flags)
    done = subprocess.run(ray, cwd=ROOT, capture_output=True, text=True, env=environment(**ON_CLUSTER))
    assert done.returncode == 1 and "8 inputs, 1 of them unreadable" in done.stderr, done.stderr
    (bad,) = (tmp_path / "out").glob("bad_inputs-*/*.parquet")
    assert pq.read_table(bad).to_pylist() == [{"input": str(tmp_path / "poison.jpg"), "error": SKIPPED}]
    (good,) = (tmp_path / "out").glob("predictions-*/*.parquet")
    assert pq.read_table(good).column("input").to_pylist() == sorted(names[:7])


REFUSALS = """
import sys, types
from pathlib import Path
import ray
from clip_har_jax.errors import UserError
from clip_har_jax.inference.bulk import predict_bulk
from clip_har_jax.inference.predictor import Predictor
from clip_har_jax.inference.ray_cluster import connected
from clip_har_jax.inference.ray_engine import RayEngine, explained

address, model, listing, output = sys.argv[1:]


def predict(path, **identity):
    predictor = Predictor(model, batch_size=8)
    engine = RayEngine(predictor, path, ())
    engine._identity |= identity
    predict_bulk(predictor, listing, Path(output), engine=engine)


def full_disk():
    with explained():
        raise ray.exceptions.OutOfDiskError()


def no_module():
    module = types.ModuleType("only_here")
    exec("def f(): pass", module.__dict__)
    sys.modules["only_here"] = module
    with explained():
        ray.get(ray.remote(module.f).remote())


def told(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except UserError as error:
        print(error, flush=True)


version, ray.__version__ = ray.__version__, "0.0.1"
told(lambda: connected(address).__enter__())
ray.__version__ = version
with connected(address):
    told(predict, "/nowhere/model")
    told(predict, model, digest="another")
    told(full_disk)
    told(no_module)
"""


@pytest.mark.slow
def test_refusals_are_one_line_with_the_node(nodes: Nodes, served_folder: Path, listing: Path, tmp_path: Path) -> None:
    arguments = [nodes.address, str(served_folder), str(listing), str(tmp_path / "out")]
    program = [sys.executable, "-c", REFUSALS, *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment(**ON_CLUSTER))
    assert done.returncode == 0, done.stderr
    versions, missing, other, disk, module = done.stdout.splitlines()
    assert "0.0.1" in versions and "install the same versions of Ray and Python here and on all nodes" in versions
    assert missing.startswith("node 127.0.0.1: ") and "/nowhere/model" in missing
    assert "node 127.0.0.1: " in other and "has another digest there" in other
    assert "a node's disk is full" in disk
    assert module.startswith("node 127.0.0.1: No module named 'only_here'; install the same version of this project")
