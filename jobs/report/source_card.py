"""The source's own model card: its metadata, as far as it holds for a quantized model too, and its text.

The card is a stranger's file. Whatever is in it, reading it is no error: what cannot be parsed is kept as text, and a
note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from jobs.output.card_block import CARD, FENCE, around_block
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.words import size

LIMIT = 4 << 20  # bytes of a card that is taken over
FRONT_LIMIT = 1 << 16  # characters of front matter that are parsed
LONGEST, MOST = 1000, 500  # characters of a value, and values in a list
# Keys of the Hub whose values hold for the output as well. Others are the source's own: its evaluation results (they
# were measured on other weights), its gate, its widget.
TAKEN = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag", "base_model",
         "base_model_relation")  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NOTHING = ("", "~", "null")  # YAML's empty values, as texts
Value = str | list[str]


@dataclass(frozen=True, slots=True)
class SourceCard:
    """A source's card: the metadata that is taken over, its text, and a note on what could not be read as meant."""

    metadata: Mapping[str, Value] = field(default_factory=dict)
    text: str = ""
    note: str | None = None


class _Texts(yaml.BaseLoader):
    """YAML as texts, lists and mappings: no tag of the file makes anything else, and nothing is repeated by aliases.

    So Norwegian's `no` stays a language, and a few bytes cannot stand for a gigabyte.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not followed")
        return super().compose_node(parent, index)


def source_card(checkpoint: Checkpoint) -> SourceCard:
    """Read a source's card; it is empty if there is none.

    Raises:
        BadCheckpoint: the card changed since the source was opened.
        StorageError: it cannot be read.
    """
    if CARD not in checkpoint.aux or (found := checkpoint.source.find(CARD)) is None:
        return SourceCard()
    if found.size > LIMIT:
        return SourceCard(note=f"it has {size(found.size)}, and is left out")
    return parsed(checkpoint.source.read_all(CARD, LIMIT))


def parsed(raw: bytes) -> SourceCard:
    """Take a card's metadata and text apart. What an earlier output of weightmill said in its block is left out."""
    text = raw.decode("utf-8-sig", "replace").replace("\r\n", "\n")
    note = None if text.encode() == raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n") else "it is not UTF-8"
    front, rest = _apart(text)
    metadata: Mapping[str, Value] = {}
    if front is not None:
        try:
            metadata = _metadata(front)
        except ValueError as error:
            rest, note = text, f"its metadata is kept as text: {error}"
    before, after = around_block(rest.encode())
    return SourceCard(metadata, (before.strip() + b"\n\n" + after.strip()).decode().strip(), note)


def _apart(text: str) -> tuple[str | None, str]:
    """Return the front matter, None if there is none, and the text after it."""
    lines = text.split("\n")
    if lines[0].rstrip() != FENCE:
        return None, text
    end = next((at for at, line in enumerate(lines[1:], 1) if line.rstrip() == FENCE), None)
    return (None, text) if end is None else ("\n".join(lines[1:end]), "\n".join(lines[end + 1 :]))


def _metadata(front: str) -> dict[str, Value]:
    """Parse front matter.

    Raises:
        ValueError: it is too long, not YAML, or no mapping.
    """
    if len(front) > FRONT_LIMIT:
        raise ValueError(f"{len(front)} characters, at most {FRONT_LIMIT} are parsed")
    try:
        found = yaml.load(front, _Texts)  # noqa: S506, a loader that makes nothing but texts, lists and mappings
    except (yaml.YAMLError, RecursionError):
        raise ValueError("it is not YAML, or has aliases") from None
    if found in NOTHING or found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")
    taken = {key: value for key in TAKEN if (value := _value(found.get(key))) is not None}
    # A path of the machine that trained a model stands here in many cards, and the Hub refuses it.
    bases = [each for each in _list(taken.get("base_model", [])) if HUB_ID.fullmatch(each)]
    return taken | {"base_model": bases[0] if len(bases) == 1 else bases} if bases else _without_base(taken)


def _without_base(taken: Mapping[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in taken.items() if not key.startswith("base_model")}


def _list(value: Value) -> list[str]:
    return [value] if isinstance(value, str) else value


def _value(found: Any) -> Value | None:
    """Return a text or a list of texts; None for anything else, or nothing."""
    if isinstance(found, str):
        return found if found not in NOTHING and len(found) <= LONGEST else None
    if isinstance(found, list):
        texts = [each for each in found if isinstance(each, str) and each not in NOTHING and len(each) <= LONGEST]
        return texts[:MOST] or None
    return None
