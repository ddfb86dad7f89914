"""Signatures of folders, over all of their files, in the format of the OpenSSF's model-signing.

A manifest detects accidental changes; a signature also detects changes by anyone without the key. Keys are of elliptic
curves, as `openssl ecparam -name prime256v1 -genkey` makes them.
"""

from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError

SIGNATURE_FILE = "model.sig"
OUTSIDE = (SIGNATURE_FILE, "README.md")  # files that a signature doesn't cover


def sign(folder: Path, private_key: Path) -> None:
    """Write model.sig into a folder.

    Raises:
      UserError: model-signing isn't installed, or no usable key.
    """
    _signer(private_key, folder).sign(folder, folder / SIGNATURE_FILE)


def check_private_key(private_key: Path) -> None:
    """Check that `sign` can use a key, before the folder is written.

    Raises:
      UserError: model-signing isn't installed, or no usable key.
    """
    _signer(private_key, Path())


def _signer(private_key: Path, folder: Path) -> Any:
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library, folder))
    try:
        return config.use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--sign={private_key}: no private key of an elliptic curve in PEM ({reason})") from error


def verify_signature(folder: Path, public_key: Path) -> None:
    """Check that a folder was signed with the private half of a key and hasn't changed since.

    Raises:
      UserError: not signed, signed with another key, or changed; model-signing isn't installed.
    """
    library = _library()
    if not (folder / SIGNATURE_FILE).is_file():
        raise UserError(f"{folder}: not signed ({SIGNATURE_FILE} is missing)")
    config = library.verifying.Config().set_hashing_config(_hashing(library, folder))
    try:
        config = config.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{public_key}: no public key of an elliptic curve in PEM ({error})") from error
    try:
        config.verify(folder, folder / SIGNATURE_FILE)
    except Exception as error:  # each kind of mismatch raises its own exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: its signature isn't good for {public_key} ({reason})") from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise UserError(f"signatures need model-signing ({error}); pip install -e '.[signing]'") from error
    return model_signing


def _hashing(library: Any, folder: Path) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=[folder / name for name in OUTSIDE])
