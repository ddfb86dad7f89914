"""From a data set to a model that is served: steps that are skipped while their inputs stay the same.

Each step is a script of the project in a process of its own, and can be killed at any moment: training continues where
it stopped, the others write aside and rename. auto.json remembers what each finished step was made from.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from etils import epath

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.lock import FolderLock
from clip_har_jax.mlops.gates import Check, Gates
from clip_har_jax.trainer.provenance import ROOT
from clip_har_jax.trainer.workdir import make_workdir, read_json

STATE, SUMMARY = "auto.json", "summary.html"
EXIT_REFUSED = 1  # a gate kept the model from being served


class StepFailedError(UserError):
    """A step ended with an exit code other than 0."""

    def __init__(self, name: str, code: int):
        super().__init__(
            f"the {name} step ended with exit code {code}; its own lines say why. The same command goes on"
        )
        self.code = code


@dataclass(frozen=True)
class Plan:
    """What is wanted.

    Attributes:
      config_file: the training's config.
      overrides: of its keys, as on the command line.
      config: both, read.
      workdir: all is written below it.
      test: SPEC that models are judged by; empty: the test part of the prepared data, else the config's data.val.
      formats: of the export, divided by commas.
      name: in the registry.
      gates: what must be shown before the model is served.
    """

    config_file: str
    overrides: tuple[str, ...]
    config: RunConfig
    workdir: Path
    test: str
    formats: str
    name: str
    gates: Gates


@dataclass
class Step:
    """One step's outcome."""

    name: str
    inputs: str  # the digest of what it was made from
    skipped: bool
    seconds: float
    result: dict[str, Any]


