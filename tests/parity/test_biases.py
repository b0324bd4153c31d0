"""The table of biases is that of transformers' classes."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures.biases import ROWS, has_bias

TYPES = [model_type for row in ROWS for model_type in row.model_types if model_type != "qwen"]
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_a_layer_has_the_bias_that_the_table_says(model_type: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    said = config.to_dict()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert len(layers) > 4
    assert {name for name, each in layers.items() if each.bias is not None} == {n for n in layers if has_bias(said, n)}
