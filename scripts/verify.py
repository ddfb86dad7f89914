"""Check that a model folder or an exported one is complete and unchanged and, with a key, who signed it.

  python scripts/verify.py runs/demo/export
  python scripts/verify.py runs/demo/export --key=public.pem

Prints the digest. Exits 0 when the folder is unchanged since it was sealed (and signed), 2 otherwise.
"""

from pathlib import Path

from clip_har_jax import bundle, cli
from clip_har_jax.errors import UserError
from clip_har_jax.signing import verify_signature


def main() -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="a model folder or an exported one, e.g. runs/demo/export")
    parser.add_argument("--key", metavar="FILE", help="the signer's public key in PEM, e.g. --key=public.pem")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    digest = bundle.verify(folder)
    if digest is None:
        raise UserError(f"{folder}: has no {bundle.MANIFEST}, so nothing says what it should hold")
    if arguments.key:
        verify_signature(folder, Path(arguments.key))
    print(f"{digest}  {folder}{'  signature good' if arguments.key else ''}")
    return 0


if __name__ == "__main__":
    cli.run(main)
