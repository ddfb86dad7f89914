"""Fine-tune CLIP with a config, or continue the run in the work folder.

  python scripts/train.py --config=configs/demo.py --workdir=runs/demo
  python scripts/train.py --config=configs/vitb32.py --workdir=runs/b32 --config.optim.learning_rate=3e-6

Any key of clip_har_jax/config.py can be set by --config.KEY=VALUE. The work folder receives config.json, run.json,
metrics.jsonl, checkpoints/, eval/<step>/metrics.json and, at the end, model/. The same command again continues.
Exits 0 when done, 2 on a mistake, 128 + N when signal N stopped it after saving.

With several hosts, run the same command on each: unchanged under Slurm, Open MPI, JobSet and on Cloud TPU, elsewhere
  with --coordinator_address, --num_processes and --process_id.
"""

from clip_har_jax import cli
from clip_har_jax.config import load_config


def main() -> int:
    parser = cli.make_parser(__doc__)
    cli.add_config(parser, "configs/demo.py")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the work folder, e.g. --workdir=runs/demo")
    parser.add_argument(
        "--profile_steps",
        type=cli.step_range,
        metavar="FIRST:LAST",
        help="write a trace of these steps (of process 0) to profile/ in the work folder, for TensorBoard or "
        "ui.perfetto.dev, e.g. --profile_steps=10:15",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start anew if the folder holds a finished run, or one with another config or data; an unfinished run "
        "is continued. For pipelines, e.g. --restart",
    )
    cli.add_process_flags(parser)
    arguments, overrides = cli.parse_with_overrides(parser)
    config = load_config(arguments.config, overrides)

    from clip_har_jax.parallel import distributed

    with distributed.join(**cli.process_flags(arguments)):
        from clip_har_jax.trainer.result import print_result
        from clip_har_jax.trainer.train import train
        from clip_har_jax.training.checkpoint import report_failed_saves_once

        report_failed_saves_once()
        result = train(config, arguments.workdir, profile_steps=arguments.profile_steps, restart=arguments.restart)
        if distributed.is_main():
            print_result(result)
    return result.exit_code


if __name__ == "__main__":
    cli.run(main)
