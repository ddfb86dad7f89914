"""Predict the memory, traffic, time and price of a run on a machine, even an absent one, and the best settings.

  python scripts/plan.py --config=configs/vitl14_336.py --topology=v5e:4x4 --config.train.global_batch_size=4096
  python scripts/plan.py --config=configs/demo.py --json=plan.json
  python scripts/plan.py --config=configs/vitb16.py --topology=v5e:4x4 --num_examples=12600 --price_per_chip_hour=1.2

Compiles the training step of the config for the local devices, or for a TPU slice (which needs the compiler: pip
install "jax[tpu]"). Then tries other strategies, parts of a batch (accumulation) and rematerialisation, and recommends
the fastest settings that fit. Reads neither data nor weights. Any key of clip_har_jax/config.py can be set by
--config.KEY=VALUE. Exits 0 when something fits, 1 when nothing does, 2 on a mistake.
"""

import os
import sys
from pathlib import Path

from clip_har_jax import cli
from clip_har_jax.config import load_config
from clip_har_jax.errors import UserError
from clip_har_jax.files import write_json


def main() -> int:
    parser = cli.make_parser(__doc__)
    cli.add_config(parser, "configs/vitb32.py")
    parser.add_argument(
        "--topology",
        default="local",
        help="the machine: local (default), or a TPU slice by generation and shape, e.g. --topology=v5p:2x2x4",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan to this file, e.g. --json=plan.json")
    parser.add_argument("--num_classes", type=int, metavar="N", help="actions, e.g. --num_classes=15 (default)")
    parser.add_argument(
        "--num_prompts", type=int, metavar="N", help="default: by the config's templates, e.g. --num_prompts=45"
    )
    parser.add_argument(
        "--num_examples", type=int, metavar="N", help="training images, for chip-hours, e.g. --num_examples=12600"
    )
    parser.add_argument(
        "--price_per_chip_hour", type=float, metavar="P", help="to compute the price, e.g. --price_per_chip_hour=1.2"
    )
    parser.add_argument(
        "--max_minutes", type=float, default=15, metavar="M", help="time limit for the search, e.g. --max_minutes=15"
    )
    parser.add_argument("--config_only", action="store_true", help="try only the config's own settings")
    arguments, overrides = cli.parse_with_overrides(parser)
    for name in ("num_classes", "num_prompts", "num_examples", "price_per_chip_hour", "max_minutes"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name}={value}: must be above 0")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UserError(f"--json={arguments.json}: no such folder; make it first")
    config = load_config(arguments.config, overrides)
    if arguments.topology != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX would look for the TPU that belongs to libtpu

    from clip_har_jax.planning.plan import plan
    from clip_har_jax.planning.report import print_plan

    result = plan(
        config,
        arguments.topology,
        num_classes=arguments.num_classes,
        num_prompts=arguments.num_prompts,
        search=not arguments.config_only,
        max_minutes=arguments.max_minutes,
        say=lambda line: sys.stderr.write(f"{line}\n"),
    ).for_run(arguments.num_examples, arguments.price_per_chip_hour)
    if arguments.json:
        write_json(arguments.json, result.to_dict())
    print_plan(result)
    return 0 if result.recommended else 1


if __name__ == "__main__":
    cli.run(main)
