"""Write labelled images as tar shards of image-text pairs, which data.train=webdataset:PATTERN reads.

  python scripts/write_pairs.py --data=synthetic?split=train --output=pairs --max_pairs=6000
  python scripts/write_pairs.py --data=folder:photos --output=pairs --pairs_per_shard=500

The captions are the prompts of the classes ("a photo of a person riding a bike."), in turn. Replaces the output folder.
Exits 0 when done, 2 on a mistake.
"""

from pathlib import Path

from clip_har_jax import cli
from clip_har_jax.text import DEFAULT_TEMPLATES


def main() -> int:
    parser = cli.make_parser(__doc__)
    cli.add_data(parser, "the labelled images, e.g. --data=folder:photos", required=True)
    cli.add_output(parser, "pairs")
    parser.add_argument(
        "--pairs_per_shard", type=int, default=1000, metavar="N", help="in each shard, e.g. --pairs_per_shard=1000"
    )
    parser.add_argument("--max_pairs", type=int, metavar="N", help="write only so many, e.g. --max_pairs=6000")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="of the captions; {} is replaced by the class; may be repeated; left out: the templates of "
        "config.text.templates' default, e.g. --template='a photo of a person {}.'",
    )
    arguments = parser.parse_args()

    from clip_har_jax.pipelines.write_pairs import write_pairs

    shards = write_pairs(
        arguments.data,
        arguments.output,
        arguments.pairs_per_shard,
        arguments.template or DEFAULT_TEMPLATES,
        arguments.max_pairs,
    )
    last = f"{len(shards) - 1:05d}"
    pattern = Path(arguments.output) / (f"{{00000..{last}}}.tar" if len(shards) > 1 else shards[0].name)
    cli.print_rows([("shards", str(len(shards))), ("SPEC", f"webdataset:{pattern}")])
    return 0


if __name__ == "__main__":
    cli.run(main)
