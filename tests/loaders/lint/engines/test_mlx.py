"""Planned files held against mlx-lm's own class."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.lint.engines.base import Question, Unanswerable
from loaders.lint.engines.mlx import check
from tests.engines import mlx_lm_or_skip

mlx_lm_or_skip()
pytestmark = pytest.mark.engine

BLOCK = {"group_size": 64, "bits": 4, "mode": "affine"}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "quantization": BLOCK,
}  # fmt: skip
LAYER = "model.layers.0."
MATRICES = {
    "model.embed_tokens": (128, 64), f"{LAYER}mlp.gate_proj": (128, 64), f"{LAYER}mlp.up_proj": (128, 64),
    f"{LAYER}mlp.down_proj": (64, 128), **{f"{LAYER}self_attn.{part}_proj": (64, 64) for part in "qkvo"},
}  # fmt: skip
NORMS = ("model.norm", f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm")


def stored() -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {f"{norm}.weight": ("BF16", (64,)) for norm in NORMS}
    for name, (rows, columns) in MATRICES.items():
        found[f"{name}.weight"] = ("U32", (rows, columns // 8))
        found |= {f"{name}.{part}": ("BF16", (rows, columns // 64)) for part in ("scales", "biases")}
    return found


def test_what_mlx_lm_makes_itself_has_no_findings() -> None:
    answer = check(Question("mlx", CONFIG, (), stored()), "mlx-lm")
    assert answer.findings == ()
    assert answer.share == 1


def test_names_and_shapes_of_other_classes_are_faults() -> None:
    found = stored()
    for part in ("weight", "scales", "biases"):
        found[f"embed_tokens.{part}"] = found.pop(f"model.embed_tokens.{part}")
    found["model.norm.weight"] = ("BF16", (32,))
    said = " | ".join(finding.what for finding in check(Question("mlx", CONFIG, (), found), "mlx-lm").faults)
    assert "not stored: model.embed_tokens.weight" in said
    assert "another shape than the class has: model.norm.weight" in said
    assert "no parameters of the class: embed_tokens.weight" in said


def test_what_its_own_code_raises_is_a_fault() -> None:
    found = stored()
    del found["model.embed_tokens.weight"]
    [fault] = check(Question("mlx", CONFIG, (), found), "mlx-lm").faults
    assert "raises KeyError" in fault.what


def test_a_model_that_it_does_not_have_is_not_judged() -> None:
    with pytest.raises(Unanswerable, match="nobody not supported"):
        check(Question("mlx", {**CONFIG, "model_type": "nobody"}, (), {}), "mlx-lm")
