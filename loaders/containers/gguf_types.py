"""The types of a GGUF's metadata: looked at once, when a header is read, and trusted by everything that uses them.

llama.cpp takes a key of another type for none, or fails. Keys that nothing here reads may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.limits import CONFIG_LAYERS, CONFIG_NUMBER, shown

Check = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= CONFIG_NUMBER


def _is_layers(value: Any) -> bool:
    return type(value) is int and 0 <= value <= CONFIG_LAYERS


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (type(value) is float and not math.isnan(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _array(check: Check) -> Check:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _each(check: Check) -> Check:
    return lambda value: check(value) or _array(check)(value)


def _rows(check: Check, what: str, keys: str) -> Iterable[tuple[str, tuple[Check, str]]]:
    return ((key, (check, what)) for key in keys.split())


TOKENIZER = "tokenizer.ggml."
TYPES: dict[str, tuple[Check, str]] = dict(
    (
        *_rows(
            _is_text,
            "a text",
            f"general.architecture general.name tokenizer.chat_template {TOKENIZER}model {TOKENIZER}pre",
        ),
        *_rows(_array(_is_text), "an array of texts", f"{TOKENIZER}tokens {TOKENIZER}merges"),
        *_rows(_array(_is_number), "an array of numbers", f"{TOKENIZER}scores"),
        *_rows(_array(_is_whole), "an array of whole numbers", f"{TOKENIZER}token_type"),
        *_rows(
            _is_flag,
            "true or false",
            f"{TOKENIZER}add_bos_token {TOKENIZER}add_eos_token {TOKENIZER}add_space_prefix"
            f" {TOKENIZER}remove_extra_whitespaces",
        ),
        *_rows(_is_whole, "a whole number", "split.no split.count split.tensors.count general.file_type"),
    )
)
# Of keys that begin with the architecture's name: what follows it.
OF_ARCHITECTURE: dict[str, tuple[Check, str]] = dict(
    (
        *_rows(_is_layers, f"a whole number from 0 to {CONFIG_LAYERS}", "block_count"),
        *_rows(_is_text, "a text", "rope.scaling.type"),
        *_rows(
            _each(_is_whole),
            "a whole number",
            """context_length embedding_length vocab_size feed_forward_length expert_count expert_used_count
            expert_feed_forward_length expert_shared_count attention.head_count attention.head_count_kv
            attention.key_length attention.value_length attention.sliding_window rope.dimension_count
            rope.scaling.original_context_length leading_dense_block_count""",
        ),
        *_rows(
            _each(_is_number),
            "a number",
            """attention.layer_norm_rms_epsilon attention.layer_norm_epsilon rope.freq_base rope.scaling.factor
            rope.scale_linear rope.scaling.attn_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast
            rope.scaling.yarn_beta_slow""",
        ),
    )
)


def check_metadata(values: Mapping[str, Any]) -> None:
    """Check the types of metadata's plain values; an array is a tuple.

    Raises:
        BadCheckpoint: one is of another type, or larger than anything in use.
    """
    begin = f"{values.get('general.architecture')}."
    for key, value in values.items():
        row = TYPES.get(key) or (OF_ARCHITECTURE.get(key.removeprefix(begin)) if key.startswith(begin) else None)
        if key.startswith(TOKENIZER) and key.endswith("_token_id"):
            row = _is_whole, "a whole number"
        if row is not None and not row[0](value):
            raise BadCheckpoint(f"expected {row[1]} as {shown(key)}, found {shown(value)}; fetch it again")
