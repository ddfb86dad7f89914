"""Tells the action in images.

  python scripts/predict.py --model=runs/demo/model photo.jpg holiday/
  find photos -name '*.jpg' | python scripts/predict.py --model=runs/demo/model --json -

Prints a line for each image: probability, action, file. A file that can't be read is reported and the rest go on.
Exits 0 when all were read, 1 when some were not, 2 on a mistake.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from clip_har_jax import cli

if TYPE_CHECKING:
    from clip_har_jax.inference.predictor import Prediction


def main() -> int:
    arguments = _parse()

    from clip_har_jax.errors import UserError
    from clip_har_jax.inference.backends import split_classes
    from clip_har_jax.inference.predictor import Predictor, list_inputs

    inputs = list_inputs(arguments.inputs, sys.stdin.buffer)
    predictor = Predictor(arguments.model, split_classes(arguments.classes), arguments.batch_size)
    width, count, failed = max(map(len, predictor.labels)), 0, 0
    for prediction in predictor.stream(inputs):
        if arguments.json:
            print(json.dumps(prediction.to_dict()), flush=True)
        else:
            _print_line(prediction, width)
        count, failed = count + 1, failed + (prediction.error is not None)
    if not count:
        raise UserError("no paths on stdin; write one a line")
    return 1 if failed else 0


def _print_line(prediction: "Prediction", width: int) -> None:
    name = prediction.input.encode(errors="backslashreplace").decode()  # file names needn't be UTF-8
    if prediction.error is not None:
        print(f"error: {name}: {prediction.error}", file=sys.stderr)
    else:
        print(f"{prediction.score:.3f}  {prediction.label:<{width}}  {name}", flush=True)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a folder of images, or - for paths on stdin, e.g. a.jpg")
    add("--model", required=True, metavar="PATH", help="a model folder or a Hub name, e.g. --model=runs/demo/model")
    add(
        "--classes",
        metavar="NAMES",
        help="tell these actions apart, in any words, instead of the model folder's own, e.g. "
        '--classes="riding a bike,sleeping"',
    )
    add(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="images computed at once, e.g. --batch_size=32 (default)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object a line, with the 5 most probable actions, e.g. --json",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
