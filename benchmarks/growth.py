"""The growth of start-up and searches with the data: time and memory at several sizes, and the exponent.

  python -m benchmarks.growth
  python -m benchmarks.growth --parts=manifest,duplicates --largest=1000000
  python -m benchmarks.growth --parts=evaluation,report,classes,texts,cached_texts

Each part runs at each size in a separate process, whose peak memory is reported. The exponent is the slope of processor
time on logarithmic axes between the two largest sizes; 1 is linear growth. Prints a table and, last, one JSON line.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import growth_evaluation

SMALLEST = 10_000
NUM_FILES = 1000  # files shared by the rows of a manifest: the listing grows, not the disk use
NUM_CLASSES = 100


def manifest(count: int) -> Callable[[], object]:
    """Open a training source of `count` manifest rows, checking each file, and read the first example."""
    import pyarrow as pa

    from clip_har_jax.data.manifest import SCHEMA, Manifest, write_split_manifest
    from clip_har_jax.data.sources import make_source
    from clip_har_jax.files import sha256

    root = Path(tempfile.mkdtemp())
    data = [f"image {i:04d}".encode() for i in range(NUM_FILES)]
    for i, contents in enumerate(data):
        (root / f"{i:04d}.jpg").write_bytes(contents)
    digests, which = [sha256(contents) for contents in data], np.arange(count) % NUM_FILES
    columns = {
        "path": [f"{i:04d}.jpg" for i in which],
        "sha256": [digests[i] for i in which],
        "label": [f"class {i % NUM_CLASSES}" for i in which],
        "group": np.arange(count, dtype=np.int32),
        "split": ["train"] * count,
        "bytes": np.full(count, len(data[0])),
    } | {name: np.ones(count) for name in ("weight", "width", "height", "brightness", "contrast")}
    path = root / "manifest.parquet"
    write_split_manifest(
        Manifest(pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA), root, {}), path
    )

    def run() -> object:
        source = make_source(f"manifest:{path}", "train")
        assert len(source) == count
        return source[0]

    return run


def duplicates(count: int) -> Callable[[], object]:
    """Find the candidates among stored hashes of `count` images, one hundredth of which are copies."""
    from clip_har_jax.data.duplicates import COARSE_PX, find_candidates

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    coarse = rng.normal(size=(count, COARSE_PX**2)).astype(np.float32)
    coarse /= np.linalg.norm(coarse, axis=1, keepdims=True)
    copies = count // 100
    hashes[-copies:], coarse[-copies:] = hashes[:copies] ^ np.uint64(0b10110), coarse[:copies]

    def run() -> object:
        found = sum(len(first) for first, *_ in find_candidates(hashes, coarse))
        assert found >= copies, f"{found} of {copies} copies were found"
        return found

    return run


PARTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "manifest": manifest,
    "duplicates": duplicates,
    "evaluation": growth_evaluation.evaluation,
    "report": growth_evaluation.report,
    "classes": growth_evaluation.classes,
    "texts": growth_evaluation.texts,
    "cached_texts": growth_evaluation.cached_texts,
}
# The largest sizes of parts that are used with fewer than a million.
LARGEST = {"report": 100_000, "classes": 10_000, "texts": 10_000, "cached_texts": 10_000}


def measure(part: str, count: int) -> dict[str, float]:
    """Run a part in this process; return its times in seconds and the process's peak memory in GB."""
    run = PARTS[part](count)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in kB
    return {"count": count, "seconds": wall, "processor_s": processor, "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, e.g. --parts=manifest")
    parser.add_argument("--largest", type=int, default=1_000_000, help="the largest size, e.g. --largest=100000")
    parser.add_argument("--one", nargs=2, metavar=("PART", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    steps = max(1, round(math.log10(arguments.largest / SMALLEST)))
    results: dict[str, dict[str, object]] = {}
    print(f"{'part':<12}{'size':>10}{'seconds':>10}{'processor':>11}{'peak GB':>9}")
    for part in arguments.parts.split(","):
        rows, largest = [], min(arguments.largest, LARGEST.get(part, arguments.largest))
        for size in [largest // 10**step for step in reversed(range(steps + 1))]:
            command = [sys.executable, "-m", "benchmarks.growth", "--one", part, str(size)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            row = rows[-1]
            print(
                f"{part:<12}{size:>10}{row['seconds']:>10.2f}{row['processor_s']:>11.2f}{row['peak_gb']:>9.2f}",
                flush=True,
            )
        grown = rows[-1]["processor_s"] / rows[-2]["processor_s"]
        exponent = math.log(grown) / math.log(rows[-1]["count"] / rows[-2]["count"])
        print(f"{part:<12}exponent {exponent:.2f}")
        results[part] = {"exponent": round(exponent, 3), "sizes": rows}
    ratio = max(float(str(result["exponent"])) for result in results.values())
    print(json.dumps({"benchmark": "growth", "ratio": ratio, "parts": results}))


if __name__ == "__main__":
    main()
