"""Checks of MLX checkpoints, as mlx-lm reads them: its config keys, settings that agree, files that it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loaders.lint.base import Finding, Subject, doubt, fault, some
from loaders.words import counted

ENGINE = "mlx-lm"
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
            yield doubt(
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
        yield doubt(
            ENGINE,
            "config.json does not say tie_word_embeddings",
            "takes it for true in some models, where transformers takes it for false",
            "write it",
        )
    if "rope_theta" not in config and isinstance(config.get("rope_parameters"), Mapping):
        yield fault(
            ENGINE,
            "rope_theta stands in rope_parameters only, as transformers 5 writes it",
            "silently uses 10000, or fails",
            "write rope_theta at the top of config.json, too",
        )
