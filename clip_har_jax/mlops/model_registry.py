"""The model registry, with MLflow's aliases: `champion` is the served version, `challenger` its possible successor.

A version is a folder of artifacts (model/, export/, evaluation/) of an MLflow run, with the model's digest as a tag. A
pulled version is checked against its manifest and that tag.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from clip_har_jax import bundle, remote
from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import read_object
from clip_har_jax.folders import replacing
from clip_har_jax.mlops.gates import RETENTION, Check, Gates, check_evaluation, check_gates, read_metrics
from clip_har_jax.mlops.mlflow import find_experiment, open_client, store_lock

NAME = "har"
CHAMPION, CHALLENGER = "champion", "challenger"
PARTS = ("model", "export", "evaluation")
REPLACED = "replaced_version"  # the version that had the alias before, for a rollback


@dataclass(frozen=True)
class RegisteredVersion:
    """A registered version.

    Attributes:
      number: assigned by the registry, from 1.
      digest: of the model folder; the exported folder refers to it.
      aliases: those that point to this version.
      tags: further facts on the version.
    """

    name: str
    number: int
    digest: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    source: str


def open_registry(name: str = NAME) -> "ModelRegistry":
    """Return the registry at MLFLOW_TRACKING_URI, else in mlflow.db of the current folder.

    Raises:
      UserError: it can't be reached.
    """
    client = open_client()
    client.search_registered_models(max_results=1)
    return ModelRegistry(name, client)


class ModelRegistry:
    """The versions of one registered model."""

    def __init__(self, name: str, client: Any):
        self.name, self._client = name, client

    def register(self, model: Path, export: Path | None, evaluation: Path | None) -> RegisteredVersion:
        """Upload folders as a new version; for a registered digest, return the existing version.

        Args:
          model: a sealed model folder.
          export: a sealed folder exported from it.
          evaluation: the output of `scripts/evaluate.py` for it.

        Raises:
          UserError: a folder isn't sealed, was changed, or belongs to another model.
        """
        digest = bundle.verify(model)
        if digest is None:
            raise UserError(f"--model={model}: not sealed; register what a run left in model/")
        tags = {"digest": digest} | _run_tags(model)
        if export is not None:
            tags |= {"export_digest": _verify_export(export, digest)}
        if evaluation is not None:
            metrics = read_metrics(evaluation, digest)
            tags |= {key: f"{metrics[key]:.4f}" for key in ("top1", "map", "macro_f1", "ece") if key in metrics}
        if (there := self._find_same(tags)) is not None:
            return there
        folders = {"model": model, "export": export, "evaluation": evaluation}
        given = {name: folder for name, folder in folders.items() if folder is not None}
        return self._create(digest, given, model.parent / RETENTION, tags)

    def _find_same(self, tags: Mapping[str, str]) -> RegisteredVersion | None:
        """Return the version of the same model and export, if there is one."""
        same = ("digest", "export_digest")
        for version in self.versions():
            if all(version.tags.get(key) == tags.get(key) for key in same):
                return version
        return None

    def _create(
        self, digest: str, folders: Mapping[str, Path], retention: Path, tags: Mapping[str, str]
    ) -> RegisteredVersion:
        run_id = self._find_run(tags.get("run_id")) or self._make_run(digest, tags)
        place = f"versions/{digest[:12]}-{tags.get('export_digest', 'model')[:12]}"
        for name, folder in folders.items():
            self._client.log_artifacts(run_id, str(folder), f"{place}/{name}")
        if retention.is_file():
            self._client.log_artifact(run_id, str(retention), place)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
        with store_lock(self._client.tracking_uri):  # two processes that register the same model make one version
            try:
                self._client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            if (there := self._find_same(tags)) is not None:
                return there
            return self._read(self._client.create_model_version(self.name, source, run_id, tags=dict(tags)))

    def _find_run(self, run_id: str | None) -> str | None:
        """Return the training's own run, if this store has it."""
        if run_id is None or not re.fullmatch(r"[\w.-]+", run_id):
            return None
        found = self._client.search_runs([find_experiment(self._client)], f"tags.run_id = '{run_id}'", max_results=1)
        return found[0].info.run_id if found else None

    def _make_run(self, digest: str, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(
            find_experiment(self._client), run_name=f"register-{digest[:12]}", tags=dict(tags)
        )
        self._client.set_terminated(run.info.run_id)
        return run.info.run_id

    def versions(self) -> list[RegisteredVersion]:
        """Return all versions, the newest first."""
        found = self._client.search_model_versions(f"name = '{self.name}'")
        return sorted((self._read(item) for item in found), key=lambda version: -version.number)

    def _read(self, item: ModelVersion) -> RegisteredVersion:
        aliases = [alias for alias, version in self._aliases().items() if version == int(item.version)]
        return RegisteredVersion(
            self.name,
            int(item.version),
            item.tags.get("digest", ""),
            tuple(aliases),
            dict(item.tags),
            item.source or "",
        )

    def _aliases(self) -> dict[str, int]:
        try:
            aliases: dict[str, Any] = self._client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: int(version) for alias, version in aliases.items()}

    def find(self, reference: str) -> RegisteredVersion:
        """Return a version by alias or number.

        Raises:
          UserError: there is none; lists the existing ones.
        """
        aliases = self._aliases()
        number = int(reference) if reference.isdecimal() else aliases.get(reference)
        for version in self.versions():
            if version.number == number:
                return version
        if not self.versions():
            raise UserError(f"the registry holds no model {self.name!r}; register one first")
        there = [*aliases, *(str(version.number) for version in self.versions())]
        raise UserError(f"{self.name!r} has no alias or version {reference!r}; {nearest(reference, there)}")

    def promote(self, reference: str, alias: str, gates: Gates) -> list[Check]:
        """Point an alias to a version that passes the gates.

        If another process moves the alias at the same time, the version is checked again, against the new holder.

        Returns:
          The checks. If one failed, nothing was changed.

        Raises:
          UserError: no such version, or its files were changed.
        """
        version = self.find(reference)
        while True:
            before = self._aliases().get(alias)
            if before == version.number:
                raise UserError(f"version {version.number} of {self.name!r} is the {alias} already")
            checks = self._check(version, before, gates)
            if not all(check.passed for check in checks):
                return checks
            with store_lock(self._client.tracking_uri):
                if self._aliases().get(alias) == before:
                    self._point(alias, version, before)
                    return checks

    def _check(self, version: RegisteredVersion, champion: int | None, gates: Gates) -> list[Check]:
        """Check a version with the gates, against the version number `champion` if there is one."""
        with tempfile.TemporaryDirectory() as scratch:
            candidate, holder = self._download(version, Path(scratch) / "candidate"), None
            if champion is not None:
                holder = self._download(self.find(str(champion)), Path(scratch) / "champion")
            return check_gates(gates, candidate, holder)

    def compare_with(self, model: Path, evaluation: Path, alias: str, gates: Gates) -> list[Check]:
        """Check an unregistered model against the version of an alias, with the gates that need no export.

        Raises:
          UserError: the files of the alias's version were changed.
        """
        number = self._aliases().get(alias)
        digest = bundle.verify(model)
        with tempfile.TemporaryDirectory() as scratch:
            champion = None
            if number is not None and self.find(alias).digest != digest:
                champion = self._download(self.find(alias), Path(scratch) / "champion") / "evaluation"
            return check_evaluation(gates, evaluation, champion, model.parent / RETENTION)

    def point(self, alias: str, version: RegisteredVersion) -> None:
        """Point an alias to a version without gates, such as the challenger's."""
        self._client.set_registered_model_alias(self.name, alias, str(version.number))

    def _point(self, alias: str, version: RegisteredVersion, before: int | None) -> None:
        if before is not None:
            self._client.set_model_version_tag(self.name, str(version.number), f"{REPLACED}.{alias}", str(before))
        self.point(alias, version)

    def rollback(self, alias: str) -> RegisteredVersion:
        """Point an alias back to its previous version, which passed the gates when it was promoted.

        Raises:
          UserError: the alias points to nothing, or has no previous version.
        """
        version = self.find(alias)
        before = version.tags.get(f"{REPLACED}.{alias}")
        if before is None:
            raise UserError(f"version {version.number} of {self.name!r} is the first {alias}; there is no way back")
        self._client.set_registered_model_alias(self.name, alias, before)
        return self.find(before)

    def pull(self, reference: str, part: str, output: Path) -> RegisteredVersion:
        """Write a version's model/, export/ or evaluation/ folder to `output`, replacing an old one when it is
        complete.

        Raises:
          UserError: no such version or part, or its files aren't those that were registered.
        """
        version = self.find(reference)
        with replacing(output) as target, tempfile.TemporaryDirectory() as scratch:
            folder = self._download(version, Path(scratch) / "version") / part
            if not folder.is_dir():
                raise UserError(f"version {version.number} of {self.name!r} was registered without its {part}")
            shutil.copytree(folder, target, dirs_exist_ok=True)
        return version

    def _download(self, version: RegisteredVersion, target: Path) -> Path:
        """Download a version's folders and verify them."""
        try:
            target.mkdir(parents=True)
            folder = Path(download_artifacts(artifact_uri=version.source, dst_path=str(target)))
        except Exception as error:
            raise UserError(
                f"version {version.number} of {self.name!r} can't be fetched: {remote.one_line(error)}"
            ) from error
        for name, tag in (("model", "digest"), ("export", "export_digest")):
            if tag not in version.tags:
                continue
            try:
                digest = bundle.verify(folder / name) if (folder / name).is_dir() else None
            except UserError as error:
                raise UserError(f"version {version.number} of {self.name!r} was tampered with: {error}") from error
            if digest != version.tags[tag]:
                raise UserError(
                    f"version {version.number} of {self.name!r} was tampered with: its {name} has the digest "
                    f"{str(digest)[:12]}, registered was {version.tags[tag][:12]}; register the model again"
                )
        return folder


def _run_tags(model: Path) -> dict[str, str]:
    """Return the tags on a model's origin, from its run.json."""
    if not (model / "run.json").is_file():
        return {}
    record = read_object(model / "run.json")
    keys = ("run_id", "git_sha", "git_dirty", "config_hash", "lock_hash")
    return {key: str(record[key]) for key in keys if record.get(key) is not None}


def _verify_export(export: Path, digest: str) -> str:
    own = bundle.verify(export)
    if own is None:
        raise UserError(f"--export={export}: not sealed; register what `python -m export` wrote")
    source = read_object(export / bundle.MANIFEST).get("source")
    if source != digest:
        raise UserError(f"--export={export}: made from the model {str(source)[:12]}, --model is {digest[:12]}")
    return own
