"""What llama.cpp's converter does for the tokenizers of some model types: tokenizers.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from loaders.tables import table

TRAITS_FILE = Path(__file__).with_name("tokenizers.yaml")
# Added tokens that the converter takes as control tokens whatever their files say (does_token_look_special).
ALSO_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is special of a model type's tokenizer in a GGUF.

    kind: "gemma4" for a BPE over text with ▁ for spaces that llama.cpp has under this name; else what the files say.
    tells_prefix: add_prefix_space of tokenizer_config.json is told whatever kind the tokenizer is.
    adds_prefix: whether a space goes before a text, told even if it follows from the files; None for what they say.
    adds_prefix_of_json: the same where there is a tokenizer.json alone.
    no_bos_with: a number of rows with which no bos is put before a text.
    tokens: the texts of special tokens by their name in a GGUF, for those that other files do not tell.
    ids: the numbers of special tokens by their name in a GGUF.
    as_told: added tokens are special as their files say, not by their looks.
    unused: how tokens begin that SentencePiece has as normal ones, and that are not used.
    end_of_chat: the token that ends a text where it is there.
    end_of_document: config.json's eod_token_id is what ends a text.
    counts_token_types: type_vocab_size is told.
    """

    kind: str = ""
    tells_prefix: bool = False
    adds_prefix: bool | None = None
    adds_prefix_of_json: bool | None = None
    no_bos_with: int = 0
    tokens: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    as_told: bool = False
    unused: str = ""
    end_of_chat: str = ""
    end_of_document: bool = False
    counts_token_types: bool = False


@cache
def _table() -> Mapping[str, Traits]:
    found: dict[str, Traits] = {}
    for row in table(TRAITS_FILE):
        traits = Traits(**{key: value for key, value in row.items() if key != "model_types"})
        found |= dict.fromkeys(row["model_types"], traits)
    return found


def traits_of(config: Mapping[str, Any]) -> Traits:
    """Return the traits of a config.json's model type."""
    model_type = config.get("model_type")
    return _table().get(model_type, Traits()) if isinstance(model_type, str) else Traits()


def looks_special(token: str) -> bool:
    """Whether the converter takes an added token for a control token by its looks."""
    return token in ALSO_SPECIAL or LOOKS_SPECIAL.fullmatch(token) is not None
