"""Held against transformers' bitnet: its packing, its loading, a simulation of its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("uncompiled")]

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def simulate(model: Any) -> None:
    """Each linear layer but the head by its definition: int8 activations per token, ternary weights."""

    def forward(self: Any, x: Any) -> Any:
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        quantized = (x * scale).round().clamp(-128, 127)
        mean = self.weight.float().abs().double().mean().float().clamp(min=1e-5)
        weight = (self.weight.float() * (1 / mean)).round().clamp(-1, 1)
        return (quantized.float() @ weight.T).to(x.dtype) / scale * mean.to(x.dtype)

    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            module.forward = forward.__get__(module)


def made(prefix: str = "Llama", **extra: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **extra})
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


MODELS: dict[str, Callable[[], Any]] = {
    "untied": made,
    "tied": lambda: made(tie_word_embeddings=True, num_hidden_layers=1),
    "odd sizes": lambda: made(hidden_size=60, intermediate_size=100, num_attention_heads=5, num_key_value_heads=5,
                              num_hidden_layers=1),
    "qwen3 moe": lambda: made("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16,
                              num_hidden_layers=1),
}  # fmt: skip
CASES = [
    *(("untied", dtype, linear_class) for dtype in (torch.float32, torch.bfloat16)
      for linear_class in ("bitlinear", "autobitlinear")),
    *((model, torch.float32, "bitlinear") for model in ("tied", "odd sizes", "qwen3 moe")),
]  # fmt: skip


@pytest.mark.parametrize(("model", "dtype", "linear_class"), CASES)
def test_the_engine_loads_and_runs_it(
    model: str, dtype: Any, linear_class: str, tmp_path: Path, weightmill: Any
) -> None:
    source = MODELS[model]().to(dtype)
    source.save_pretrained(tmp_path / "source")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=ternary",
        f"quant.linear_class={linear_class}",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block == {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    ids = torch.arange(1, 12)[None]
    simulate(source)
    with torch.no_grad():
        one = torch.log_softmax(loaded(input_ids=ids).logits.float(), -1)
        other = torch.log_softmax(source(input_ids=ids).logits.float(), -1)
    divergence = (other.exp() * (other - one)).sum(-1).mean()
    # float32: rounding alone; bfloat16: its eight bits, in another order of operations
    assert divergence < (1e-6 if dtype == torch.float32 else 1e-3)


def test_rows_are_packed_as_the_engine_unpacks_them(tmp_path: Path, weightmill: Any) -> None:
    from transformers.integrations.bitnet import pack_weights

    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    assert (
        weightmill(
            "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=ternary"
        ).status
        == 0
    )
    from tests.making import read_safetensors

    found = read_safetensors(tmp_path / "out")
    for name, weight in source.state_dict().items():
        if "_proj" in name:
            mean = weight.float().abs().double().mean().float().clamp(min=1e-5)
            wanted = pack_weights((weight.float() * (1 / mean)).round().clamp(-1, 1))
            assert np.array_equal(found[name].data, wanted.numpy()), name
