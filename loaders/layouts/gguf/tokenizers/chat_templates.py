"""Chat templates, of which a model may have several by name: from transformers' files to GGUF's keys, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loaders.containers.gguf import MetadataValue, text, texts
from loaders.errors import BadCheckpoint, BadSpec
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

DEFAULT = "default"
KEY, NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
FILE, OLDER_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"
LIMIT = 1 << 24  # bytes: the longest published chat templates have some 20 kB


def templates_of(files: PinnedFiles, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by name, from their own files or else from tokenizer_config.json, `settings`.

    Raises:
        BadCheckpoint: a file is not text, or longer than any template.
    """
    if files.find(FILE) is not None:
        names = [entry.name for entry in files.store.list() if _is_additional(entry.name)]
        more = {name.removeprefix(FOLDER).removesuffix(".jinja"): _read(files, name) for name in names}
        return {DEFAULT: _read(files, FILE), **more}
    found = settings.get("chat_template")
    if found is None and files.find(OLDER_FILE) is not None:
        found = read_json(files, OLDER_FILE, LIMIT).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):  # a list of {"name": ..., "template": ...}
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {name: each for name, each in pairs if isinstance(name, str) and isinstance(each, str)}


def _is_additional(name: str) -> bool:
    return name.startswith(FOLDER) and name.endswith(".jinja") and name.count("/") == 1


def _read(files: PinnedFiles, name: str) -> str:
    files.store.check_inside(name)
    try:
        return files.read_all(name, LIMIT).decode()
    except UnicodeDecodeError:
        raise BadCheckpoint(f"{name}: expected text in UTF-8") from None


def template_metadata(templates: Mapping[str, str]) -> dict[str, MetadataValue]:
    """Return GGUF's keys. In a name, what is no letter or digit becomes _, as gguf-py has it (add_chat_template).

    Raises:
        BadSpec: two names become the same.
    """
    others: dict[str, str] = {}
    for name, template in templates.items():
        plain = re.sub("[^A-Za-z0-9]", "_", name)
        if plain in others:
            raise BadSpec(f"chat templates: two have the name {plain} in a GGUF, of which {name!r}; rename one")
        if name != DEFAULT:
            others[plain] = template
    found = {f"{KEY}.{name}": text(template) for name, template in others.items()}
    if others:
        found[NAMES] = texts(tuple(others))
    return found | ({KEY: text(templates[DEFAULT])} if DEFAULT in templates else {})


def template_setting(metadata: Mapping[str, Any]) -> str | Sequence[Mapping[str, str]] | None:
    """Return what tokenizer_config.json has as chat_template: the only one, a list of named ones, or None."""
    default = metadata.get(KEY)
    listed = metadata.get(NAMES)
    listed = listed if isinstance(listed, list | tuple) else ()
    names = [name for name in listed if isinstance(metadata.get(f"{KEY}.{name}"), str)]
    if not names:
        return default if isinstance(default, str) else None
    first = [{"name": DEFAULT, "template": default}] if isinstance(default, str) else []
    return first + [{"name": name, "template": metadata[f"{KEY}.{name}"]} for name in names]
