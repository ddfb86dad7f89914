"""mAP at temporal IoU compared with ActivityNet's evaluation in mmaction2.

    pip download --no-deps --dest=/tmp mmaction2==1.2.0
    python -m benchmarks.temporal_map --mmaction2=/tmp/mmaction2-1.2.0-py2.py3-none-any.whl

Both evaluate the same generated predictions; the largest difference is printed, with the processor time of each. Only
two files of the wheel are used, which need only numpy.
"""

import sys
import time
import types
import zipfile

import numpy as np

from clip_har_jax import cli
from clip_har_jax.video.segments import IOU_THRESHOLDS, Segment, mean_average_precision

FOLDER = "mmaction/evaluation/functional"


def load_peer(wheel: str) -> types.ModuleType:
    """Return mmaction2's module `eval_detection`, without the rest of its packages."""
    logging = types.ModuleType("mmengine.logging")
    logging.MMLogger = logging.print_log = None  # type: ignore[attr-defined]
    sys.modules |= {"mmengine": types.ModuleType("mmengine"), "mmengine.logging": logging}
    package = types.ModuleType("peer")
    package.__path__ = []
    sys.modules["peer"] = package
    with zipfile.ZipFile(wheel) as archive:
        for name in ("accuracy", "eval_detection"):
            module = types.ModuleType(f"peer.{name}")
            module.__package__ = "peer"
            sys.modules[module.__name__] = module
            exec(compile(archive.read(f"{FOLDER}/{name}.py"), name, "exec"), module.__dict__)
    return sys.modules["peer.eval_detection"]


def draw_case(seed: int) -> tuple[dict[str, list[Segment]], dict[str, list[Segment]]]:
    """Return generated predictions and annotations of up to 30 videos and 6 classes."""
    rng = np.random.default_rng(seed)
    labels = [f"class {i}" for i in range(6)]
    true: dict[str, list[Segment]] = {}
    found: dict[str, list[Segment]] = {}
    for v in range(int(rng.integers(1, 31))):
        starts = rng.uniform(0, 60, rng.integers(1, 9))
        ones = [Segment(float(s), float(s + rng.uniform(0.5, 12)), str(rng.choice(labels))) for s in starts]
        moved = [(s.start_s + rng.normal(), s.end_s + rng.normal(), s.label) for s in ones * 3]
        true[f"v{v}"] = ones
        found[f"v{v}"] = [Segment(float(a), float(b), label, rng.random()) for a, b, label in moved if b > a]
    return found, true


def peer_map(peer: types.ModuleType, found: dict[str, list[Segment]], true: dict[str, list[Segment]]) -> np.ndarray:
    """Return the peer's mAP at each threshold."""

    def rows(segments: dict[str, list[Segment]], label: str) -> list[dict[str, object]]:
        return [
            {"video-id": video, "t-start": s.start_s, "t-end": s.end_s, "score": s.score}
            for video, ones in segments.items()
            for s in ones
            if s.label == label
        ]

    labels = sorted({s.label for ones in true.values() for s in ones})
    compute = peer.compute_average_precision_detection
    return np.mean([compute(rows(true, label), rows(found, label), IOU_THRESHOLDS) for label in labels], axis=0)


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--mmaction2", required=True, metavar="WHEEL", help="mmaction2's wheel")
    parser.add_argument("--num_cases", type=int, default=200, help="drawn sets of annotations and predictions")
    arguments = parser.parse_args()
    peer = load_peer(arguments.mmaction2)
    largest, ours_s, peer_s = 0.0, 0.0, 0.0
    for seed in range(arguments.num_cases):
        found, true = draw_case(seed)
        start = time.process_time()
        ours = np.asarray(list(mean_average_precision(found, true).values()))
        middle = time.process_time()
        theirs = peer_map(peer, found, true)
        ours_s, peer_s = ours_s + middle - start, peer_s + time.process_time() - middle
        largest = max(largest, float(np.abs(ours - theirs).max()))
    print(f"{arguments.num_cases} cases, IoU {IOU_THRESHOLDS}: largest difference {largest:.1e}")
    print(f"processor time: ours {ours_s:.2f} s, mmaction2's {peer_s:.2f} s")


if __name__ == "__main__":
    cli.run(main)
