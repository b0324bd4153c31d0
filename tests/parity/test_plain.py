"""Checkpoints that are not quantized: transformers loads the copy and computes what it does from the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.engine


def causal(prefix: str = "Llama", **extra: Any) -> Any:
    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, **extra,
    }  # fmt: skip
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**config))


MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: causal(tie_word_embeddings=True),
    "untied": causal,
    "odd sizes": lambda: causal(hidden_size=50, intermediate_size=33, num_attention_heads=5, num_key_value_heads=5),
    "qwen3 moe": lambda: causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
}


@pytest.mark.parametrize("model", sorted(MODELS))
def test_transformers_computes_the_same_from_a_cast_copy(model: str, tmp_path: Path, weightmill: Any) -> None:
    torch.manual_seed(0)
    MODELS[model]().to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="40KB")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=none",
        "quant.dtype=float16",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    load, ids = transformers.AutoModelForCausalLM.from_pretrained, torch.arange(1, 20)[None]
    peer = load(tmp_path / "source", dtype=torch.float16)
    ours, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ours.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, peer(input_ids=ids).logits)
