"""From a data set to a served model, in steps; a step is skipped while its inputs are unchanged.

Each step is a script of the project in its own process and can be killed at any time: training resumes, the others
replace their outputs atomically. auto.json stores the inputs of each finished step.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from clip_har_jax import bundle
from clip_har_jax.config import RunConfig, refuse_multi_label
from clip_har_jax.data.scan import refuse_drawn_clips
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object, sha256
from clip_har_jax.lock import FolderLock
from clip_har_jax.mlops.gates import Check, Gates
from clip_har_jax.models.factory import known_config
from clip_har_jax.pipelines.auto_steps import StepFailedError, Steps
from clip_har_jax.trainer.provenance import ROOT
from clip_har_jax.trainer.workdir import make_workdir

STATE, SUMMARY = "auto.json", "summary.html"
EXIT_REFUSED = 1  # a gate refused the model


@dataclass(frozen=True)
class AutoSettings:
    """The settings of an automated training.

    Attributes:
      config_file: the config of the training.
      overrides: of its keys, as on the command line.
      config: both, parsed.
      workdir: the folder for all files.
      test: SPEC of the test images; empty: the test part of the prepared data, else the config's data.val.
      formats: of the export, separated by commas.
      name: in the registry.
      gates: the conditions for serving the model.
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
class Auto:
    """One pass over the steps."""

    settings: AutoSettings

    def __post_init__(self) -> None:
        self.workdir = self.settings.workdir
        self.steps = Steps(self.workdir / STATE)

    def run(self) -> int:
        """Run the steps whose inputs changed; return the exit code.

        Raises:
          UserError: a step failed; the earlier ones are kept.
        """
        folder = make_workdir(self.workdir)
        try:
            with self.steps.handling_signals(), FolderLock(epath.Path(folder)):
                return self._run()
        except StepFailedError as error:
            if self.steps.stopped:
                return 128 + self.steps.stopped
            self._summarise(str(error))
            raise

    def _run(self) -> int:
        refuse_multi_label(self.settings.config, "auto_train.py")
        self._check_model()
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

    def _check_model(self) -> None:
        """Check that the model can be exported, before it is trained.

        Raises:
          UserError: it can't.
        """
        name = self.settings.config.model.name
        try:
            reason = known_config(name).no_export
        except UserError:  # a Hub name whose sizes need a download, or a wrong one, which the training refuses
            return
        if reason:
            raise UserError(f"config.model.name={name}: {reason}")

    @staticmethod
    def _failed(checks: Iterable[Check]) -> str:
        return "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.passed)

    def _data(self) -> dict[str, str]:
        """Return the SPECs of the splits; make a leak-free split if the config names no validation data."""
        config, output = self.settings.config.data, self.workdir / "data"
        train = make_source(config.train, "train", config.labels, several_classes=True)
        if config.val:
            val = make_source(config.val, "val", tuple(train.labels))
            specs = {"train": config.train, "val": config.val, "test": self.settings.test or config.val}
            return self.steps.run("data", [train.fingerprint, val.fingerprint, specs], [], lambda: specs)

        refuse_drawn_clips(train)

        def prepare() -> dict[str, str]:
            self.steps.call("data", ROOT / "scripts/prepare_data.py", f"--data={config.train}", f"--output={output}")
            specs = {
                split: f"manifest:{output / 'manifest.parquet'}?split={split}" for split in ("train", "val", "test")
            }
            return specs | ({"test": self.settings.test} if self.settings.test else {})

        inputs = [train.fingerprint, config.train, self.settings.test]
        return self.steps.run("data", inputs, [output / "manifest.parquet"], prepare)

    def _fingerprint(self, spec: str, split: str) -> str:
        return make_source(spec, split).fingerprint

    def _train(self, data: Mapping[str, str]) -> dict[str, Any]:
        run = self.workdir / "run"

        def train() -> dict[str, Any]:
            given = [f"--config.data.{split}={data[split]}" for split in ("train", "val")]
            call = [
                f"--config={self.settings.config_file}",
                f"--workdir={run}",
                "--restart",
                *self.settings.overrides,
                *given,
            ]
            self.steps.call("train", ROOT / "scripts/train.py", *call)
            return {"digest": bundle.verify(run / "model"), "run_id": read_object(run / "run.json")["run_id"]}

        fingerprints = [self._fingerprint(data[split], split) for split in ("train", "val")]
        inputs = [self.settings.config.digest, fingerprints, code_digest()]
        return self.steps.run("train", inputs, [run / "model" / bundle.MANIFEST], train)

    def _evaluate(self, digest: str, data: Mapping[str, str]) -> dict[str, Any]:
        output, spec = self.workdir / "test", data["test"]

        def evaluate() -> dict[str, Any]:
            call = [f"--model={self.workdir / 'run/model'}", f"--data={spec}", f"--output={output}"]
            self.steps.call("evaluate", ROOT / "scripts/evaluate.py", *call)
            metrics = read_object(output / "metrics.json")
            return {name: metrics[name] for name in ("num_examples", "top1", "top5", "macro_f1", "nll", "ece")}

        inputs = [digest, spec, self._fingerprint(spec, "test")]
        return self.steps.run("evaluate", inputs, [output / "metrics.json"], evaluate)

    def _gate(self, test: Mapping[str, Any]) -> list[Check]:
        """Check the model against the champion with the gates that need no export."""
        from clip_har_jax.mlops.model_registry import CHAMPION, open_registry

        checks = open_registry(self.settings.name).compare_with(
            self.workdir / "run/model", self.workdir / "test", CHAMPION, self.settings.gates
        )
        result = {check.name: check.detail for check in checks} or {"champion": "none to compare with"}
        self.steps.add("gate", result)
        return checks

    def _export(self, digest: str, data: Mapping[str, str]) -> dict[str, Any]:
        output = self.workdir / "export"

        def export() -> dict[str, Any]:
            call = ["-m", "export", f"--model={self.workdir / 'run/model'}", f"--formats={self.settings.formats}"]
            self.steps.call("export", *call, f"--output={output}", f"--data={data['test']}", "--overwrite")
            return {"digest": bundle.verify(output), "formats": self.settings.formats}

        return self.steps.run("export", [digest, self.settings.formats], [output / bundle.MANIFEST], export)

    def _card(self, digest: str, test: Mapping[str, Any]) -> dict[str, Any]:
        from clip_har_jax.mlops.card import check_card, make_card

        path = self.workdir / "run/model/README.md"  # outside the seal

        def write() -> dict[str, Any]:
            card = make_card(path.parent, read_object(self.workdir / "test/metrics.json"), self.settings.name)
            check_card(card)
            path.write_text(card, encoding="utf-8")
            return {"file": str(path), "sha256": sha256(card)}

        return self.steps.run("card", [digest, test], [path], write)

    def _register(
        self, digest: str, export: Mapping[str, Any], test: Mapping[str, Any], card: Mapping[str, Any]
    ) -> int:
        from clip_har_jax.mlops.model_registry import CHALLENGER, open_registry

        def register() -> dict[str, Any]:
            registry = open_registry(self.settings.name)
            folders = (self.workdir / name for name in ("run/model", "export", "test"))
            version = registry.register(*folders)
            registry.point(CHALLENGER, version)
            return {"version": version.number}

        inputs = [digest, export["digest"], test, card["sha256"], self.settings.name]
        return self.steps.run("register", inputs, [], register)["version"]

    def _promote(self, version: int) -> list[Check]:
        """Make the version the champion if it passes the gates; return the checks."""
        from clip_har_jax.mlops.model_registry import CHAMPION, open_registry

        registry = open_registry(self.settings.name)
        begin = time.monotonic()
        if CHAMPION in registry.find(str(version)).aliases:
            checks = [Check("champion", True, f"version {version} is it already")]
        else:
            checks = registry.promote(str(version), CHAMPION, self.settings.gates)
        result = {check.name: check.detail for check in checks}
        self.steps.add("promote", result, time.monotonic() - begin)
        return checks

    def _summarise(self, outcome: str) -> None:
        from clip_har_jax.pipelines.summary import make_summary

        page = make_summary(self.settings.config_file, outcome, self.steps.done, self.workdir)
        (self.workdir / SUMMARY).write_text(page, encoding="utf-8")
        print(f"{outcome}; {self.workdir / SUMMARY} shows it", flush=True)


def code_digest() -> str:
    """Return a SHA-256 over the package's code, so that a changed program trains again."""
    files = sorted((ROOT / "clip_har_jax").rglob("*.py"))
    return sha256(path.relative_to(ROOT).as_posix().encode() + path.read_bytes() for path in files)
