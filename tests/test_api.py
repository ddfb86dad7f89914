"""The public interface and the commands, from outside: light imports, exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_the_package_is_light():
    code = "import sys, clip_har_jax; from clip_har_jax import load_config; print(json.dumps(sorted(sys.modules)))"
    done = run_python("-c", f"import json; {code}")
    heavy = {"jax", "flax", "tensorflow", "grain", "transformers", "matplotlib", "torch"} & set(json.loads(done.stdout))
    assert not heavy


def test_neither_tensorflow_nor_what_draws_is_on_the_way_to_training():
    found = "print({'tensorflow', 'matplotlib', 'jinja2'} & set(sys.modules) or 'none')"
    done = run_python("-c", f"import sys, clip_har_jax; clip_har_jax.train; {found}")
    assert done.stdout.strip() == "none", done.stderr


def test_the_public_names_exist():
    import clip_har_jax

    assert all(getattr(clip_har_jax, name) is not None for name in clip_har_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = clip_har_jax.nothing


def test_help_explains_each_flag_and_exits_0():
    done = run_python("scripts/train.py", "--help")
    assert done.returncode == 0
    assert "--config=configs/demo.py" in done.stdout
    assert "--workdir=runs/demo" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        (["--config=configs/demo.py", "--workdir=x", "--config.optim.lr=1"], "unknown key"),
        (["--config=configs/demo.py", "--workdir=x", "--config.seed"], "--config.seed=VALUE"),
        (["--config=configs/demo.py", "--workdir=x", "--learning_rate=1"], "unrecognized argument"),
        (["--config=configs/demo.py"], "--workdir"),
        (["--config=configs/demo.py", "--wokdir=x"], "--wokdir: did you mean '--workdir'?"),
        (["--config=configs/demo.py", "--workdir=x", "--confg.seed=1"], "did you mean '--config.'?"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(arguments, message):
    done = run_python("scripts/train.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_what_is_printed_is_one_line_a_name_whatever_it_holds(capsys):
    from clip_har_jax import cli
    from clip_har_jax.errors import UserError

    cli.print_rows([("model", "runs/[bold]/" + "long/" * 40), ("top-1", "0.5")])
    assert capsys.readouterr().out.splitlines() == ["model  runs/[bold]/" + "long/" * 40, "top-1  0.5"]
    assert cli.report(UserError("a\nb\x1b[2J \udcff läuft")) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b[2J \\udcff läuft\n"


def test_a_terminal_that_lacks_a_character_ends_no_command(tmp_path):
    code = "from clip_har_jax import cli; cli.run(lambda: print('läuft 跑步'))"
    environment = {"PYTHONIOENCODING": "latin-1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.stdout.decode("latin-1") == "läuft \\u8dd1\\u6b65\n"


@pytest.mark.timeout(60)  # the thread would keep the process for good
def test_threads_of_a_library_that_never_end_keep_no_failed_command(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        """import threading
from concurrent.futures import ThreadPoolExecutor
from clip_har_jax import cli
from clip_har_jax.errors import UserError

def main():
    threading.Thread(target=threading.Event().wait).start()
    ThreadPoolExecutor().submit(threading.Event().wait)
    raise UserError("the store is gone")

cli.EXIT_S = 0.2
cli.run(main)
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the store is gone\n")


def test_a_program_that_runs_a_command_goes_on_after_its_error(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        """import time
from clip_har_jax import cli
from clip_har_jax.errors import UserError

def main():
    raise UserError("a mistake")

cli.EXIT_S = 0.1
try:
    cli.run(main)
except SystemExit:
    time.sleep(1)
    print("went on")
"""
    )
    done = run_python(script)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_system_without_a_temporary_folder_is_one_line_that_says_how_to_name_one(tmp_path):
    """As in a container with a read-only root; libraries, such as matplotlib, raise an OSError with other advice."""
    script = tmp_path / "command.py"
    script.write_text(
        """import tempfile
from clip_har_jax import cli

tempfile._candidate_tempdir_list = lambda: ["/nothing"]
cli.run(lambda: tempfile.mkdtemp() and 0)
"""
    )
    done = run_python(script)
    assert done.returncode == 2
    assert done.stderr == "error: no folder for temporary files can be written; set TMPDIR to one\n"


def test_onnx_runtime_neither_marks_the_machine_nor_sends_its_usage(tmp_path, monkeypatch):
    for name in os.environ.keys() - {"PATH", "PYTHONPATH"}:
        monkeypatch.delenv(name)  # it has names by which it knows a CI machine, where it writes nothing
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "import onnxruntime; onnxruntime.SessionOptions()"
    run_python("-c", code)
    written = [path.name for path in tmp_path.rglob("deviceid")]
    assert written, "without the package it does; else the setting is needless"
    for path in tmp_path.rglob("deviceid"):
        path.unlink()
    run_python("-c", f"import clip_har_jax; {code}")
    assert not list(tmp_path.rglob("deviceid"))