@dataclass
class Auto:
    """One pass over the steps."""

    plan: Plan
    steps: list[Step] = field(default_factory=list)
    stopped: int = 0  # the number of the signal that was received
    _child: subprocess.Popen[bytes] | None = None

    @property
    def workdir(self) -> Path:
        return self.plan.workdir

    def run(self) -> int:
        """Run what has to be run; gives the exit code.

        Raises:
          UserError: a step failed; the earlier ones are kept.
        """
        folder = make_workdir(self.workdir)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with FolderLock(epath.Path(folder)):
                return self._run()
        except StepFailedError as error:
            if self.stopped:
                return 128 + self.stopped
            self._summarise(str(error))
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        data = self._data()
        train = self._train(data)
        digest = train["digest"]
        test = self._evaluate(digest, data)
        refused = self._failed(self._gate(test))
        if refused:
            self._summarise(f"not exported: {refused}")
            return EXIT_REFUSED
        export = self._export(digest, data)
        card = self._card(digest, test)
        version = self._register(digest, export, test, card)
        refused = self._failed(self._promote(version))
        self._summarise(f"not served: {refused}" if refused else f"version {version} is the champion")
        return EXIT_REFUSED if refused else 0

    @staticmethod
    def _failed(checks: Iterable[Check]) -> str:
        return "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.passed)

    def _step(self, name: str, inputs: Sequence[Any], outputs: Sequence[Path], do: Callable[[], dict[str, Any]]) -> Any:
        """Run a step unless it was run on these inputs before and its outputs are still there; gives its result."""
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        state = read_json(epath.Path(self.workdir / STATE)) or {}
        known = state.get(name, {})
        skipped = known.get("inputs") == digest and all(path.exists() for path in outputs)
        begin = time.monotonic()
        print(f"{name}: {'nothing changed' if skipped else 'running'}", file=sys.stderr, flush=True)
        result = known["result"] if skipped else do()
        if self.stopped:
            raise StepFailedError(name, 128 + self.stopped)
        if not skipped:
            bundle.write_json(self.workdir / STATE, state | {name: {"inputs": digest, "result": result}})
        self.steps.append(Step(name, digest, skipped, time.monotonic() - begin, result))
        return result

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped = number
        if self._child is not None:
            self._child.send_signal(number)

    def _call(self, step: str, *command: str | Path) -> None:
        """Run a script of the project; hands signals on to it."""
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for `-m export`, wherever this was started
        self._child = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
        if self.stopped:  # between two steps
            self._child.send_signal(self.stopped)
        code = self._child.wait()
        self._child = None
        if code:
            raise StepFailedError(step, code)

    def _data(self) -> dict[str, str]:
        """Return the data's version, and a leak-free split of it where the config names no validation data of its
        own.
        """
        config, output = self.plan.config.data, self.workdir / "data"
        train = make_source(config.train, "train", config.labels, several_classes=True)
        if config.val:
            val = make_source(config.val, "val", tuple(train.labels))
            specs = {"train": config.train, "val": config.val, "test": self.plan.test or config.val}
            return self._step("data", [train.fingerprint, val.fingerprint, specs], [], lambda: specs)

        def prepare() -> dict[str, str]:
            self._call("data", ROOT / "scripts/prepare_data.py", f"--data={config.train}", f"--output={output}")
            specs = {
                split: f"manifest:{output / 'manifest.parquet'}?split={split}" for split in ("train", "val", "test")
            }
            return specs | ({"test": self.plan.test} if self.plan.test else {})

        inputs = [train.fingerprint, config.train, self.plan.test]
        return self._step("data", inputs, [output / "manifest.parquet"], prepare)

    def _fingerprint(self, spec: str, split: str) -> str:
        return make_source(spec, split).fingerprint

    def _train(self, data: Mapping[str, str]) -> dict[str, Any]:
        run = self.workdir / "run"

        def train() -> dict[str, Any]:
            given = [f"--config.data.{split}={data[split]}" for split in ("train", "val")]
            call = [f"--config={self.plan.config_file}", f"--workdir={run}", "--restart", *self.plan.overrides, *given]
            self._call("train", ROOT / "scripts/train.py", *call)
            return {"digest": bundle.verify(run / "model"), "run_id": bundle.read_object(run / "run.json")["run_id"]}

        fingerprints = [self._fingerprint(data[split], split) for split in ("train", "val")]
        inputs = [self.plan.config.digest, fingerprints, code_digest()]
        return self._step("train", inputs, [run / "model" / bundle.MANIFEST], train)

    def _evaluate(self, digest: str, data: Mapping[str, str]) -> dict[str, Any]:
        output, spec = self.workdir / "test", data["test"]

        def evaluate() -> dict[str, Any]:
            call = [f"--model={self.workdir / 'run/model'}", f"--data={spec}", f"--output={output}"]
            self._call("evaluate", ROOT / "scripts/evaluate.py", *call)
            metrics = bundle.read_object(output / "metrics.json")
            return {name: metrics[name] for name in ("num_examples", "top1", "top5", "macro_f1", "nll", "ece")}

        inputs = [digest, spec, self._fingerprint(spec, "test")]
        return self._step("evaluate", inputs, [output / "metrics.json"], evaluate)

    def _gate(self, test: Mapping[str, Any]) -> list[Check]:
        """Return whether an export is worth its time: the model against the champion, as far as it needs no export."""
        from clip_har_jax.mlops.registry import CHAMPION, open_registry

        checks = open_registry(self.plan.name).compare(
            self.workdir / "run/model", self.workdir / "test", CHAMPION, self.plan.gates
        )
        result = {check.name: check.detail for check in checks} or {"champion": "none to compare with"}
        self.steps.append(Step("gate", "", False, 0.0, result))
        return checks

    def _export(self, digest: str, data: Mapping[str, str]) -> dict[str, Any]:
        output = self.workdir / "export"

        def export() -> dict[str, Any]:
            call = ["-m", "export", f"--model={self.workdir / 'run/model'}", f"--formats={self.plan.formats}"]
            self._call("export", *call, f"--output={output}", f"--data={data['test']}", "--overwrite")
            return {"digest": bundle.verify(output), "formats": self.plan.formats}

        return self._step("export", [digest, self.plan.formats], [output / bundle.MANIFEST], export)

    def _card(self, digest: str, test: Mapping[str, Any]) -> dict[str, Any]:
        from clip_har_jax.mlops.card import check_card, make_card

        path = self.workdir / "run/model/README.md"  # outside the seal

        def write() -> dict[str, Any]:
            card = make_card(path.parent, bundle.read_object(self.workdir / "test/metrics.json"), self.plan.name)
            check_card(card)
            path.write_text(card, encoding="utf-8")
            return {"file": str(path), "sha256": hashlib.sha256(card.encode()).hexdigest()}

        return self._step("card", [digest, test], [path], write)

    def _register(
        self, digest: str, export: Mapping[str, Any], test: Mapping[str, Any], card: Mapping[str, Any]
    ) -> int:
        from clip_har_jax.mlops.registry import CHALLENGER, open_registry

        def register() -> dict[str, Any]:
            registry = open_registry(self.plan.name)
            folders = (self.workdir / name for name in ("run/model", "export", "test"))
            version = registry.register(*folders)
            registry.point(CHALLENGER, version)
            return {"version": version.number}

        inputs = [digest, export["digest"], test, card["sha256"], self.plan.name]
        return self._step("register", inputs, [], register)["version"]

    def _promote(self, version: int) -> list[Check]:
        """Make the version the champion, if it passes; that it is already is no mistake here."""
        from clip_har_jax.mlops.registry import CHAMPION, open_registry

        registry = open_registry(self.plan.name)
        begin = time.monotonic()
        if CHAMPION in registry.find(str(version)).aliases:
            checks = [Check("champion", True, f"version {version} is it already")]
        else:
            checks = registry.promote(str(version), CHAMPION, self.plan.gates)
        result = {check.name: check.detail for check in checks}
        self.steps.append(Step("promote", "", False, time.monotonic() - begin, result))
        return checks

    def _summarise(self, outcome: str) -> None:
        from clip_har_jax.pipelines.summary import make_summary

        page = make_summary(self.plan.config_file, outcome, self.steps, self.workdir)
        (self.workdir / SUMMARY).write_text(page, encoding="utf-8")
        print(f"{outcome}; {self.workdir / SUMMARY} shows it", flush=True)


def _die_with_parent() -> None:
    """Lets no step outlive a pass that was killed, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def code_digest() -> str:
    """SHA-256 over the package's own code, so that a changed program trains again."""
    sha = hashlib.sha256()
    for path in sorted((ROOT / "clip_har_jax").rglob("*.py")):
        sha.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()
