"""Evaluate a model on labelled images, or on image-text pairs.

  python scripts/evaluate.py --model=runs/demo/model --data=synthetic --output=runs/demo/test
  python scripts/evaluate.py --model=openai/clip-vit-base-patch32 --data=folder:photos --output=out \\
      --classes="riding a bike,sleeping"
  python scripts/evaluate.py --model=runs/pairs/model --data=webdataset:val-{000..003}.tar --output=runs/pairs/test
  python scripts/evaluate.py --compare=runs/a/test,runs/b/test --output=runs/comparison

Writes metrics.json, predictions.parquet, confusion_matrix.png and report.html to the output folder, and
bad_inputs.jsonl if images could not be read; with --compare, comparison.json and comparison.html. For pairs:
metrics.json with the recall at 1, 5 and 10 from image to text and from text to image. Exits 0 when done, 2 on a
mistake.
"""

import argparse

from clip_har_jax import cli
from clip_har_jax.config import DataConfig, EvalConfig


def main() -> int:
    parser = _make_parser()
    arguments = parser.parse_args()
    folders = vars(arguments).pop("compare")
    if folders is not None:
        if arguments.model or arguments.data:
            parser.error("--compare goes without --model and --data: it reads what was written for them")
        from clip_har_jax.evaluation import paired

        paired.print_result(paired.compare_evaluations(folders.split(","), arguments.output), arguments.output)
        return 0
    if not (arguments.model and arguments.data):
        parser.error("--model and --data are needed, e.g. --model=runs/demo/model --data=synthetic (or --compare)")

    from clip_har_jax.data.pair_sources import has_pairs

    if has_pairs(arguments.data):
        from clip_har_jax.pipelines import retrieval

        retrieval.check_flags(vars(arguments).pop("classes"), vars(arguments).pop("num_views"))
        retrieval.print_result(retrieval.evaluate_retrieval(**vars(arguments)), arguments.output)
        return 0

    from clip_har_jax.inference.backends import split_classes
    from clip_har_jax.pipelines.evaluate import evaluate_model, print_result

    arguments.classes = split_classes(arguments.classes)
    print_result(evaluate_model(**vars(arguments)), arguments.output)
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    cli.add_model(parser, required=False)
    kinds = "synthetic, folder:PATH, csv:FILE, tfds:NAME or hf:OWNER/NAME"
    pairs = "webdataset:PATTERN, parquet:PATTERN or a csv:FILE with captions"
    cli.add_data(parser, f"the labelled images: {kinds}; or image-text pairs: {pairs}; e.g. --data=folder:photos")
    cli.add_output(parser, "runs/demo/test")
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="recognise these actions, in free words, without training; left out: the model folder's own actions, or "
        'else the labels of the data, e.g. --classes="riding a bike,sleeping"',
    )
    cli.add_batch_size(parser, EvalConfig.batch_size)
    cli.add_max_bad_fraction(parser, DataConfig.max_bad_fraction)
    parser.add_argument(
        "--num_views",
        type=int,
        metavar="N",
        help="of video data: samples of each clip whose predictions are averaged, e.g. --num_views=3; left out: as the "
        "model was trained",
    )
    parser.add_argument(
        "--compare",
        metavar="DIRS",
        help="instead of evaluating, compare earlier evaluations of the same images by a paired test of each against "
        "the first, e.g. --compare=runs/a/test,runs/b/test",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
