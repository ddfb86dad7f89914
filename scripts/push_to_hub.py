"""Publish a model folder on the Hugging Face Hub, with a model card.

  python scripts/push_to_hub.py --model=runs/demo/model --repository=me/har --metrics=runs/demo/test/metrics.json \\
      --dry_run=hub/har
  python scripts/push_to_hub.py --model=runs/demo/model --repository=me/har --metrics=runs/demo/test/metrics.json

--dry_run writes the folder without pushing it, and needs no network. A model on the Hub can be used by its name:
`python scripts/predict.py --model=me/har photo.jpg`. Exits 0 when done, 2 on a mistake.
"""

import tempfile
from pathlib import Path

from clip_har_jax import cli


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a sealed folder, e.g. --model=runs/demo/model")
    add("--repository", required=True, metavar="OWNER/NAME", help="name on the Hub, e.g. --repository=me/har")
    add("--metrics", type=Path, metavar="FILE", help="of an evaluation, e.g. --metrics=runs/demo/test/metrics.json")
    add("--license", default="apache-2.0", help="the Hub's identifier, e.g. --license=apache-2.0 (default)")
    add("--private", action="store_true", help="make a private repository, e.g. --private")
    add("--dry_run", type=Path, metavar="DIR", help="write the folder there without pushing it, e.g. --dry_run=hub/har")
    arguments = parser.parse_args()

    from clip_har_jax.mlops.hub import push_folder, write_hub_folder

    what = arguments.model, arguments.metrics, arguments.repository, arguments.license
    if arguments.dry_run is not None:
        digest = write_hub_folder(*what, arguments.dry_run)
        print(f"{arguments.dry_run}: as it would be pushed to {arguments.repository}, digest {digest}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        digest = write_hub_folder(*what, folder)
        print(f"{push_folder(folder, arguments.repository, digest, arguments.private)}, digest {digest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
