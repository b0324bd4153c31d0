"""Checks of MLX checkpoints, as mlx-lm reads them: its config keys, settings that agree, files that it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loaders.lint.base import Finding, Subject, fault, some, warning
from loaders.words import counted

ENGINE = "mlx-lm"
# Of mlx_lm 0.32: the model types whose classes read rope_parameters themselves, and the rope_theta that others take
# where config.json has none at its top.
READ_PARAMETERS = (
    "exaone_moe", "gemma4", "gemma4_text", "glm_moe_dsa", "granitemoehybrid", "lfm2", "lfm2_moe", "minimax_m3_vl",
    "ministral3", "mistral4", "olmo_hybrid", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_text",
)  # fmt: skip
USUAL_THETA = {
    **dict.fromkeys((
        "gemma", "gemma2", "glm", "hunyuan_v1_dense", "internlm2", "internlm3", "llama", "mistral", "olmo", "olmo2",
        "olmoe", "phi", "phi3", "phimoe", "plamo", "seed_oss", "bitnet", "deepseek", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "kimi_k2", "mimo", "nemotron", "step3p5",
    ), 10_000),
    **dict.fromkeys((
        "gemma3_text", "glm4_moe_lite", "minicpm", "minicpm3", "mixtral", "qwen2", "qwen2_moe",
    ), 1_000_000),
    "cohere": 8_000_000, "cohere2": 50_000, "falcon_h1": 100_000_000_000, "gpt_oss": 150_000, "starcoder2": 100_000,
}  # fmt: skip
FILES = "model"  # mlx-lm reads every model*.safetensors, and no other file


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that mlx-lm would have."""
    config, names = subject.config, subject.by_name
    yield from _config(config)
    strange = [tag.name for tag in subject.checkpoint.files if not tag.name.startswith(FILES)]
    if strange:
        yield fault(
            ENGINE, f"weight files not called model*.safetensors: {some(strange)}", "does not read them", "rename"
        )
    bare = [name for name in names if name.endswith(".scales") and name.removesuffix("scales") + "weight" not in names]
    if bare:
        yield fault(
            ENGINE,
            f"{counted(len(bare), 'tensor of scales', 'tensors of scales')} without a weight: {some(bare)}",
            "fails",
            "fetch the checkpoint again",
        )
    block = config.get("quantization")
    if isinstance(block, Mapping):
        modules = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
        stale = [key for key, value in block.items() if isinstance(value, Mapping) and key not in modules]
        if stale:
            yield warning(
                ENGINE,
                f"quantization names {counted(len(stale), 'module that is', 'modules that are')} stored plain:"
                f" {some(stale)}",
                "makes quantized modules of them and finds no scales",
                "remove them from quantization, or set them to false",
            )


def _config(config: Mapping[str, Any]) -> Iterator[Finding]:
    quantized = isinstance(config.get("quantization_config"), Mapping)
    if quantized and not isinstance(config.get("quantization"), Mapping):
        yield fault(
            ENGINE,
            "config.json has quantization_config and no quantization",
            "fails with a KeyError",
            "write the same block under quantization, too",
        )
    if "tie_word_embeddings" not in config:
        yield warning(
            ENGINE,
            "config.json does not say tie_word_embeddings",
            "takes it for true in some models, where transformers takes it for false",
            "write it",
        )
    yield from _rope(config)


def _rope(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that mlx-lm finds the base of rotary embeddings, which transformers 5 writes into rope_parameters."""
    text = config.get("text_config")
    at = text if isinstance(text, Mapping) and isinstance(text.get("rope_parameters"), Mapping) else config
    rope, model_type = at.get("rope_parameters"), str(at.get("model_type") or config.get("model_type"))
    if "rope_theta" in at or not isinstance(rope, Mapping) or model_type in READ_PARAMETERS:
        return
    usual, theta = USUAL_THETA.get(model_type), rope.get("rope_theta")
    if usual is not None and theta in (usual, None):
        return
    yield fault(
        ENGINE,
        "rope_theta stands in rope_parameters only, as transformers 5 writes it",
        "fails, or uses another" if usual is None else f"silently uses {usual} where the model has {theta}",
        "write rope_theta at the top of config.json, too",
    )
