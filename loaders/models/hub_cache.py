"""Where a model lies: a folder, or a name of the Hugging Face Hub that was fetched into the local cache before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loaders.errors import BadSpec

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def folder_of(name_or_path: str | Path) -> Path:
    """The folder itself, or the snapshot in the Hub's cache (HF_HOME) that its branch `main` named when it was fetched.

    Nothing is fetched: this works without a network, and says what would fetch it.

    Raises:
        BadSpec: neither is there.
    """
    folder = Path(name_or_path)
    if folder.is_dir() or not HUB_NAME.fullmatch(str(name_or_path)):
        return folder  # opening it says what is wrong with it
    name = str(name_or_path)
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub: Any = huggingface_hub
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise BadSpec(
            f"name_or_path: no folder {name!r}, and no model of that name in the local Hugging Face cache"
            f" ({hub.constants.HF_HUB_CACHE}); fetch it: hf download {name}"
        ) from None
