"""Find when actions happen in untrimmed videos, and evaluate the result with annotated times.

  python scripts/localize.py --model=runs/when/model --train="motion?untrimmed" --data="motion?untrimmed" \\
      --output=runs/when/test
  python scripts/localize.py --model=runs/when/model --val=video:val.csv --data=video:test.json --output=out

Thresholds are fitted on the validation videos. With --train, a small head that finds starts and ends is fitted too, and
the better one on the validation videos is chosen. Writes localisation.json (mAP at temporal IoU 0.3 to 0.7 as defined
by ActivityNet, frame mAP), segments.json, timeline.png and the head. Exits 0 when done, 2 on a mistake.
"""

from clip_har_jax import cli


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add("--data", required=True, metavar="SPEC", help="annotated test videos, e.g. --data=video:test.csv")
    add("--val", default="", metavar="SPEC", help="videos for fitting thresholds; left out: the split val of --data")
    add("--train", default="", metavar="SPEC", help="videos that fit the boundary head, e.g. --train=video:train.csv")
    add("--window_s", type=float, default=2.0, metavar="S", help="length of the model's input, e.g. --window_s=2")
    cli.add_output(parser, "runs/when/test")
    cli.add_batch_size(parser)
    arguments = parser.parse_args()

    from clip_har_jax.pipelines.localize import localize, print_result

    print_result(localize(**vars(arguments)), arguments.output)
    return 0


if __name__ == "__main__":
    cli.run(main)
