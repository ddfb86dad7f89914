"""Data preparation: labelled images or clips -> a leak-free split manifest, and a report on the data."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import bundle, cli
from clip_har_jax.config import DataConfig
from clip_har_jax.data.cache import write_cache
from clip_har_jax.data.findings import list_duplicates, list_undecided
from clip_har_jax.data.manifest import Manifest, make_manifest, read_manifest, write_split_manifest
from clip_har_jax.data.multi_label import make_multi_label_source
from clip_har_jax.data.quality import find_suspects
from clip_har_jax.data.scan import (
    Pooled,
    Scanned,
    find_duplicates,
    find_groups,
    part_conflicts,
    place_files,
    recording_of,
    scan,
)
from clip_har_jax.data.sources import make_source
from clip_har_jax.data.splits import Shares, assign_multi_label_splits, assign_splits
from clip_har_jax.data.workers import MIN_FOR_WORKERS, map_in_workers
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.data_report import make_data_report, read_picture
from clip_har_jax.files import write_json, write_text
from clip_har_jax.folders import output_folder

MIN_CLIPS_FOR_WORKERS = 30  # with fewer clips, starting workers takes longer than reading them


@dataclass(frozen=True)
class Prepared:
    """The results of `prepare_data`."""

    manifest: Manifest
    bad: list[tuple[str, str]]  # name, reason
    # groups of several copies, and pairs to decide; members with label, split and given set
    duplicates: list[dict[str, Any]]
    suspects: list[dict[str, Any]]
    listing: dict[str, Any]  # SPEC -> kept and left out files

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of prepare.json."""
        splits = self.manifest.column("split")
        joined = [entry for entry in self.duplicates if entry["joined"]]
        return {
            "manifest_sha256": self.manifest.digest,
            "num_examples": len(splits),
            "num_unreadable": len(self.bad),
            "splits": {name: splits.count(name) for name in ("train", "val", "test", "excluded")},
            "duplicate_groups": len(joined),
            "identical_groups": sum(entry["identical"] for entry in joined),
            "repeated_contents": sum(count > 1 for count in Counter(self.manifest.column("sha256")).values()),
            "conflicting_groups": sum(entry["conflict"] for entry in joined),
            "crossing_groups": sum(entry["crosses"] for entry in joined),
            "undecided_pairs": len(self.duplicates) - len(joined),
            "num_suspects": len(self.suspects),
            "listing": self.listing,
            **self.manifest.about,
        }


@dataclass(frozen=True)
class PrepareOptions:
    """The options of a data preparation.

    Attributes:
      test: the SPEC of a fixed test set; near duplicates of its images are excluded from the other splits.
      shares: of validation and test; with a fixed test set, no further test images are taken.
      seed: of the split.
      cache_px: shorter side of the cached images in cache_<px>px/, shards for training; None: no cache.
      model: a CLIP whose features find labels that may be wrong; empty: no search.
      reference: an earlier manifest to compare with.
      tfds_dir: folder for the splits as the TFDS data set har15; empty: none.
      max_bad_fraction: accepted share of unreadable files; above it nothing is written.
      num_workers: processes; None: one per core.
      multi_label: an image has any number of labels.
    """

    test: str = ""
    shares: Shares = field(default_factory=Shares)
    seed: int = 0
    cache_px: int | None = None
    model: str = ""
    reference: str = ""
    tfds_dir: str = ""
    max_bad_fraction: float = DataConfig.max_bad_fraction
    num_workers: int | None = None
    multi_label: bool = False


