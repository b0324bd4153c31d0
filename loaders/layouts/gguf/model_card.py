"""general.*: what a GGUF says of its model, from the card (README.md), config.json and the model's name.

It follows gguf-py's metadata.py: the card comes first, then _name_or_path of config.json, then the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from loaders.containers.gguf import MetadataValue, text, texts, uint32
from loaders.errors import BadCheckpoint
from loaders.layouts.gguf.model_names import NameParts, name_parts, size_label, title
from loaders.storage.base import PinnedFiles

FILE = "README.md"
LIMIT = 1 << 22  # bytes of a card
LONGEST = 1 << 16  # characters of its front matter
# GGUF's key -> the card's keys for it, of which the first counts that is there
CARD = {
    "name": ("name", "model_name"), "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"), "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"), "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"), "size_label": ("size_label", "model_size_label"),
    "source.url": ("url", "model_url"), "source.doi": ("doi", "model_doi"), "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"), "license": ("license",), "license.name": ("license_name",),
    "license.link": ("license_link",),
}  # fmt: skip
LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}  # all of them count
SOURCES = {
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}  # of these the first
SOURCE_KEYS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
URL = ("http://", "https://", "ssh://")
HUGGING_FACE = re.compile(r"https?://huggingface.co/([^/]+/[^/]+)$")
PARTS = ("organization", "basename", "finetune", "version", "size_label")


def card_of(files: PinnedFiles) -> dict[str, Any]:
    """Return the front matter of the model's card; nothing if there is none, or none that is YAML.

    What a card says changes nothing that the model computes, so that a damaged one is passed over.
    """
    if files.find(FILE) is None:
        return {}
    try:
        lines = files.read_all(FILE, LIMIT).decode().splitlines()
    except (BadCheckpoint, UnicodeDecodeError):
        return {}
    if not lines or lines[0] != "---":
        return {}
    end = next((at for at, line in enumerate(lines[1:], 1) if line == "---"), len(lines))
    front = "\n".join(lines[1:end]) + "\n"
    # Norwegian's `no` is a language here, and tabs are no indentation of YAML.
    front = front.replace("- no\n", '- "no"\n').replace("\t", "  ")
    if len(front) > LONGEST:
        return {}
    try:
        found = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card_metadata(
    card: Mapping[str, Any],
    config: Mapping[str, Any],
    model: str,
    tensors: Sequence[tuple[str, Sequence[int]]],
) -> dict[str, MetadataValue]:
    """Return general.* but the architecture and how tensors are stored. `model` is the model's name, a folder's."""
    label, total = size_label(tensors)
    told = {key: value for key, names in CARD.items() if (value := _first(card, names)) is not None}
    path = config.get("_name_or_path")
    sources = [path] if isinstance(path, str) and path and path.count("/") <= 1 else []  # else a path of a computer
    for source in (*sources, model):
        parts = name_parts(source, total)
        if parts.name:
            told.setdefault("name", title(parts.name))
        for key in PARTS:
            value = getattr(parts, key)
            if value is not None:
                told.setdefault(key, title(value) if key == "organization" else value)
    if label is not None:
        told.setdefault("size_label", label)
    found = {f"general.{key}": text(value) for key, value in told.items()}
    found.setdefault("general.name", text(model))
    for key, names in LISTS.items():
        values = [each for name in names for each in _texts(card.get(name))]
        if any(card.get(name) is not None for name in names):
            found[f"general.{key}"] = texts(values)
    for key, keys in SOURCES.items():
        if any(name in card for name in keys):
            listed = next(card[name] for name in keys if name in card)
            rows = [_source(each, total) for each in (listed if isinstance(listed, list) else [listed])]
            found |= _numbered(key, [row for row in rows if row is not None])
    return found


def _first(card: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of a card's values that is a text; a list of licenses is one text, too."""
    for name in names:
        value = card.get(name)
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return ",".join(value)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    return None


def _texts(value: Any) -> Iterator[str]:
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str | int | float):
            yield str(each)


def _source(told: Any, parameters: int) -> dict[str, str] | None:
    """Return what is known of a model or a set of data by its name, its URL, or a table of it."""
    if isinstance(told, Mapping):
        return {key: str(told[key]) for key in SOURCE_KEYS if isinstance(told.get(key), str | int | float)}
    if not isinstance(told, str):
        return None
    made: dict[str, str] = {}
    parts = NameParts()
    if told.startswith(URL):
        made["repo_url"] = told
        match = HUGGING_FACE.match(told)
        parts = name_parts(match[1], parameters) if match else parts
    else:
        parts = name_parts(told, parameters)
        if parts.organization and parts.name:
            made["repo_url"] = f"https://huggingface.co/{parts.organization}/{parts.name}"
    if parts.name:
        made["name"] = title(parts.name)
    if parts.organization:
        made["organization"] = title(parts.organization)
    return made | ({"version": parts.version} if parts.version else {})


def _numbered(key: str, rows: Sequence[Mapping[str, str]]) -> dict[str, MetadataValue]:
    """Return a list of tables as a GGUF has it: a count, and keys with the number of each."""
    found = {f"general.{key}.count": uint32(len(rows))}
    for number, row in enumerate(rows):
        found |= {f"general.{key}.{number}.{name}": text(value) for name, value in row.items()}
    return found
