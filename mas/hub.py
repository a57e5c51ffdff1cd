"""A model folder to the Hugging Face hub.

In: what writes the folder. Out: the address of the repository, or one line that says what to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from mas.errors import first_line
from mas.model_folder import ModelError


def push_folder(save: Callable[[Path], None], repo_id: str, *, private: bool) -> str:
    """Saves to a temporary folder, uploads it and returns the address of the repository.

    Raises:
        ModelError: the hub cannot be reached, or takes no such model.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload the model"
            )
        except Exception as error:  # the hub client has no common base class for its errors
            why = f"not uploaded to the hub ({first_line(error)})"
            raise ModelError(f"{repo_id}: {why}; {_mend_upload(error)}") from error
    return str(address)


def _mend_upload(error: Exception) -> str:
    """What to do about an upload that failed."""
    if getattr(error, "response", None) is not None:  # the hub has answered
        return "log in with hf auth login and a token that may write there"
    if isinstance(error, ValueError):
        return "use a name of the form owner/name"
    return "try again when the hub can be reached; save_pretrained needs no network"
