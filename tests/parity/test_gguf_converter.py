"""Held against llama.cpp's converter: every tensor and every key of a tiny model of each type; llama.cpp runs it.

What the converter makes is in tests/goldens/gguf; see tests/converter.py. The keys of general and of the tokenizer are
held by the tests of tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from loaders.architectures.gguf import architecture_of
from tests import tiny_models
from tests.gguf_goldens import differences, golden_path, summary
from tests.llama_log import load_model
from tests.tiny_configs import ROWS

pytestmark = pytest.mark.engine

ELSEWHERE = ("general.", "tokenizer.")
# Keys that are written where the converter writes none, each with the reason.
MORE = {
    "attention.key_length": "what llama.cpp takes without it may be another number",
    "attention.value_length": "what llama.cpp takes without it may be another number",
    "attention.sliding_window": "llama.cpp ignores Mistral's, which is not lost this way",
    "attention.sliding_window_pattern": "llama.cpp takes another one for Gemma without it",
    "rope.freq_base": "llama.cpp takes 10000 for Gemma 1 and 2 without it",
    "attention.layer_norm_epsilon": "llama.cpp does not load ModernBERT without it, and the converter calls it another",
}
# Keys whose values are others than the converter's, each with the reason.
OTHER = {"phimoe.rope.scaling.attn_factor": "config.json says it, and the converter takes what follows from lengths"}
# Tensors whose bytes are not the converter's: of thousands of exponentials, some are torch's neighbours of ours.
OTHER_BYTES = {"jamba": ".ssm_a"}
KINDS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_moe",
    "gemma4_per_layer", "phi3", "phi3_long", "phimoe",
    "glm4", "glm4_moe", "glm_moe_dsa", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2",
    "kimi_k25", "dots1", "nemotron", "nemotron_h", "nemotron_h_dense", "minimax_m2", "minimax_m3_vl", "gpt_oss",
    "gpt_oss_mxfp4", "mistral3",
    "ministral3", "step3p7", "mimo_v2_flash", "lfm2", "lfm2_moe", "granite", "granitemoe", "granitemoehybrid",
    "olmo2", "olmo3", "olmo3_yarn", "olmoe", "smollm3", "cohere2", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense",
    "hunyuan_v1_alpha", "hunyuan_v1_moe", "exaone4", "exaone4_windows", "starcoder2", "seed_oss", "internlm2",
    "falcon_h1", "mamba2", "jamba", "llama4", "bert", "roberta", "xlm-roberta", "modernbert",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
NOT_RUN = ("deepseek_v2",)  # V2 Lite, which llama.cpp tells from V2 by its 27 layers


@pytest.fixture
def converted(tmp_path: Path, weightmill: Callable[..., Any]) -> Callable[[str], Path]:
    """A function that makes a tiny model of a type, and a GGUF of it with the converter's types."""

    def convert(kind: str) -> Path:
        # llama.cpp goes by a model's name for the tokens of Phi 3, which no tiny vocabulary has.
        model = tiny_models.make(kind, tmp_path / "tiny")
        ran = weightmill("run", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=gguf_bf16")
        assert ran.status == 0, ran.err
        [made] = (tmp_path / "out").glob("*.gguf")
        return Path(made)

    return convert


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_is_converted_as_by_llama_cpp(kind: str, converted: Callable[[str], Path]) -> None:
    golden = json.loads(golden_path(kind).read_text())
    made = converted(kind)
    architecture = architecture_of(json.loads((made.parent.parent / "tiny" / "config.json").read_text()))
    found = summary(made)
    assert OTHER.keys().isdisjoint(
        key for key, value in found["metadata"].items() if golden["metadata"].get(key) == value
    )
    for part in (golden["metadata"], found["metadata"]):
        for key in [key for key in part if key.startswith(ELSEWHERE) or key in OTHER]:
            del part[key]
    for name, row in golden["tensors"].items():
        if kind in OTHER_BYTES and name.endswith(OTHER_BYTES[kind]):
            found["tensors"][name][2] = row[2]
    for key in MORE:
        if f"{architecture.name}.{key}" not in golden["metadata"]:
            found["metadata"].pop(f"{architecture.name}.{key}", None)
    assert differences(golden, found) == []
    if kind in ENCODERS:
        assert_embeds(made)
    elif kind not in NOT_RUN:
        assert_runs(made)


def test_what_a_quantized_source_decodes_to_is_in_the_same_form(tmp_path: Path, weightmill: Callable[..., Any]) -> None:
    """Heads in another order, parts of a tensor and stacks, decoded on the way and before it."""
    tiny_models.make("qwen3_5_moe", tmp_path / "tiny")

    def run(source: str, name: str, *settings: str) -> Path:
        arguments = [f"model.path={tmp_path / source}", f"output.path={tmp_path / name}", *settings]
        ran = weightmill("run", *arguments)
        assert ran.status == 0, ran.err
        return tmp_path / name

    run("tiny", "nf4", "quant=nf4")
    # What is not quantized stays as it is: the logarithms of decay are float32.
    run("nf4", "plain", "quant=none", "quant.dtype=bfloat16", "rules=[{name: 'A_log|attn.norm', action: keep}]")
    [made], [wanted] = (run(each, f"of_{each}", "quant=gguf_bf16").glob("*.gguf") for each in ("nf4", "plain"))
    assert summary(made)["tensors"] == summary(wanted)["tensors"]


def test_a_mix_is_chosen_where_tensors_are_in_parts(tmp_path: Path, weightmill: Callable[..., Any]) -> None:
    model = tiny_models.make("qwen3_5", tmp_path / "tiny")
    ran = weightmill(
        "run", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=auto", "quant.engine=gguf",
        "quant.target_bits=8.5",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    [made] = (tmp_path / "out").glob("*.gguf")
    assert_runs(made)


def assert_runs(file: Path) -> None:
    """Load a file in llama.cpp, where it is installed, and compute finite logits that differ from token to token."""
    model = load_model(file, n_ctx=64, n_batch=64, logits_all=True)
    model.eval([5, 77, 200, 3, 150, 31, 8, 260])
    logits = np.array(model.scores[:8])
    model.close()
    assert logits.shape == (8, ROWS)
    assert np.isfinite(logits).all()
    assert len(np.unique(logits.argmax(1))) > 1


def assert_embeds(file: Path) -> None:
    """Load an encoder in llama.cpp, where it is installed, and compute finite vectors that differ from text to text."""
    model = load_model(file, n_ctx=64, embedding=True, pooling_type=1)
    found = np.array([model.embed(text) for text in ("a", "the other")])
    model.close()
    assert found.shape == (2, 64)
    assert np.isfinite(found).all()
    assert not np.allclose(found[0], found[1])
