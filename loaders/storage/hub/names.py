"""Names of the Hub's repositories, OWNER/NAME[@REVISION], where a folder could be meant as well."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from loaders.errors import BadSpec
from loaders.storage.address import Address

NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.\-]*)/(?P<name>[A-Za-z0-9][\w.\-]*)(?:@[\w.\-%]+)?")
# What a browser shows of a repository; the files themselves (resolve/...) are read as any server's are.
PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.\-]+/[\w.\-]+)(?:/tree/([\w.\-%]+))?/?")
FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json", ".yaml", ".yml", ".txt")


def hub_name(text: str) -> Address | None:
    """Return the address of the repository that a text names; None if it has another form, or is a path that exists.

    Raises:
        BadSpec: it may well be a slip: its first part is a folder here, or there is one of nearly that name; or it is
            the address of a repository's page.
    """
    page = PAGE.fullmatch(text)
    if page is not None:
        meant = f"hf://{page[1]}" + (f"@{page[2]}" if page[2] else "")
        raise BadSpec(f"{text}: that is a page for browsers; the repository is {meant}")
    found = NAME.fullmatch(text)
    if found is None or text.endswith(FILES) or Path(text).exists():
        return None
    owner, name = found["owner"], found["name"]
    folders = [owner] if Path(owner).is_dir() else difflib.get_close_matches(owner, _folders(Path()), n=1, cutoff=0.8)
    for folder in folders:
        near = difflib.get_close_matches(name, _folders(Path(folder)), n=1)
        if near or folder == owner:
            meant = f"is it {folder}/{near[0]}? " if near else ""
            raise BadSpec(
                f"{text}: there is no such folder here, though there is {folder}/; {meant}"
                f"the Hub's repository of that name is hf://{text}"
            )
    return Address.of(f"hf://{text}")


def _folders(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if path.is_dir()]


def source_address(where: Address | os.PathLike[str] | str) -> Address:
    """Return the address of a source that a user gives: a path, a URL, or a repository of the Hub by its name.

    Raises:
        BadSpec: as `hub_name`.
    """
    named = hub_name(where) if isinstance(where, str) else None
    return Address.of(where) if named is None else named
