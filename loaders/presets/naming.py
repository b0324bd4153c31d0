"""How the settings of a quantization that its preset does not have appear in the name of an output: "g128-dq"."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from loaders.dtypes import DTYPES
from loaders.presets.auto import AutoQuant
from loaders.presets.catalog import preset_values
from loaders.presets.settings import Quant
from loaders.rules.candidates import AMONG
from loaders.storage.address import Address
from loaders.storage.hashes import text_digest

LONGEST = 48  # characters of all words: the Hub's names have 96, with the model and the preset
DTYPE_WORDS = {dtype.torch: dtype.name.lower() for dtype in DTYPES.values()}
# Settings whose values say what they are. The name of the others stands before the value.
BY_VALUE = ("dtype", "table", "linear_class", "preset", "mode", "recipe", "file_type", "type", "engine")
SHORT = {"double_quant": "dq"}  # settings that are true or false
MATRIX_SUFFIX = re.compile(r"(?:\.imatrix|\.gguf|\.dat)+$")
# Settings with a word of their own; the value is none that is false or null.
WORDS: Mapping[str, Callable[[Any], str]] = {
    "group_size": lambda size: f"g{size}",
    "bits": lambda bits: f"b{bits}",
    "target_bits": lambda bits: f"{bits:g}bits",
    "target_gb": lambda size: f"{size:g}gb",
    "among": "-".join,
    "calibration": lambda text: f"by-{PurePath(text).stem}",
    "imatrix": lambda file: f"by-{MATRIX_SUFFIX.sub('', Address.of(file).name)}",
    "calibration_tokens": lambda count: f"{count}tokens",
}


def words_of(quant: Quant, named: Collection[str] = ()) -> list[str]:
    """Return the words for what a quantization has that its preset has not, and for the settings `named`.

    A preset of the user's own is not known here; its words are those of `named`.
    """
    base, values = preset_values(quant.name), quant.model_dump()
    if isinstance(quant, AutoQuant):
        # The engine's usual candidates are no choice of the user's.
        values["among"] = [] if tuple(quant.among) == AMONG.get(str(quant.engine)) else list(quant.among)
    changed = [key for key, value in values.items() if key in named or (base is not None and value != base.get(key))]
    return [word_of(key, values[key]) for key in changed if key not in ("name", "kind", "chosen")]


def word_of(key: str, value: Any) -> str:
    """Return the word for one setting: "g128" for a group_size of 128."""
    if key in WORDS and value:
        return WORDS[key](value)
    if key.endswith("_dtype") and value:
        return f"{key.removesuffix('_dtype')}_{DTYPE_WORDS.get(value, value)}"
    if isinstance(value, bool) or value is None:
        return SHORT.get(key, key) if value else f"no-{SHORT.get(key, key)}"
    text = DTYPE_WORDS.get(value, value) if isinstance(value, str) else value
    return f"{text}" if key in BY_VALUE else f"{key}-{text}"


def joined(words: Iterable[str]) -> str:
    """Join words to the end of a name, "-g128-dq", in characters that names on the Hub may have; empty without any."""
    plain = (re.sub(r"[^A-Za-z0-9_.]+", "-", word) for word in words)
    text = "-".join(dict.fromkeys(part for word in plain if (part := re.sub(r"([-.])[-.]+", r"\1", word).strip("-."))))
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 7].rstrip('-.')}-{text_digest(text)[:6]}"
    return f"-{text}" if text else ""
