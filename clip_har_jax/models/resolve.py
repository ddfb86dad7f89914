"""Name or path -> the folder of a model, local or downloaded from the Hugging Face Hub."""

import re
from pathlib import Path

from clip_har_jax import remote
from clip_har_jax.errors import UserError


def resolve_folder(name_or_folder: str) -> Path:
    """Return the folder of a model; a Hub name is downloaded once.

    Raises:
      UserError: neither a folder nor a name on the Hub, or the Hub can't be reached.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(name_or_folder):
        raise UserError(f"{name_or_folder}: no such folder, and not a Hub name (OWNER/NAME)")
    return _download(name_or_folder)


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form of a repository on the Hub, OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _download(name: str) -> Path:
    """Return the folder of a model's files; if the Hub can't be reached, the earlier download."""
    from huggingface_hub import constants, snapshot_download

    advice = "check the name and the network; without one, name the folder of a CLIP that was downloaded elsewhere"
    service = remote.hub(name, constants.ENDPOINT, advice)
    patterns = ["*.json", "*.safetensors", "*.txt", "spiece.model", "flax_model.msgpack", "*.jinja"]
    try:
        if not constants.HF_HUB_OFFLINE:
            service.check_reachable(constants.ENDPOINT)
    except UserError as unreachable:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:  # the Hub's client raises exceptions of its own, of requests and of httpx
            raise unreachable from None
    return Path(service.call(snapshot_download, name, allow_patterns=patterns))
