"""Upload an exported folder to a hub."""

import shlex
from pathlib import Path

from bigtrain.errors import RequestError, TrainingFailed

_SECONDS = 10.0  # until a hub that does not answer counts as unreachable


def refuse_bad_hub_id(hub_id: str) -> None:
    """Raises RequestError for what can be no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as problem:
        raise RequestError(
            f"--push {hub_id!r}: {str(problem).splitlines()[0]}", "OWNER/NAME", "--push me/my-model"
        ) from None


def push(folder: Path, hub_id: str) -> str:
    """Upload the folder; returns its address. Raises TrainingFailed: the folder stays as it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.repo_exists(hub_id)  # at once, where an upload would be tried again and again
        api.create_repo(hub_id, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=folder))
    except Exception as problem:  # of the hub, of the network, of the files
        reason = str(problem).strip().split("\n")[0] or type(problem).__name__
        later = shlex.join(["hf", "upload", hub_id, str(folder)])
        raise TrainingFailed(
            f"{folder} is written, but was not uploaded to {hub_id}: {reason}",
            "a hub that can be reached, and a login that may write there (hf auth login)",
            later,
        ) from None
