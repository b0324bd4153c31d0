"""The special tokens of a tokenizer, and whether encoding puts them around a text, from transformers' files.

It follows gguf-py's SpecialVocab (gguf/vocab.py), with these differences: a token's name counts wherever the vocabulary
has it, and its flags do not matter; the settings add_bos_token and add_eos_token come before the post_processor where
tokenizer_class is one that heeds them; and no bos is told where llama.cpp would add one by default and nothing says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders.containers.gguf import MetadataValue, boolean, uint32

GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")  # classes of transformers that add nothing by themselves
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# transformers' name of a role -> llama.cpp's (misspelled there); a GGUF has no place for cls
KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot",
    "eom": "eom",
}  # fmt: skip


@dataclass(slots=True)
class Special:
    """Special tokens: their texts by transformers' role, and which are put around a text."""

    names: dict[str, str] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)


def content_of(token: Any) -> str | None:
    """Return the text of a token, which may be given with its flags; None for what is no token."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def read_special(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> Special:
    """Read the special tokens from tokenizer.json (which may be empty) and tokenizer_config.json."""
    told = {role: content_of(settings.get(f"{role}_token")) for role in ROLES}
    made = Special({role: name for role, name in told.items() if name})
    if tokenizer:
        for role, other in (("bos", "cls"), ("eos", "sep")):
            if role not in made.names and other in made.names:
                made.names[role] = made.names[other]
    is_byte_level = False
    for step in processors(tokenizer):
        is_byte_level = is_byte_level or step.get("type") == "ByteLevel"
        if step.get("type") == "RobertaProcessing":
            made.adds |= {"bos": True, "eos": True, "sep": True}
            for role in ("cls", "sep"):
                made.names.setdefault(role, step[role][0])
        elif step.get("type") == "TemplateProcessing":
            _read_template(step, made)
    is_heeded = not str(settings.get("tokenizer_class", "Llama")).startswith(GENERIC)
    for role in ("bos", "eos", "sep"):
        said = settings.get(f"add_{role}_token")
        if isinstance(said, bool) and (is_heeded or not (role in made.adds or is_byte_level)):
            made.adds[role] = said
    if is_byte_level:
        made.adds = {"bos": False, "eos": False} | made.adds
    return made


def processors(tokenizer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the steps of a tokenizer.json's post_processor."""
    processor = tokenizer.get("post_processor") or {}
    found: Sequence[Mapping[str, Any]] = processor.get("processors", (processor,))
    return found


def _special(part: Mapping[str, Any]) -> str | None:
    return (part.get("SpecialToken") or {}).get("id")


def _read_template(step: Mapping[str, Any], made: Special) -> None:
    """Read the tokens that a template puts around a text, and between two texts."""
    single, names = list(step.get("single") or ()), made.names
    first, last = (_special(single[0]), _special(single[-1])) if len(single) > 1 else (None, None)
    if first:
        if first not in (names.get("bos"), names.get("cls")):
            names.setdefault("bos", first)
            names.setdefault("cls", first)
        made.adds["bos"] = first in (names.get("bos"), names.get("cls"))
    if last:
        if last != names.get("eos"):
            # What ended a text by name ends a turn, then; a GGUF holds both.
            if "eos" in names and "eot" not in names:
                names["eot"] = names["eos"]
            names["eos"] = last
        made.adds["eos"] = True
    pair = list(step.get("pair") or ())
    if pair and first and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special(pair[-1]) == last:
        pair = pair[:-1]
    if len(pair) > 2 and [(p.get("Sequence") or {}).get("id") for p in (pair[0], pair[-1])] == ["A", "B"]:
        between, ends = [_special(part) for part in pair[1:-1]], (names.get("sep"), names.get("eos"))
        adds = between[0] is not None and between[0] in ends and not last
        adds = adds or (len(between) == 2 and between[1] is not None and between[1] in ends)
        made.adds["sep"] = adds
        if adds and "sep" not in names and "eos" in names:
            names["sep"] = names["eos"]


def special_ids(
    special: Special, config: Mapping[str, Any], vocabulary: Mapping[str, int], rows: int
) -> dict[str, int]:
    """Return the ids of special tokens by llama.cpp's name of them.

    A name in tokenizer_config.json comes before the number in config.json, which may be a list, of which the first
    counts.
    """
    found: dict[str, int] = {}
    inner = config.get("text_config")
    for role, key in KEYS.items():
        number = vocabulary.get(special.names.get(role, ""))
        for part in (config, inner if isinstance(inner, Mapping) else {}):
            told = part.get(f"{role}_token_id")
            told = told[0] if isinstance(told, list) and told else told
            if number is None and type(told) is int and told >= 0:
                number = told
        if number is not None and number < rows:
            found[key] = number
    return found


def special_metadata(
    ids: Mapping[str, int],
    special: Special,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    bos_by_default: bool,
) -> dict[str, MetadataValue]:
    """Return GGUF's keys of special tokens.

    `bos_by_default`: llama.cpp puts bos before a text if nothing is said.
    """
    adds = dict(special.adds)
    # Where no file says it, LlamaTokenizer does what is llama.cpp's default: it adds bos, and no eos.
    says = tokenizer.get("post_processor") is not None or str(settings.get("tokenizer_class", "")).startswith(GENERIC)
    if bos_by_default and says:
        adds.setdefault("bos", False)
    return {
        **{f"tokenizer.ggml.{key}_token_id": uint32(number) for key, number in ids.items()},
        **{f"tokenizer.ggml.add_{role}_token": boolean(value) for role, value in adds.items()},
    }
