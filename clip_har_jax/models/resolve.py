"""Name or path -> the folder of a model, local or downloaded from the Hugging Face Hub."""

import re
from pathlib import Path

from clip_har_jax.errors import UserError


def resolve_folder(name_or_folder: str) -> Path:
    """Return the folder of a model; a Hub name is downloaded once.

    Raises:
      UserError: neither a folder nor a name on the Hub, or the Hub can't be reached.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_folder):
        raise UserError(f"{name_or_folder}: no such folder, and not a Hub name (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "flax_model.msgpack", "*.jinja"]
    try:
        return Path(snapshot_download(name_or_folder, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises exceptions of its own, of requests and of httpx
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name_or_folder}: not a folder here, and the Hub can't give it ({reason}); without a network, name the "
            "folder of a CLIP that was downloaded elsewhere"
        ) from error
