"""Planned names held against transformers' own classes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("transformers")

from loaders.lint.engines.base import Answer, PlannedTensor, Question, Unanswerable
from loaders.lint.engines.transformers import Model, check, cleaned

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
TIED = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], **SIZES, "tie_word_embeddings": True}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **SIZES, "num_local_experts": 2}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4,
        "vocab_size": 64}  # fmt: skip
T5 = {"model_type": "t5", "architectures": ["T5EncoderModel"], "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
      "num_heads": 4, "vocab_size": 64}  # fmt: skip
IsQuantized = Callable[[str, tuple[int, ...]], bool]


def bitsandbytes(skip: list[str] | None) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip}


def compressed(ignore: list[str]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}},
            "ignore": ignore}  # fmt: skip


def linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(word in name for word in ("embed", "wte", "wpe", "shared", "lm_head", ".gate."))


def names_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The class's own names and shapes, without tied ones; a mixture's as they are published, expert by expert."""
    model = Model(cleaned(config), "plain")
    found = {n: tuple(v.shape) for n, v in model.state.items() if n not in model.tied and ".experts." not in n}
    for layer in range(2 if config is MIXTRAL else 0):
        for expert in range(2):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            found |= {f"{stem}w1.weight": (64, 32), f"{stem}w2.weight": (32, 64), f"{stem}w3.weight": (64, 32)}
    return found


def asked(config: Mapping[str, Any], block: Mapping[str, Any], is_quantized: IsQuantized = linear) -> Answer:
    tensors = [PlannedTensor(n, s, "quantize" if is_quantized(n, s) else "keep") for n, s in names_of(config).items()]
    engine = str(block["quant_method"])
    return check(Question(engine, {**config, "quantization_config": block}, tuple(tensors)), "transformers")


def said(answer: Answer) -> str:
    return " | ".join(f"{finding.level}: {finding.what}" for finding in answer.findings)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (LLAMA, bitsandbytes(None)),
        (LLAMA, bitsandbytes(["lm_head"])),
        (TIED, bitsandbytes(None)),
        (TIED, compressed(["lm_head"])),
        (LLAMA, compressed(["re:.*lm_head"])),
    ],
)
def test_what_the_loader_expects_has_no_findings(config: Mapping[str, Any], block: Mapping[str, Any]) -> None:
    answer = asked(config, block)
    assert answer.findings == ()
    assert answer.share == 1


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("config", "block", "is_quantized", "fault"),
    [
        # A list given replaces transformers' own, which leaves out a tied head.
        (TIED, bitsandbytes([]), linear, "not stored (tied, or missing)"),
        (TIED, compressed([]), linear, "not stored (tied, or missing)"),
        (LLAMA, bitsandbytes(None), lambda n, s: linear(n, s) and n != QUERY, "stored plain, and not named"),
        (LLAMA, compressed(["lm_head"]), lambda n, s: linear(n, s) and n != QUERY, "stored plain, and not named"),
        (LLAMA, bitsandbytes(["lm_head", "q_proj"]), linear, "the class has no linear layer or the loader skips it"),
        (LLAMA, bitsandbytes(None), lambda n, s: linear(n, s) or "embed" in n, "the class has no linear layer"),
        (GPT2, bitsandbytes(None), linear, "quantized as [outputs, inputs], where the class has [inputs, outputs]"),
        (T5, compressed([]), lambda n, s: linear(n, s) and "bias" not in n, "keeps its weights in float32"),
    ],
)  # fmt: skip
def test_what_it_does_not_expect_is_a_fault(
    config: Mapping[str, Any], block: Mapping[str, Any], is_quantized: IsQuantized, fault: str
) -> None:
    assert any(fault in found.what for found in asked(config, block, is_quantized).faults)


def test_an_expert_is_known_by_the_classs_own_map_of_names() -> None:
    found = asked(MIXTRAL, bitsandbytes(None), lambda n, s: linear(n, s) and "experts" not in n)
    assert found.findings == ()
    found = asked(MIXTRAL, bitsandbytes(None))
    assert "fault: quantized, where the class fuses or splits what is stored" in said(found)
    found = asked(MIXTRAL, compressed(["lm_head"]))
    assert found.findings == ()
    assert found.share == 1


def test_a_dropped_parameter_and_another_shape_are_faults() -> None:
    names = names_of(LLAMA) | {QUERY: (32, 64)}
    norm = "model.norm.weight"
    tensors = [PlannedTensor(n, s, "drop" if n == norm else "quantize" if linear(n, s) else "keep")
               for n, s in names.items()]  # fmt: skip
    block = bitsandbytes(None)
    answer = check(Question("bitsandbytes", {**LLAMA, "quantization_config": block}, tuple(tensors)), "")
    assert said(answer) == (
        f"fault: dropped, and parameters of the class: {norm} | fault: of another shape than in the class:"
        " model.layers.#.self_attn.q_proj.weight"
    )


def test_what_most_of_a_recipe_leaves_out_is_remarkable() -> None:
    answer = asked(LLAMA, compressed([r"re:.*layers\.0\."]), lambda n, s: linear(n, s) and "layers.0" not in n)
    assert answer.share == 0.5
    assert "50% of the weights" in said(answer)


def test_config_json_names_no_code() -> None:
    config = {**LLAMA, "auto_map": {"AutoConfig": "evil.Config"}, "_attn_implementation": "someone/kernel",
              "text_config": {"auto_map": {}, "hidden_size": 32}}  # fmt: skip
    assert cleaned(config) == {**LLAMA, "text_config": {"hidden_size": 32}}
    with pytest.raises(Unanswerable, match="no class of its own for model_type 'evil'"):
        Model(cleaned({**config, "model_type": "evil", "architectures": ["LlamaForCausalLM"]}), "bitsandbytes")
