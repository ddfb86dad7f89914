"""Statistics of a data set: sizes, brightness, drift between two sets, contact sheets, suspicious labels."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

CELL_PX = 96
SHEET_COLUMNS = 12
MEASURES = ("width", "height", "aspect", "brightness", "contrast", "bytes")


class Facts(NamedTuple):
    """Measurements of an image."""

    width: int
    height: int
    brightness: float  # mean grey level, 0 to 1
    contrast: float  # its standard deviation


def measure(image: UInt8[np.ndarray, "h w 3"]) -> Facts:
    grey = np.asarray(Image.fromarray(image).convert("L").reduce(max(1, min(image.shape[:2]) // 64)), np.float32) / 255
    return Facts(image.shape[1], image.shape[0], float(grey.mean()), float(grey.std()))


class Drift(NamedTuple):
    """The distance between the distributions of a measurement in two sets."""

    measure: str
    median: float
    reference_median: float
    distance: float  # Kolmogorov-Smirnov, 0 to 1; for class shares total variation, without medians
    p_value: float | None  # of the hypothesis that both are equal; None: not tested


def find_drift(
    columns: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    labels: Sequence[str],
    reference_labels: Sequence[str],
) -> list[Drift]:
    """Return the distance of each of MEASURES, and of the class shares, between two non-empty sets.

    Args:
      columns, reference: [n] and [m] values of each measure, in the measure's own unit.
      labels, reference_labels: n and m of them.
    """
    from scipy.stats import ks_2samp

    found = [
        Drift(
            name,
            float(np.median(columns[name])),
            float(np.median(reference[name])),
            *(float(value) for value in ks_2samp(columns[name], reference[name], method="asymp")[:2]),
        )
        for name in MEASURES
    ]
    classes = sorted({*labels, *reference_labels})
    shares = [
        np.array([list(names).count(label) for label in classes]) / len(names) for names in (labels, reference_labels)
    ]
    variation = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return [*found, Drift("class shares", float("nan"), float("nan"), variation, None)]


def contact_sheet(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> bytes:
    """Return a JPEG of the images side by side, each whole in a square cell."""
    columns = min(len(images), SHEET_COLUMNS)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * CELL_PX, rows * CELL_PX), (128, 128, 128))
    for i, array in enumerate(images):
        image = Image.fromarray(array)
        image.thumbnail((CELL_PX - 2, CELL_PX - 2))
        x, y = i % columns * CELL_PX, i // columns * CELL_PX
        sheet.paste(image, (x + (CELL_PX - image.width) // 2, y + (CELL_PX - image.height) // 2))
    sheet.save(buffer := io.BytesIO(), "JPEG", quality=80)
    return buffer.getvalue()


class Suspect(NamedTuple):
    """An example whose neighbours have another label."""

    position: int
    suggested: int  # the label of most neighbours
    share: float  # share of the neighbours with it, equally weighted


def find_suspects(
    features: Float32[np.ndarray, "n d"],
    label_ids: Int32[np.ndarray, " n"],
    groups: Int32[np.ndarray, " n"],
    neighbours: int = 10,
    min_share: float = 0.8,
) -> list[Suspect]:
    """Return examples most of whose nearest neighbours in other groups share another label; the clearest first.

    Args:
      features: L2-normalised, so that their products are cosine similarities.
    """
    suspects = []
    count = min(neighbours, len(features) - 1)
    for start in range(0, len(features), 1024):
        rows = slice(start, start + 1024)
        similar = features[rows] @ features.T
        similar[groups[rows, None] == groups[None]] = -np.inf
        nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        for offset, positions in enumerate(nearest):
            votes = np.bincount(label_ids[positions], minlength=label_ids.max() + 1)
            best = int(votes.argmax())
            if best != label_ids[start + offset] and votes[best] >= min_share * count:
                suspects.append(Suspect(start + offset, best, float(votes[best] / count)))
    return sorted(suspects, key=lambda suspect: (-suspect.share, suspect.position))
