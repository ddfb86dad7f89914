"""Image-text pairs read per second from tar shards, beside the `webdataset` package on the same shards.

    python -m benchmarks.pair_shards [--data=webdataset:train-{0000..0007}.tar] [--rounds=5]

Both sides read every pair once without decoding its image ("read"), and as many pairs through a shuffle buffer of 1,000
("shuffled"): ours with streams that can be continued exactly, webdataset's with `shardshuffle` and `shuffle`, which
can't. The sides alternate, in one process and thread. The figures are pairs per second of processor time, so a busy
machine changes little; "ratio" is the smaller of the two ratios of medians. Without --data, 8 shards of 1,000 random
"images" of 8 to 40 KB are written to a temporary folder, and read from the page cache.
"""

import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import cli
from clip_har_jax.data.pair_sources import PairSources, make_pair_sources
from clip_har_jax.data.pair_streams import PairStream, StreamPlan
from clip_har_jax.data.pairs import Found, Pair
from clip_har_jax.errors import UserError
from clip_har_jax.specs import parse_spec

SHARDS, PAIRS, BYTES = 8, 1000, (8_000, 40_000)
BUFFER = 1000  # pairs


def write_shards(folder: Path) -> str:
    """Write the shards that are read without --data; return their SPEC."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i in range(PAIRS):
                image = rng.bytes(int(rng.integers(*BYTES)))
                for suffix, content in (("jpg", image), ("txt", f"picture {i} of shard {shard}".encode())):
                    info = tarfile.TarInfo(f"{shard:03d}{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{folder}/{{000..{SHARDS - 1:03d}}}.tar"


def our_sides(sources: PairSources, count: int) -> dict[str, Callable[[], int]]:
    """Return functions that read all pairs and return their bytes."""

    def shuffled() -> Iterator[Found]:
        stream = PairStream(StreamPlan(sources, 0, 1, BUFFER), 0)
        for _ in range(count):
            yield next(stream).found

    def size(found: Iterable[Found]) -> int:
        return sum(len(pair.image) + len(pair.caption.encode()) for pair in found if isinstance(pair, Pair))

    return {"read": lambda: size(sources.each_once()), "shuffled": lambda: size(shuffled())}


def their_sides(pattern: str, count: int) -> dict[str, Callable[[], int]]:
    """Return the same for webdataset."""
    import webdataset as wds

    def size(pipeline: Any) -> int:
        names = "jpg;png;webp;jpeg", "txt"
        return sum(len(image) + len(text) for image, text in islice(pipeline.to_tuple(*names), count))

    return {
        "read": lambda: size(wds.WebDataset(pattern, shardshuffle=False)),
        "shuffled": lambda: size(wds.WebDataset(pattern, shardshuffle=100).shuffle(BUFFER)),
    }


def measure(
    sides: dict[str, dict[str, Callable[[], int]]], count: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return the pairs per second of processor time of each side and task, by round."""
    found: dict[str, dict[str, list[float]]] = {task: {side: [] for side in sides} for task in ("read", "shuffled")}
    for round_number in range(rounds + 1):
        for task, by_side in found.items():
            sizes = {}
            for side, functions in sides.items():
                begin = time.process_time()
                sizes[side] = functions[task]()
                if round_number:  # the first one fills the page cache
                    by_side[side].append(count / (time.process_time() - begin))
            if task == "read" and len(set(sizes.values())) > 1:
                raise UserError(f"the sides read different bytes: {sizes}")
    return found


def main() -> None:
    parser = cli.make_parser(__doc__)
    cli.add_data(parser, "tar shards with .jpg, .png or .webp and .txt, e.g. --data=webdataset:train-{000..007}.tar")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each side, e.g. --rounds=5")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = arguments.data or write_shards(Path(folder))
        sources = make_pair_sources(spec)
        count = sum(isinstance(pair, Pair) for pair in sources.each_once())
        sides = {"ours": our_sides(sources, count), "webdataset": their_sides(parse_spec(spec).path, count)}
        found = measure(sides, count, arguments.rounds)
    medians = {task: {side: statistics.median(by[side]) for side in by} for task, by in found.items()}
    print(f"{count} pairs in {sources.num_shards} shards; pairs per second of processor time, median (least to most)")
    for task, by_side in found.items():
        for side, values in by_side.items():
            print(f"{task:10}{side:12}{medians[task][side]:8.0f}  ({min(values):.0f} to {max(values):.0f})")
    ratios = {task: by["ours"] / by["webdataset"] for task, by in medians.items()}
    result = {"benchmark": "pair_shards", "ratio": min(ratios.values()), "ratios": ratios, "pairs_per_cpu_s": medians}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
