"""Find near duplicates in labelled images or clips, and split them into train, val and test without leaks.

  python scripts/prepare_data.py --data=folder:photos --output=prepared
  python scripts/train.py --config=configs/demo.py --workdir=runs/photos \\
      --config.data.train=manifest:prepared/manifest.parquet --config.data.val=manifest:prepared/manifest.parquet

Copies of one photograph (re-encoded, resized, cropped or framed) stay in one split. So do copies of one clip, and clips
of one recording by the names of UCF101 and HMDB51. Copies with different labels are excluded from all splits. Images
that look alike but have different labels are kept and listed for a decision. Writes manifest.parquet (path, sha256,
label, group, split), duplicates.json, report.html (look at it) and prepare.json. The result depends only on the data,
the shares and the seed.
"""

import argparse
from pathlib import Path

from clip_har_jax import cli


def main() -> None:
    arguments = _parse()

    from clip_har_jax.data.splits import Shares
    from clip_har_jax.pipelines.prepare_data import PrepareOptions, prepare_data, print_prepared

    names = ("test", "seed", "cache_px", "model", "reference", "tfds_dir", "max_bad_fraction", "num_workers")
    shares = Shares(arguments.val_fraction, arguments.test_fraction)
    options = PrepareOptions(
        shares=shares, multi_label=arguments.multi_label, **{name: getattr(arguments, name) for name in names}
    )
    prepared = prepare_data(arguments.data, arguments.output, options)
    print_prepared(prepared, arguments.output)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        action="append",
        metavar="SPEC",
        help="labelled images, or clips (video:PATH); several are pooled: --data=csv:train.csv --data=csv:more.csv",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="where to write, e.g. --output=prepared")
    add(
        "--test",
        default="",
        metavar="SPEC",
        help="a fixed test set; near duplicates of its images are in no other split, e.g. --test=csv:test.csv",
    )
    add("--val_fraction", type=float, default=0.1, metavar="F", help="share for validation, e.g. --val_fraction=0.1")
    add("--test_fraction", type=float, default=0.2, metavar="F", help="share for test, e.g. --test_fraction=0.2")
    add("--seed", type=int, default=0, metavar="N", help="of the split, e.g. --seed=0 (default)")
    add(
        "--cache_px",
        type=int,
        metavar="PX",
        help="also write images with a shorter side of PX into shards for faster training by "
        "manifest:FILE?split=train&cache=PX, e.g. --cache_px=256",
    )
    add(
        "--model",
        default="",
        metavar="PATH",
        help="a CLIP whose features find labels that may be wrong, e.g. --model=runs/demo/model",
    )
    add(
        "--reference",
        default="",
        metavar="FILE",
        help="an earlier manifest to compare with, e.g. --reference=old/manifest.parquet",
    )
    add(
        "--tfds_dir",
        default="",
        metavar="DIR",
        help="also write HAR-15's splits as a TFDS data set, read by tfds:har15?data_dir=DIR, e.g. "
        "--tfds_dir=tensorflow_datasets",
    )
    cli.add_max_bad_fraction(parser, 0.01)
    add("--num_workers", type=int, metavar="N", help="processes, by default one per core, e.g. --num_workers=4")
    add(
        "--multi_label",
        action="store_true",
        help="images with any number of labels: joined by | in a csv, lists in parquet:FILE?label=COLUMN, or one "
        "file in several class folders; e.g. --data=csv:train.csv --multi_label",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
