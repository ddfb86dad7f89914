"""What the trackers cost a training step: the demo with and without TensorBoard, MLflow and W&B, in turns.

  python -m benchmarks.trackers --rounds=3 --steps=200

A step's time is the median over the intervals between logs, the first `--skip` left out: in them a run compiles, and
the trackers' libraries are imported beside it. The bound is 1%.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from clip_har_jax import cli

TRACKERS = ("tensorboard", "mlflow", "wandb")
LOG_EVERY = 10


class Clock:
    """A sink that remembers when each training record came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def write(self, step: int, metrics: object) -> None:
        self.times.append(time.perf_counter())

    def close(self) -> None:
        """Nothing waits."""


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, e.g. --rounds=3 (default)")
    parser.add_argument("--steps", type=int, default=200, help="of a round, e.g. --steps=200 (default)")
    parser.add_argument("--skip", type=int, default=8, help="logs at the start that don't count, e.g. --skip=8")
    arguments = parser.parse_args()

    from clip_har_jax.config import load_config
    from clip_har_jax.pipelines.train import train

    steps: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db", "WANDB_MODE": "offline"}
        os.environ["WANDB_DATA_DIR"] = scratch
        os.chdir(scratch)
        config = Path(__file__).parents[1] / "configs" / "demo.py"
        for i in range(arguments.rounds):
            for kind in steps:
                chosen = ",".join(TRACKERS) if kind == "with" else ""
                settings = load_config(
                    config,
                    [
                        f"--config.trackers={chosen}",
                        f"--config.train.num_steps={arguments.steps}",
                        f"--config.train.log_every_steps={LOG_EVERY}",
                        f"--config.eval.every_steps={arguments.steps}",
                        f"--config.checkpoint.every_steps={arguments.steps}",
                    ],
                )
                clock = Clock()
                train(settings, Path(scratch) / f"{kind}{i}", sinks=[clock], quiet=True)
                marks = clock.times[arguments.skip : arguments.steps // LOG_EVERY]
                steps[kind] += [(b - a) / LOG_EVERY for a, b in pairwise(marks)]
                print(f"{kind:8s}{statistics.median(steps[kind]) * 1000:8.1f} ms a step", file=sys.stderr, flush=True)
        os.chdir("/")
    medians = {kind: statistics.median(values) for kind, values in steps.items()}
    ratio = medians["with"] / medians["without"]
    print(f"{'trackers':12s}{'step':>12s}{'intervals':>12s}")
    for kind, seconds in medians.items():
        print(f"{kind:12s}{seconds * 1000:9.1f} ms{len(steps[kind]):12d}")
    result = {"benchmark": "trackers", "ratio": round(ratio, 4), "seconds_a_step": medians, "cores": os.cpu_count()}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
