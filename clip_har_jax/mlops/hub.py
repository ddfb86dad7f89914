"""The Hugging Face Hub: a model folder with its card, pushed or written to the disk for inspection."""

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from clip_har_jax import bundle, remote
from clip_har_jax.errors import UserError
from clip_har_jax.folders import replacing
from clip_har_jax.mlops.card import check_card, make_card


def write_hub_folder(model: Path, metrics: Path | None, repository: str, license: str, output: Path) -> str:
    """Write the folder that would be pushed: the model's files, and the card as README.md.

    Returns:
      The model's digest.

    Raises:
      UserError: the Hub refuses the name, the model isn't sealed, or the metrics are of another model.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--repository={repository!r}: write OWNER/NAME ({str(error).splitlines()[0]})") from error
    if "/" not in repository:
        raise UserError(f"--repository={repository!r}: write OWNER/NAME")
    if metrics is not None and not metrics.is_file():
        raise UserError(f"--metrics={metrics}: no such file; scripts/evaluate.py writes it")
    values = json.loads(metrics.read_text(encoding="utf-8")) if metrics is not None else None
    card = make_card(model, values, repository, license)
    check_card(card)
    with replacing(output, "--dry_run") as folder:
        if output.exists() and any(output.iterdir()):
            raise UserError(f"{output}: not empty; name another folder")
        shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        (folder / "README.md").write_text(card, encoding="utf-8")
    digest = bundle.verify(output)
    assert digest is not None, "make_card refuses what isn't sealed"
    return digest


def push_folder(folder: Path, repository: str, digest: str, private: bool) -> str:
    """Push a folder in one commit; return its address.

    Raises:
      UserError: the Hub refuses the folder or can't be reached.
    """
    api = HfApi()
    service = remote.hub(f"--repository={repository}", api.endpoint, remote.advise_login("HF_TOKEN", "hf auth login"))
    service.check_reachable(api.endpoint)
    service.call(api.create_repo, repository, private=private, exist_ok=True)
    commit = service.call(
        api.upload_folder,
        repo_id=repository,
        folder_path=folder,
        commit_message=f"Model {digest[:12]}",
        delete_patterns=["*"],
    )
    return str(commit.commit_url)
