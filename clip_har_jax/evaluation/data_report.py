"""The page of a prepared data set: one HTML file without network access or scripts."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.data.manifest import Manifest
from clip_har_jax.data.quality import MEASURES, Drift, contact_sheet, find_drift
from clip_har_jax.evaluation.pages import templates
from clip_har_jax.image_files import BadImage, read_image
from clip_har_jax.listing import VIDEO_SUFFIXES
from clip_har_jax.video.clips import read_clip
from clip_har_jax.video.sampling import FrameSampling

SPLITS = ("train", "val", "test", "excluded")
PER_CLASS = 24  # images of a contact sheet
MAX_SHOWN = 30  # groups, suspects and bad files; the files list all of them
NO_LABEL = "(no label)"  # the row of images without a label
NOTABLE = 0.1  # distance above which a significant drift is marked


def make_data_report(
    manifest: Manifest,
    summary: Mapping[str, Any],
    duplicates: Sequence[Mapping[str, Any]],
    suspects: Sequence[Mapping[str, Any]],
    bad: Sequence[tuple[str, str]],
    reference: Manifest | None,
) -> str:
    """Return the page as HTML.

    Args:
      manifest: the data set.
      summary, duplicates, suspects, bad: the findings of the preparation.
      reference: a data set to compare with; None: only the splits are compared.
    """
    shown = sorted(duplicates, key=_urgency)
    page = templates().get_template("data.html")
    return page.render(
        summary=summary,
        noun="clips" if manifest.clips else "images",
        headlines=_headlines(summary, "clips" if manifest.clips else "images"),
        splits=[split for split in SPLITS if summary["splits"][split]],
        classes=_classes(manifest),
        num_classes=len({label for own in manifest.label_sets() for label in own}),
        measures=_measures(manifest),
        drifts=_drifts(manifest, reference),
        notable=NOTABLE,
        groups=[{**entry, "sheet": _group_sheet(manifest, entry)} for entry in shown[:MAX_SHOWN]],
        suspects=suspects[:MAX_SHOWN],
        bad=[(_text(name), reason) for name, reason in bad[:MAX_SHOWN]],
        sheets=_sheets(manifest),
        about={"manifest SHA-256": manifest.digest, "folder": manifest.root, **_about(manifest)},
    )


def _urgency(entry: Mapping[str, Any]) -> tuple[bool, bool, bool, int]:
    """Return a sort key: undecided pairs first, then groups across sets, conflicts, large groups."""
    return entry["joined"], not entry["crosses"], not entry["conflict"], -len(entry["members"])


def _about(manifest: Manifest) -> dict[str, str]:
    """Return how the manifest was made, in words, without missing settings."""
    texts = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in manifest.about.items()}
    return {key: text for key, text in texts.items() if text and key != "clips"}


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # names may not be UTF-8


def _headlines(summary: Mapping[str, Any], noun: str) -> list[tuple[str, int, str]]:
    splits = [(split, summary["splits"][split], noun) for split in SPLITS if summary["splits"][split]]
    return [
        *splits,
        ("duplicates", summary["duplicate_groups"], f"groups; {summary['repeated_contents']} contents repeat"),
        ("conflicts", summary["conflicting_groups"], "groups with different labels"),
    ]


def _classes(manifest: Manifest) -> list[dict[str, Any]]:
    sets, splits = manifest.label_sets(), manifest.column("split")
    labels = sorted({label for own in sets for label in own})
    counts: dict[str, dict[str, int]] = {label: dict.fromkeys(SPLITS, 0) for label in labels}
    for own, split in zip(sets, splits, strict=True):
        for label in own:
            counts[label][split] += 1
    if unlabelled := [split for own, split in zip(sets, splits, strict=True) if not own]:
        counts[NO_LABEL] = {split: unlabelled.count(split) for split in SPLITS}
    most = max(sum(row.values()) for row in counts.values())
    return [
        {"label": label, "total": sum(row.values()), "share": 100 * sum(row.values()) / most, **row}
        for label, row in counts.items()
    ]


def _columns(manifest: Manifest, split: str | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the measurements and labels of a split, or of all."""
    rows = np.array([split in (None, name) for name in manifest.column("split")], bool)
    columns = {name: np.array(manifest.column(name))[rows] for name in MEASURES if name != "aspect"}
    columns["aspect"] = columns["width"] / columns["height"]
    return columns, [label for own, chosen in zip(manifest.label_sets(), rows, strict=True) if chosen for label in own]


def _measures(manifest: Manifest) -> list[tuple[str, list[str]]]:
    columns, _ = _columns(manifest)
    return [(name, [_number(v) for v in np.percentile(columns[name], (0, 5, 50, 95, 100))]) for name in MEASURES]


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


def _drifts(manifest: Manifest, reference: Manifest | None) -> list[tuple[str, list[dict[str, Any]]]]:
    tables = []
    train, train_labels = _columns(manifest, "train")
    for split in ("val", "test"):
        columns, labels = _columns(manifest, split)
        if labels and train_labels:
            rows = find_drift(columns, train, labels, train_labels)
            tables.append((f"{split} against train", [_drift_row(row) for row in rows]))
    if reference is not None:
        (columns, labels), (old, old_labels) = _columns(manifest), _columns(reference)
        tables.append(
            ("Against the reference", [_drift_row(row) for row in find_drift(columns, old, labels, old_labels)])
        )
    return tables


def _drift_row(row: Drift) -> dict[str, Any]:
    return {
        "measure": row.measure,
        "median": _number(row.median),
        "reference": _number(row.reference_median),
        "distance": f"{row.distance:.3f}",
        "marked": row.distance >= NOTABLE and (row.p_value is None or row.p_value < 0.01),
    }


def _sheets(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the contact sheet of each class, of images evenly spaced over its files."""
    paths: dict[str, list[str]] = {}
    for path, own in zip(manifest.column("path"), manifest.label_sets(), strict=True):
        for label in own or (NO_LABEL,):
            paths.setdefault(label, []).append(path)
    chosen = {
        label: [of[round(k)] for k in np.linspace(0, len(of) - 1, min(PER_CLASS, len(of)))]
        for label, of in sorted(paths.items())
    }
    return [(label, _sheet([manifest.root / path for path in of])) for label, of in chosen.items()]


def _group_sheet(manifest: Manifest, entry: Mapping[str, Any]) -> str:
    return _sheet([manifest.root / member["path"] for member in entry["members"][:12]])


def read_picture(path: Path) -> np.ndarray:
    """Return the pixels of an image file, or of the middle frame of a clip: uint8 [h, w, 3].

    Raises:
      BadImage: it can't be read.
    """
    return read_clip(path, FrameSampling(1)).frames[0] if path.suffix.lower() in VIDEO_SUFFIXES else read_image(path)


def _sheet(paths: Sequence[Path]) -> str:
    images = []
    for path in paths:
        try:
            images.append(read_picture(path))
        except BadImage:  # it was readable before
            continue
    return "data:image/jpeg;base64," + base64.b64encode(contact_sheet(images)).decode() if images else ""
