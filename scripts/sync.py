"""Upload missing or offline records of a run to MLflow and Weights & Biases.

  python scripts/sync.py --workdir=runs/demo
  WANDB_API_KEY=... python scripts/sync.py --workdir=runs/demo --trackers=wandb

metrics.jsonl and the work folder hold everything; nothing is uploaded twice. Exits 0 when done, 2 on a mistake or if a
tracker still can't be reached.
"""

from clip_har_jax import cli


def main() -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, e.g. --workdir=runs/demo")
    parser.add_argument(
        "--trackers",
        default="",
        metavar="NAMES",
        help="mlflow, wandb or both; left out: those of the run, e.g. --trackers=mlflow,wandb",
    )
    arguments = parser.parse_args()

    from clip_har_jax.mlops.sync import sync

    names = [name.strip() for name in arguments.trackers.split(",") if name.strip()]
    for name, what in sync(arguments.workdir, names).items():
        print(f"{name}: {what}")
    return 0


if __name__ == "__main__":
    cli.run(main)