def prepare_data(data: Sequence[str], output: Path, options: PrepareOptions = PrepareOptions()) -> Prepared:
    """Find near duplicates, split by group and class, and write the manifest and its page.

    Args:
      data: SPECs of the data.
      output: receives manifest.parquet, duplicates.json, bad_inputs.jsonl, prepare.json and report.html; and images/,
        for data without files.
      options: see `PrepareOptions`.

    Raises:
      UserError: a mistake in the arguments or the data; more bad images than allowed.
    """
    shares = options.shares
    if not (0 <= shares.val < 1 and 0 <= shares.test < 1 and shares.val + shares.test < 1):
        raise UserError(f"--val_fraction={shares.val:g} --test_fraction={shares.test:g}: nothing is left for training")
    earlier = read_manifest(Path(options.reference)) if options.reference else None
    source = _open(data, options)
    specs = [*data, *([options.test] if options.test else [])]
    listing = dict(zip(specs, source.tallies, strict=True))
    for spec, tally in listing.items():
        cli.print_tally(spec, tally)
    if source.clips:
        _refuse_for_clips(options.cache_px, options.tfds_dir)
    with output_folder(output):
        kept, scanned, bad = _read(source, options.num_workers)
        noun = "clips" if source.clips else "images"
        _write_bad(output / "bad_inputs.jsonl", bad, len(source), options.max_bad_fraction, noun)
        ids = source.label_ids[kept]
        names = [source.labels[i] for i in ids]
        pairs, undecided = part_conflicts(find_duplicates(scanned, source.clips), ids)
        cut_from = [recording_of(source.path(i) or "", name) for i, name in zip(kept, names, strict=True)]
        copies, groups = find_groups(pairs, ids, cut_from if source.clips else [])
        splits = _split(source, kept, groups, Shares(shares.val, 0.0 if options.test else shares.test), options.seed)
        if options.test:
            splits = _keep_test(splits, groups, source.given[kept] == len(data))
        paths, root = place_files(source, kept, scanned, output)
        rows = _make_rows(paths, scanned, names, copies, groups, splits)
        manifest = make_manifest(rows, root, _about(data, options, source.clips))
        given = [[*data, options.test][i] for i in source.given[kept]]
        duplicates = list_duplicates(rows, copies, pairs, given) + list_undecided(rows, undecided, given)
        suspects = _find_suspects(options.model, rows, root, ids, groups, source.labels) if options.model else []
        told = {spec: tally.to_json() for spec, tally in listing.items()}
        prepared = Prepared(manifest, bad, duplicates, suspects, told)
        write_split_manifest(manifest, output / "manifest.parquet")
        if options.cache_px:
            write_cache(manifest, output / f"cache_{options.cache_px}px", options.cache_px, options.num_workers)
        if options.tfds_dir:
            from clip_har_jax.data.har15 import build_har15

            build_har15(manifest, options.tfds_dir)
        _write_findings(prepared, earlier, output)
        return prepared


def _read(source: Pooled, num_workers: int | None) -> tuple[list[int], list[Scanned], list[tuple[str, str]]]:
    """Read all examples; return the positions of the readable ones, their scans, and the bad ones."""
    worth = MIN_CLIPS_FOR_WORKERS if source.clips else MIN_FOR_WORKERS
    outcomes = list(map_in_workers(scan, source, len(source), num_workers, "reading", worth))
    kept = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Scanned)]
    scanned = [outcome for outcome in outcomes if isinstance(outcome, Scanned)]
    return kept, scanned, [outcome for outcome in outcomes if not isinstance(outcome, Scanned)]


def _about(data: Sequence[str], options: PrepareOptions, clips: bool) -> dict[str, Any]:
    """Return how a manifest was made, for its `about`."""
    shares = {"val_fraction": options.shares.val, "test_fraction": options.shares.test}
    return {
        "data": list(data),
        "test": options.test,
        "seed": options.seed,
        **shares,
        **({"clips": True} if clips else {}),
        **({"multi_label": True} if options.multi_label else {}),
    }


def _open(data: Sequence[str], options: PrepareOptions) -> Pooled:
    """Return all examples, those of the test set last."""
    make = make_multi_label_source if options.multi_label else make_source
    for flag, given in (("--model", options.model), ("--tfds_dir", options.tfds_dir)):
        if options.multi_label and given:
            raise UserError(f"{flag}={given}: is for images with one label each; leave it out with --multi_label")
    test = [make(options.test, "test")] if options.test else []
    return Pooled([*(make(spec, "train") for spec in data), *test])


def _split(source: Pooled, kept: Sequence[int], groups: np.ndarray, shares: Shares, seed: int) -> list[str]:
    """Return the split of each readable example."""
    if source.targets is None:
        return assign_splits(source.label_ids[kept], groups, shares, seed)
    return assign_multi_label_splits(source.targets[kept], groups, shares, seed)


def _refuse_for_clips(cache_px: int | None, tfds_dir: str) -> None:
    for flag, given in (("--cache_px", cache_px), ("--tfds_dir", tfds_dir)):
        if given:
            raise UserError(f"{flag}={given}: is for images, and the data is clips; leave it out")


