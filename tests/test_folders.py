"""Writers of one folder: no one deletes a living process's work, and a killed one's leftovers go.

Real processes, two at a time, with delays drawn from a seed; in half of the pairs the first one is killed.
"""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_har_jax.errors import UserError
from clip_har_jax.files import atomic, write_text
from clip_har_jax.folders import output_folder, replace_folder, replacing

# Each writer is a public function that a command ends in, given work of a few seconds by its own arguments.
# argv: writer, root, a mark that the written folder carries, seconds that the writing takes
WRITE = """
import sys, time
from pathlib import Path
from clip_har_jax import cli
writer, root, mark, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])


def slow(folder, name="whole"):
    (folder / "half").write_text(mark)
    print("began", flush=True)
    time.sleep(seconds)
    (folder / "half").rename(folder / name)


def replaced():
    from clip_har_jax.folders import replace_folder
    replace_folder(root / "out", slow)


def in_place():
    from clip_har_jax.folders import output_folder
    with output_folder(root / "out") as folder:
        slow(folder)


def bulk():
    from types import SimpleNamespace
    import numpy as np
    from clip_har_jax.bundle import Actions
    from clip_har_jax.inference.bulk import predict_bulk

    def load(path):
        print("began", flush=True)
        time.sleep(seconds / 8)
        return np.zeros((2, 2, 3), np.uint8)

    backend = SimpleNamespace(
        path=root,
        digest="d",
        actions=Actions(("a", "b"), {"a": ("a",), "b": ("b",)}),
        predict=lambda images: np.full((len(images), 2), 0.5, np.float32),
    )
    predictor = SimpleNamespace(backend=backend, labels=("a", "b"), batch_size=2, try_load=load)
    (root / "list.txt").write_text("".join(f"{i}.png\\n" for i in range(8)))
    predict_bulk(predictor, str(root / "list.txt"), root / "out", part_size=2, workers=1)


def hub():
    from clip_har_jax.mlops import hub
    hub.make_card = lambda *about: "card"
    hub.check_card = lambda card: None
    copytree = hub.shutil.copytree

    def slow_copy(source, target, **options):
        slow(target, ".whole")
        copytree(source, target, **options)

    hub.shutil.copytree = slow_copy
    hub.write_hub_folder(root / "model", None, "me/har", "mit", root / "out")


def prepare():
    from clip_har_jax.pipelines import prepare_data as job
    scan = job.scan

    def slow_scan(source, i):
        print("began", flush=True)
        time.sleep(seconds / 8)
        return scan(source, i)

    job.scan = slow_scan
    job.prepare_data([f"folder:{root / 'photos'}"], root / "out", job.PrepareOptions(num_workers=0))


cli.run({"replaced": replaced, "in_place": in_place, "bulk": bulk, "hub": hub, "prepare": prepare}[writer])
"""
WRITERS = ("replaced", "in_place", "bulk", "hub", "prepare")
SECONDS = 1.0


def start(writer: str, root: Path, mark: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITE, writer, str(root), mark, str(SECONDS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with a small model to copy and photographs to prepare."""
    from clip_har_jax import bundle
    from tests.support.model_folders import write_images

    (tmp_path / "model").mkdir()
    bundle.write_actions(tmp_path / "model", bundle.Actions(("a",), {"a": ("a",)}))
    bundle.seal(tmp_path / "model")
    write_images(tmp_path / "photos", ("a", "b"), per_class=4)
    return tmp_path


@pytest.mark.timeout(300)
# Each writer in every run, and more of them with other delays in the slow ones.
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < len(WRITERS) else pytest.mark.slow) for seed in range(20)]
)
def test_two_writers_of_one_folder_do_each_other_no_harm(root: Path, seed: int) -> None:
    writer, killed, delays = WRITERS[seed % len(WRITERS)], seed % 2 == 1, random.Random(seed)
    first = start(writer, root, "first")
    assert first.stdout is not None
    assert first.stdout.readline() == "began\n", first.communicate()[1]
    time.sleep(delays.uniform(0, SECONDS / 2))
    if killed:
        first.send_signal(signal.SIGKILL)  # it isn't waited for: the second one meets a process that has just died
    second = start(writer, root, "second")
    said = second.communicate()[1]
    refused = re.search(rf"out.*: process {first.pid} on host .* is writing here; wait for it or stop it", said)
    first_said = first.communicate()[1]
    if killed:
        assert second.returncode == 0, said
    else:
        assert first.returncode == 0, first_said
        assert refused or second.returncode == 0 or "not empty" in said, said  # or the first had ended meanwhile
        assert second.returncode == 0 or said.count("\n") == 1, said
    if writer in ("replaced", "in_place"):
        mark = "second" if second.returncode == 0 else "first"
        assert (root / "out" / "whole").read_text() == mark
    expected = {
        "replaced": {"whole"},
        "in_place": {"whole"},
        "hub": {".whole", "actions.json", "manifest.json", "README.md"},
        "bulk": {f"predictions-00000-of-00001/{i:06d}.parquet" for i in range(4)}
        | {f"predictions-00000-of-00001/{name}.json" for name in ("about", "summary")},
        "prepare": {"manifest.parquet", "prepare.json", "duplicates.json", "bad_inputs.jsonl", "report.html"},
    }[writer]
    assert names(root / "out") == expected
    assert {path.name for path in root.iterdir()} <= {"model", "photos", "list.txt", "out"}, "leftovers"


def test_replacing_works_under_a_name_that_is_part_of_anothers_scratch_name(tmp_path: Path) -> None:
    """A writer of "model" must not take the scratch folder of "model.x" for a leftover of its own."""
    with replacing(tmp_path / "model.x") as other:
        (other / "kept").write_text("")
        replace_folder(tmp_path / "model", lambda folder: (folder / "mine").write_text(""))
    assert names(tmp_path) == {"model/mine", "model.x/kept"}


def test_a_kill_between_the_renames_brings_the_old_folder_back(tmp_path: Path) -> None:
    token = "0123456789ab"
    (tmp_path / f".model.{token}.old").mkdir()
    (tmp_path / f".model.{token}.old" / "old").write_text("")
    (tmp_path / f".model.{token}.partial").mkdir()
    with pytest.raises(ZeroDivisionError):
        replace_folder(tmp_path / "model", lambda folder: (folder / "x").write_text(str(1 / 0)))
    assert names(tmp_path) == {"model/old"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output=.*file: can't be made or written \(File exists\)"):
        output_folder(tmp_path / "file").__enter__()


def test_a_killed_writers_scratch_file_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (tmp_path / ".x.json.0123456789ab.partial").write_text("of a killed one")
    with atomic(path) as living:
        living.write_text("living")
        write_text(path, "other")
        assert living.read_text() == "living"
    assert path.read_text() == "living"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_error_between_the_two_renames_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(FileNotFoundError), replacing(target) as folder:
        folder.rmdir()  # so that it can't be put in the place
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
