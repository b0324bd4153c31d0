"""Each model_type that goes to mlx-lm: our plain output computes what transformers does, and quantizes to our codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.errors import BadSpec
from tests import passes
from tests.engines import mlx_lm_or_skip
from tests.making import read_safetensors

mx = pytest.importorskip("mlx.core")
mlx_utils = mlx_lm_or_skip()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
MOE: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 64}
GEMMA3: dict[str, Any] = {
    "head_dim": 32, "layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}},
}  # fmt: skip
MLA: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 64,
    "v_head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4, "topk_method": "greedy",
    **MOE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
    "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "attention_bias": False,
}  # fmt: skip


def causal(prefix: str, **extra: Any) -> Any:
    name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, name)(**{**SIZES, **extra}))


def gemma3() -> Any:
    config = transformers.Gemma3Config(text_config={**SIZES, **GEMMA3}, mm_tokens_per_image=4,
                                       vision_config={**VISION, "vision_use_head": False})  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def llama4() -> Any:
    sizes = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config={**SIZES, **LLAMA4}, vision_config={**VISION, **sizes})
    return transformers.Llama4ForConditionalGeneration(config)


MODELS: dict[str, Any] = {
    "gemma": lambda: causal("Gemma", head_dim=32),
    "gemma2": lambda: causal("Gemma2", head_dim=32, query_pre_attn_scalar=32),
    "gemma3_text": lambda: causal("Gemma3", **GEMMA3),
    "gemma3": gemma3,
    "phi3": lambda: causal("Phi3"),
    "qwen2_moe": lambda: causal("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=64, **MOE),
    "deepseek_v2": lambda: causal("DeepseekV2", **MLA),
    "gpt_oss": lambda: causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, rope_parameters=YARN),
    "llama4": llama4,
}


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("sources")

    def source(kind: str) -> Path:
        if not (root / kind).exists():
            torch.manual_seed(0)
            model = MODELS[kind]()
            for parameter in model.parameters():
                parameter.data = torch.randn_like(parameter) * 0.1
            model.save_pretrained(root / kind)
        return Path(root / kind)

    return source


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids)).astype(mx.float32))


@pytest.mark.parametrize("kind", MODELS)
def test_mlx_lm_computes_what_transformers_does_and_quantizes_to_our_bytes(
    kind: str, sources: Any, tmp_path: Path
) -> None:
    source, ids = sources(kind), np.arange(3, 20)[None]
    plain = passes.run(source, tmp_path, "none", settings=("output=mlx",))["none"].folder
    ours = passes.run(source, tmp_path, "mlx_int4")["mlx_int4"].folder
    peer, config = mlx_utils.load_model(plain)
    auto = (
        transformers.AutoModelForImageTextToText if kind in ("gemma3", "llama4") else transformers.AutoModelForCausalLM
    )
    with torch.no_grad():
        theirs = auto.from_pretrained(source).eval()(input_ids=torch.from_numpy(ids)).logits.numpy()
    found = logits(peer, ids)
    # float32 in other orders, and rope by other means
    assert np.abs(found - theirs).max() < 2e-3 * np.abs(theirs).max()
    peer, config = mlx_utils.quantize_model(peer, config, None, None)
    mlx_utils.save_model(tmp_path / "peer", peer)
    mine, wanted = read_safetensors(ours), read_safetensors(tmp_path / "peer")
    assert set(mine) == set(wanted)
    for name, raw in wanted.items():
        assert (mine[name].dtype, mine[name].data.shape) == (raw.dtype, raw.data.shape), name
        assert mine[name].data.tobytes() == raw.data.tobytes(), name
    loaded, _ = mlx_utils.load_model(ours)
    assert np.array_equal(logits(loaded, ids), logits(peer, ids))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_moe", "deepseek_v2", "gpt_oss", "llama4"])
def test_it_is_read_again(kind: str, sources: Any, tmp_path: Path) -> None:
    """MLX again, from MLX: the same plain weights, expert by expert, biases too."""
    plain = passes.run(sources(kind), tmp_path / "a", "none", settings=("output=mlx",))["none"]
    again = passes.run(plain.folder, tmp_path / "b", "none", settings=("output=mlx",))["none"]
    assert again.tensors == plain.tensors
    quantized = passes.run(plain.folder, tmp_path / "c", "mlx_int8")["mlx_int8"]
    assert quantized.tensors == passes.run(sources(kind), tmp_path / "d", "mlx_int8")["mlx_int8"].tensors
    assert (
        passes.run(quantized.folder, tmp_path / "e", "mlx_int4")["mlx_int4"].tensors.keys() == quantized.tensors.keys()
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "attends fully in every layer whose number sliding_window_pattern divides, not as layer_types says",
        ),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "has experts in every layer; this model does not"),
        (
            "deepseek_v2",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            "fails without a rope scaling",
        ),
        ("phi3", {"head_dim": 8}, "head_dim is 8, but mlx-lm's phi3 takes"),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(
    kind: str, changes: dict[str, Any], message: str, sources: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(sources(kind) / "model.safetensors")
    config = json.loads((sources(kind) / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadSpec, match=message):
        passes.plan(model, "mlx_int4")


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_experts_one_by_one_do_not_go_back_to_transformers(kind: str, sources: Any, tmp_path: Path) -> None:
    plain = passes.run(sources(kind), tmp_path / "a", "mlx_int8")["mlx_int8"]
    with pytest.raises(BadSpec, match="holds experts in stacks, and this source has them one by one"):
        passes.plan(plain.folder, "none", settings=("quant.dtype=bfloat16",))
    assert passes.run(plain.folder, tmp_path / "b", "w8a8")["w8a8"].tensors
