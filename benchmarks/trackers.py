"""The cost of TensorBoard, MLflow and W&B together for a training step.

  python -m benchmarks.trackers --records=200

The three record real metrics at the demo's rate (one record every ten steps), in local files. Measured are the time
that the loop waits (the call that queues a record) and the processor time of the trackers' threads, which the loop may
lack. Both are compared with the time of the demo's steps, measured before. The bound is 1%.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from clip_har_jax import cli

TRACKERS = ("tensorboard", "mlflow", "wandb")
LOG_EVERY = 10


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--records", type=int, default=200, help="number of records, e.g. --records=200 (default)")
    parser.add_argument("--steps", type=int, default=80, help="training steps to time, e.g. --steps=80 (default)")
    arguments = parser.parse_args()

    from clip_har_jax.config import load_config
    from clip_har_jax.trainer.train import train

    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db", "WANDB_MODE": "offline"}
        os.environ["WANDB_DATA_DIR"] = scratch
        settings = load_config(
            Path(__file__).parents[1] / "configs" / "demo.py",
            [
                f"--config.train.num_steps={arguments.steps}",
                f"--config.train.log_every_steps={LOG_EVERY}",
                f"--config.eval.every_steps={arguments.steps}",
            ],
        )
        workdir = Path(scratch) / "run"
        if train(settings, workdir, quiet=True).exit_code:
            return  # stopped by a signal
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        records = [line for line in lines if "train/loss" in line]
        rates = [line["train/images_per_s"] for line in records[2:]]
        step_s = settings.train.global_batch_size / statistics.median(rates)
        waits, processor_s = measure(workdir, records[-1], arguments.records, step_s * LOG_EVERY)
    wait_s = statistics.median(waits)
    ratio = 1 + (wait_s + processor_s) / (step_s * LOG_EVERY)
    print(f"a step of the demo                        {step_s * 1e3:9.1f} ms")
    print(
        f"the loop waits for a record               {wait_s * 1e6:9.1f} us (median), {max(waits) * 1e6:.0f} us (most)"
    )
    print(f"the trackers' threads take for a record   {processor_s * 1e3:9.2f} ms of processor time")
    print(f"together, of ten steps                    {ratio - 1:9.2%}")
    result = {"benchmark": "trackers", "ratio": round(ratio, 5), "wait_s": wait_s, "processor_s": processor_s}
    print(json.dumps(result | {"step_s": step_s, "cores": os.cpu_count()}))


def measure(workdir: Path, record: dict[str, float], count: int, interval_s: float) -> tuple[list[float], float]:
    """Return the time of each call that queues a record, and this process's processor time per record."""
    from clip_har_jax.mlops.tracking import FINISHED, Trackers, read_run_info

    trackers = Trackers(TRACKERS, read_run_info(workdir))
    metrics = {name: value for name, value in record.items() if name != "step"}
    trackers.write(0, metrics)
    while len(json.loads(_state(workdir))) < len(TRACKERS):  # until all are open
        time.sleep(0.1)
    time.sleep(3)
    waits, begin = [], time.process_time()
    for step in range(1, count + 1):
        start = time.perf_counter()
        trackers.write(step, metrics)
        waits.append(time.perf_counter() - start)
        time.sleep(min(interval_s, 0.1))
    processor_s = (time.process_time() - begin) / count
    trackers.status = FINISHED
    trackers.close()
    return waits, processor_s


def _state(workdir: Path) -> str:
    path = workdir / "trackers.json"
    return path.read_text() if path.exists() else "{}"


if __name__ == "__main__":
    cli.run(main)
