"""Calibrate a model on held-out images: fit its temperature and the thresholds of abstention and label sets.

  python scripts/calibrate.py --model=runs/demo/model --data=folder:photos/val --output=runs/demo/calibrated

Training does this on its validation images; repeat it if the images in use differ from them. The sealed model isn't
changed: a new folder is written. Exits 0 when done, 2 on a mistake.
"""

from clip_har_jax import cli
from clip_har_jax.config import DataConfig, EvalConfig


def main() -> int:
    parser = cli.make_parser(__doc__)
    cli.add_model(parser)
    help = "labelled images, neither of training nor of the later test, e.g. --data=folder:photos/val"
    cli.add_data(parser, help, required=True)
    cli.add_output(parser, "runs/demo/calibrated")
    cli.add_batch_size(parser, EvalConfig.batch_size)
    cli.add_max_bad_fraction(parser, DataConfig.max_bad_fraction)
    arguments = parser.parse_args()

    from clip_har_jax.pipelines.calibrate import calibrate_model, print_result

    print_result(calibrate_model(**vars(arguments)), arguments.output)
    return 0


if __name__ == "__main__":
    cli.run(main)
