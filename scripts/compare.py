"""Compare methods on equal terms (same start, splits, steps and search), and write a table and a plot.

  python scripts/compare.py --config=configs/compare.py --methods=zero_shot,linear_probe,full,lora --seeds=0,1,2 \
      --output=runs/compare --config.model.name=runs/start/model

The learning rate and weight decay of each method are searched first, equally for all and only on validation data.
Writes compare.md (the table), compare.json, compare.png (if config.retention.data is set), search/ and cells/. After an
interruption, the same command continues. --protocol=few_shot makes a comparison for each number of --shots,
base_to_novel trains on half of the classes and evaluates on both halves.

Methods: zero_shot, linear_probe, full, lp_ft, flyp, lora, prompt, adapter, tip_adapter, bitfit.
"""

from pathlib import Path

from clip_har_jax import cli
from clip_har_jax.config import load_config
from clip_har_jax.errors import UserError


def numbers(text: str, flag: str, kind: type) -> list:
    """Return a comma-separated list.

    Raises:
      UserError: a part that isn't a number.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}={text}: write numbers divided by commas, e.g. {flag}=0,1,2") from error


def main() -> None:
    parser = cli.make_parser(__doc__)
    cli.add_config(parser, "configs/compare.py")
    parser.add_argument("--methods", required=True, metavar="NAMES", help="e.g. --methods=zero_shot,linear_probe,lora")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="one run per seed, e.g. --seeds=0,1,2")
    cli.add_output(parser, "runs/compare")
    parser.add_argument(
        "--test",
        metavar="SPEC",
        help="test images, neither training nor validation images; default: the test split of config.data.val, or of "
        "config.data.train if no val is set, e.g. --test=folder:photos/test",
    )
    parser.add_argument(
        "--search",
        default="0.3,1,3,10,30,100",
        metavar="X,X",
        help="factors of config.optim.learning_rate to try, equal for all methods; the first seed's validation chooses "
        "one, e.g. --search=1,10",
    )
    parser.add_argument(
        "--decays",
        default="0,0.1",
        metavar="X,X",
        help="weight decays to try beside the config's, with the best rate only, e.g. --decays=0; empty: none",
    )
    parser.add_argument(
        "--soups", action="store_true", help="add rows for the mean weights over each method's seeds, e.g. --soups"
    )
    parser.add_argument(
        "--protocol",
        choices=("all", "few_shot", "base_to_novel"),
        default="all",
        help="learn from all examples, from few of each class, or from few of half of the classes, e.g. "
        "--protocol=few_shot",
    )
    parser.add_argument(
        "--shots",
        metavar="N,N",
        help="with few_shot: examples of each class (default 2,4,8,16); with base_to_novel: one number (default 16), "
        "e.g. --shots=4,16",
    )
    arguments, overrides = cli.parse_with_overrides(parser)
    config = load_config(arguments.config, overrides)
    seeds, factors = numbers(arguments.seeds, "--seeds", int), numbers(arguments.search, "--search", float)
    decays = numbers(arguments.decays, "--decays", float) if arguments.decays else []
    if any(factor <= 0 for factor in factors) or any(value < 0 for value in [*seeds, *decays]):
        raise UserError("--search takes factors above 0, --seeds and --decays numbers from 0")

    from clip_har_jax.pipelines import protocols
    from clip_har_jax.pipelines.method_comparison import Space, compare_methods, default_test

    test = arguments.test or default_test(config)
    output = Path(arguments.output)
    common = (config, arguments.methods.split(","), seeds, output, test, Space(tuple(factors), tuple(decays)))
    shots = numbers(arguments.shots, "--shots", int) if arguments.shots else []
    if arguments.protocol == "all":
        if shots:
            raise UserError("--shots goes with --protocol=few_shot or base_to_novel")
        compare_methods(*common, arguments.soups)
        print((output / "compare.md").read_text())
        return
    if arguments.soups:
        raise UserError("--soups goes with --protocol=all alone")
    if arguments.protocol == "few_shot":
        protocols.few_shot(*common, shots or protocols.SHOTS)
    elif len(shots) > 1:
        raise UserError(f"--shots={arguments.shots}: base_to_novel takes one number, e.g. --shots=16")
    else:
        protocols.base_to_novel(*common, *shots)
    print((output / f"{arguments.protocol}.md").read_text())


if __name__ == "__main__":
    cli.run(main)
