"""`tfds:har15`: a local copy of the Human Action Recognition set as a TFDS data set, without TensorFlow.

`prepare_data.py --tfds_dir=DIR` builds it from a manifest, with the manifest's splits.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from clip_har_jax.data.manifest import Manifest
from clip_har_jax.data.synthetic import LABELS  # the same 15 actions
from clip_har_jax.errors import UserError
from clip_har_jax.folders import output_folder

NAME = "har15"


class Har15(tfds.core.GeneratorBasedBuilder):
    """15 human actions in photographs, split without leaks.

    Args:
      manifest: the data to build; None: read a data set that was built before.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "built from a split manifest"}  # noqa: RUF012  TFDS reads it so
    pkg_dir_path = Path(__file__).parent  # TFDS looks there for a citation, with a library that it doesn't declare

    def __init__(self, *, manifest: Manifest | None = None, **options: Any):
        self._manifest = manifest
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=LABELS),
                "file": tfds.features.Text(),
                "sha256": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        if self._manifest is None:
            raise UserError(f"tfds:{NAME}: build it from your copy by prepare_data.py --tfds_dir=DIR")
        splits = sorted(set(self._manifest.column("split")) - {"excluded"})
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        assert self._manifest is not None
        columns = [self._manifest.column(name) for name in ("path", "label", "sha256", "split")]
        for path, label, sha256, of in zip(*columns, strict=True):
            if of == split:
                data = (self._manifest.root / path).read_bytes()
                yield path, {"image": data, "label": label, "file": path, "sha256": sha256}


def build_har15(manifest: Manifest, data_dir: str | os.PathLike[str]) -> Path:
    """Write ArrayRecord files below `data_dir`; return their folder.

    Raises:
      UserError: labels that aren't HAR-15's, or the data set exists already.
    """
    if unknown := sorted(set(manifest.column("label")) - set(LABELS)):
        raise UserError(f"--tfds_dir: label {unknown[0]!r} is none of HAR-15's {len(LABELS)} actions")
    builder = Har15(manifest=manifest, data_dir=os.fspath(data_dir), file_format="array_record")
    folder = Path(builder.data_path)
    if folder.exists():
        raise UserError(f"--tfds_dir={data_dir}: {folder} is there already; remove it, or name another folder")
    tfds.display_progress_bar(False)
    with output_folder(folder.parent, "--tfds_dir"):
        for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):  # of a killed writer, with TFDS's name
            shutil.rmtree(leftover)
        builder.download_and_prepare()
    return folder
