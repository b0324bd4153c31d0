"""The folder of a model that is given as a path, or as a Hugging Face Hub name that is in the local cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.storage.address import Address

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def place_of_model(name_or_path: str | Path) -> Address:
    """Return the address that a URL is, or the folder of a path or a Hub name, as `folder_of` does."""
    address = Address.of(name_or_path)
    return Address.of(folder_of(name_or_path)) if address.is_local else address


def folder_of(name_or_path: str | Path) -> Path:
    """Return a folder as it is, or the snapshot of a Hub name's branch `main` in the local cache (HF_HOME).

    Nothing is downloaded, so this works without a network; the error says which command downloads the model.

    Raises:
        BadSpec: neither exists.
    """
    folder = Path(name_or_path)
    if folder.is_dir() or not HUB_NAME.fullmatch(str(name_or_path)):
        # Opening a path that is no folder gives the better message.
        return folder
    name = str(name_or_path)
    with needed_for(f"name_or_path: {name} of the Hub's cache"):
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
