"""What a GGUF says of its model: rows of heads in its order, and how its tokenizer cuts words."""

from __future__ import annotations

import numpy as np
import pytest

from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.layouts.gguf.tokenizers.pre_tokenizers import pre_name
from loaders.specs import RowOrder, TensorSpec
from loaders.tensors.views import ReorderedView
from tests.encoding import MemoryView
from tests.making import Raw


@pytest.mark.parametrize("inverse", [False, True])
def test_rows_of_heads_are_taken_as_reshape_and_swap_take_them(inverse: bool) -> None:
    values = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    swapped = values.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    stored, wanted = (swapped, values) if inverse else (values, swapped)
    view = ReorderedView(MemoryView(Raw("F32", stored)), RowOrder(8, inverse))
    assert view.spec == TensorSpec("w.weight", DTYPES["F32"], (24, 5))
    for start, stop in ((0, 120), (3, 7), (39, 41), (80, 120)):
        assert np.array_equal(view.read(start, stop), wanted.reshape(-1)[start:stop])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(regex: str | None, **model: object) -> dict[str, object]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex is None}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    steps = last if regex is None else {"type": "Sequence", "pretokenizers": [split, last]}
    return {"model": {"type": "BPE", "vocab": {}, **model}, "normalizer": None, "pre_tokenizer": steps}


def test_the_way_words_are_cut_has_a_name() -> None:
    assert pre_name(tokenizer(None)) == "gpt-2"
    assert pre_name(tokenizer(LLAMA3)) == "llama-bpe"
    assert pre_name(tokenizer(LLAMA3.replace("{1,3}", ""))) == "qwen2"


@pytest.mark.parametrize(("made", "message"), [
    (tokenizer(r"\w+"), r"it cuts words by .*\\\\w\+.*, which is no way that llama.cpp is known to have"),
    ({"model": {"type": "WordPiece"}}, "its model is WordPiece"),
    ({"version": "1.0"}, "its model is none"),
    ({**tokenizer(None), "normalizer": {"type": "Lowercase"}}, "its normalizer .*Lowercase"),
])  # fmt: skip
def test_what_llama_cpp_could_not_be_told_of_is_refused(made: dict[str, object], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        pre_name(made)
