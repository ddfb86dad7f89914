"""Train, evaluate, export and register a model, and make it the champion if it passes its gates.

  python scripts/auto_train.py --config=configs/demo.py --workdir=runs/auto --test=synthetic
  python scripts/auto_train.py --config=configs/vitb32.py --workdir=runs/auto --config.data.train=folder:photos \\
      --min_gain=0.0 --max_latency_ms=80

Steps with unchanged inputs are skipped; after a kill, the same command continues. Without config.data.val, the data is
first split without leaks. Writes summary.html to the work folder. Exits 0 when the model is served, 1 when a gate
refused it, 2 on a mistake, 128 + N when signal N stopped it.
"""

from pathlib import Path

from clip_har_jax import cli
from clip_har_jax.config import load_config


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_config(parser, "configs/demo.py")
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder for all files, e.g. --workdir=runs/auto")
    add(
        "--test",
        default="",
        metavar="SPEC",
        help="test images; left out: the test part of the split, e.g. --test=synthetic",
    )
    add("--formats", default="onnx", metavar="NAMES", help="exported formats, e.g. --formats=onnx,onnx_int8")
    add("--name", default="har", help="name in the registry, e.g. --name=har (default)")
    cli.add_gates(parser)
    arguments, overrides = cli.parse_with_overrides(parser)
    config = load_config(arguments.config, overrides)

    from clip_har_jax.mlops.gates import Gates
    from clip_har_jax.pipelines.auto import Auto, AutoSettings

    gates = Gates(arguments.min_gain, arguments.min_retention, arguments.max_latency_ms)
    given = arguments.workdir, arguments.test, arguments.formats, arguments.name
    return Auto(AutoSettings(arguments.config, tuple(overrides), config, *given, gates)).run()


if __name__ == "__main__":
    cli.run(main)
