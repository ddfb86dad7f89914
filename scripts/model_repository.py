"""Write an exported folder as a model repository for Triton and KServe.

  python scripts/model_repository.py --export=runs/demo/export --output=repository
  tritonserver --model-repository=repository

Clients must send images resized and cropped as preprocessor_config.json of the exported folder says: uint8, height x
width x 3. Exits 0 when done, 2 on a mistake.
"""

from pathlib import Path

from clip_har_jax import cli
from clip_har_jax.errors import UserError


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--export", type=Path, required=True, metavar="DIR", help="exported folder, e.g. --export=runs/demo/export")
    add("--output", type=Path, required=True, metavar="DIR", help="the repository, e.g. --output=repository")
    add("--name", default="har", help="name of the classifier, e.g. --name=har (default)")
    add("--format", default="onnx", help="one of the ONNX formats, e.g. --format=onnx_int8")
    add("--max_batch_size", type=int, default=32, metavar="N", help="images in a batch, e.g. --max_batch_size=32")
    arguments = parser.parse_args()
    if arguments.max_batch_size < 1:
        raise UserError(f"--max_batch_size={arguments.max_batch_size}: 1 or more is needed")

    from clip_har_jax.mlops.model_repository import write_model_repository

    for name in write_model_repository(
        arguments.export, arguments.output, arguments.name, arguments.format, arguments.max_batch_size
    ):
        print(arguments.output / name)
    return 0


if __name__ == "__main__":
    cli.run(main)