def _make_rows(
    paths: Sequence[str],
    scanned: Sequence[Scanned],
    labels: Sequence[str],
    copies: np.ndarray,
    groups: np.ndarray,
    splits: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the manifest's rows; the weight of an example is lower the more copies it has."""
    weights = 1 / np.bincount(copies)[copies]
    return [
        {"path": path, "sha256": one.sha256, "label": label, "group": int(number), "split": split}
        | {"weight": float(weight), "bytes": one.bytes, **one.facts._asdict()}
        for path, one, label, weight, number, split in zip(paths, scanned, labels, weights, groups, splits, strict=True)
    ]


def _write_findings(prepared: Prepared, reference: Manifest | None, output: Path) -> None:
    """Write duplicates.json, report.html and, last, prepare.json."""
    write_json(output / "duplicates.json", prepared.duplicates)
    page = make_data_report(
        prepared.manifest, prepared.summary, prepared.duplicates, prepared.suspects, prepared.bad, reference
    )
    write_text(output / "report.html", page)
    write_json(output / "prepare.json", prepared.summary)


def _write_bad(path: Path, bad: Sequence[tuple[str, str]], count: int, max_fraction: float, noun: str) -> None:
    lines = [json.dumps({"input": name, "error": reason}) + "\n" for name, reason in bad]
    path.write_text("".join(lines), encoding="utf-8")
    if len(bad) > max_fraction * count:
        raise UserError(
            f"{len(bad)} of {count} {noun} can't be read, the first is {bad[0][0]}: {bad[0][1]}, all in {path}; mend "
            "or remove them, or raise --max_bad_fraction"
        )
    if len(bad) == count:
        raise UserError(f"none of the {count} {noun} can be read; the first is {bad[0][0]}: {bad[0][1]}")


def _keep_test(splits: list[str], groups: np.ndarray, in_test: np.ndarray) -> list[str]:
    """Return the splits with the given test set as test; examples that share a group with it are excluded."""
    near = np.isin(groups, groups[in_test])
    return [
        "test" if test else "excluded" if touched else split
        for split, test, touched in zip(splits, in_test, near, strict=True)
    ]


def _find_suspects(
    model: str,
    rows: Sequence[Mapping[str, Any]],
    root: Path,
    ids: np.ndarray,
    groups: np.ndarray,
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the images whose label contradicts that of most neighbours in a model's feature space."""
    from clip_har_jax.inference.predictor import Predictor

    predictor = Predictor(model, None if bundle.has_actions(model) else labels)  # only its features are used
    size = predictor.batch_size
    features = [
        predictor.embed([read_picture(root / row["path"]) for row in rows[start : start + size]])
        for start in range(0, len(rows), size)
    ]
    return [
        {
            "path": rows[suspect.position]["path"],
            "label": rows[suspect.position]["label"],
            "suggested": labels[suspect.suggested],
            "share": suspect.share,
        }
        for suspect in find_suspects(np.concatenate(features), ids, groups)
    ]


def print_prepared(prepared: Prepared, output: Path) -> None:
    """Print the findings and the paths of the files."""
    summary = prepared.summary
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items() if count)
    rows = [("clips" if prepared.manifest.clips else "images", f"{summary['num_examples']} ({splits})")]
    if prepared.bad:
        rows.append(("unreadable", f"{len(prepared.bad)}, listed in {output / 'bad_inputs.jsonl'}"))
    found = (
        f"{summary['duplicate_groups']} groups ({summary['identical_groups']} of identical files alone, "
        f"{summary['conflicting_groups']} with different labels, {summary['crossing_groups']} across the given sets); "
        f"{summary['repeated_contents']} contents are in more than one file"
    )
    if summary["undecided_pairs"]:
        rows.append(
            ("to decide", f"{summary['undecided_pairs']} pairs look alike under different labels, and are kept")
        )
    rows += [
        ("duplicates", f"{found}, listed in {output / 'duplicates.json'}"),
        ("manifest", f"{output / 'manifest.parquet'}, SHA-256 {summary['manifest_sha256'][:12]}"),
        ("report", str(output / "report.html")),
    ]
    cli.print_rows(rows)
