"""What lint says of the keys of encoders' GGUFs, and what loads such files."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.report import loading
from loaders.lint.gguf import _sizes

NEEDED = ("context_length", "embedding_length", "block_count")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert", []),
        ("nomic-bert", ["rope.freq_base"]),
        ("gpt2", ["attention.head_count_kv"]),
        ("llama", ["rope.freq_base", "attention.head_count_kv"]),
    ],
)
def test_keys_that_an_architecture_does_not_read_are_not_missed(name: str, said: list[str]) -> None:
    found = [*_sizes(name, {f"{name}.{key}": 1 for key in NEEDED}, {}, is_read=False)]
    assert [each.what for each in found] == [f"the metadata does not say {name}.{key}" for key in said]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("architecture", "program"), [("BertModel", "llama-embedding"), ("LlamaForCausalLM", "llama-cli")]
)
def test_an_encoder_is_loaded_by_what_embeds(architecture: str, program: str) -> None:
    subject: Any = SimpleNamespace(
        where="DIR",
        config={"architectures": [architecture]},
        target=SimpleNamespace(assembly=None, finals=[SimpleNamespace(name="m.gguf")]),
    )
    make: Callable[[Any], loading.Loading] = loading.BY_LAYOUT["gguf"]
    assert f"# in a shell: {program} -m DIR/m.gguf -p Hello" in make(subject).code
