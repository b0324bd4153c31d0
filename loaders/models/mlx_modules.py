"""mlx-lm's models: an MLX checkpoint as it is, or any other checkpoint, encoded while it is loaded.

mlx-lm 0.32 loads only folders (utils.py: load_model, load_tokenizer). Other checkpoints are therefore encoded block by
block into a temporary folder, which is removed once MLX has read it. Memory holds the quantized model and one quantized
block more, and the disk holds the quantized model for that time.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.dtypes import dtype_named
from loaders.errors import BadSpec
from loaders.layouts.base import Placed
from loaders.layouts.mlx import MlxLayout
from loaders.layouts.rules import layout_rules
from loaders.models.config import LoadingStrategy, ModelLoadingConfig
from loaders.models.foreign import mlx_model_from, mlx_tokenizer_from
from loaders.models.process_rank import rank_of
from loaders.models.small_files import small_files
from loaders.models.weights import ModelWeights
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.kept import cast_kept
from loaders.rules.mlx import MlxRules
from loaders.tensors.block_expansion import expand_checkpoint, expand_sources
from loaders.tensors.quantized_sources import check_decodable
from loaders.tensors.sources import tensors_of


def load(checkpoint: Checkpoint, config: ModelLoadingConfig) -> Any:
    """Load an mlx-lm model.

    Raises:
        BadSpec: mlx-lm has no such model, or a setting does not exist for MLX.
    """
    if config.strategy is LoadingStrategy.STREAMING:
        raise BadSpec(
            "strategy: streaming is for models of transformers; MLX has FULL, LOW_MEMORY for one process, and"
            " UNIFIED_MEMORY, which reads weights when they are first used"
        )
    if rank_of(config).shares(config):
        raise BadSpec("low_memory: MLX's models are of one process, which others get no weights from; leave it out")
    if config.attention is not None or config.max_memory is not None or config.offload_to_cpu:
        raise BadSpec(
            "attention, max_memory, offload_to_cpu: they are for models of transformers; MLX has one memory and its"
            " own attention"
        )
    is_lazy = config.strategy is LoadingStrategy.UNIFIED_MEMORY
    block = checkpoint.config.get("quantization")
    if isinstance(block, dict) and config.quantize is None and not config.decode and not config.llama_pro_blocks:
        return mlx_model_from(checkpoint.folder(READS_FOLDERS), is_lazy=is_lazy)
    with tempfile.TemporaryDirectory(prefix="weightmill-mlx-") as made:
        convert(checkpoint, config, Path(made))
        return mlx_model_from(Path(made), is_lazy=False)


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer as mlx-lm wraps it; None if the folder has none."""
    if checkpoint.source.find("tokenizer_config.json") is None:
        return None
    with small_files(checkpoint) as folder:
        return mlx_tokenizer_from(folder)


def convert(checkpoint: Checkpoint, config: ModelLoadingConfig, folder: Path) -> None:
    """Write a checkpoint as mlx-lm reads it, one file per block; memory holds one encoded block at a time."""
    if checkpoint.quantized_by is not None:
        check_decodable(checkpoint)
        if config.quantize is not None:
            raise BadSpec(f"quantize: {checkpoint.address} is quantized already; leave it out, or give decode=True")
    sources = tensors_of(checkpoint, decode=True, split=True)
    if config.llama_pro_blocks:
        sources = expand_sources(checkpoint, sources, config.llama_pro_blocks)
        checkpoint = expand_checkpoint(checkpoint, config.llama_pro_blocks)
    wanted = None if config.dtype == "auto" else dtype_named(config.dtype or "float16")
    scheme: Scheme = config.scheme or Plain(None if wanted is None else wanted.name)
    if config.scheme is not None and wanted is not None:
        # The name by which the layout, as mlx_lm.convert, finds the dtype that weights are cast to first.
        checkpoint = replace(checkpoint, config={**checkpoint.config, "torch_dtype": wanted.torch})
    layout = MlxLayout()
    tensors = layout.formed(checkpoint, sources.tensors)
    mix = None if config.scheme is None else MlxRules(getattr(scheme, "group_size", 64))
    decisions = decide(tensors, scheme, (), layout_rules(layout, checkpoint, tensors, scheme, mix))
    if config.scheme is not None:
        decisions = cast_kept(decisions, wanted)
    placed = layout.place(checkpoint, decisions)
    made = layout.config(checkpoint, decisions, None)
    (folder / "config.json").write_text(json.dumps(made))
    blocks: dict[str, list[Placed]] = {}
    for each in placed:
        blocks.setdefault(each.tensor.block, []).append(each)
    parameters = {r.name: (r,) for r in sources.tensors}
    with ModelWeights(checkpoint, parameters, workers=config.workers, use_cache=config.use_cache) as weights:
        for number, block in enumerate(blocks.values()):
            _write(folder / f"model-{number:05d}.safetensors", block, weights)


def _write(path: Path, block: list[Placed], weights: ModelWeights) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for each in block:
        encoded = weights.encoded(each.encoding)
        for role, stored in each.stored.items():
            if stored.whole is None:
                tensors[stored.name] = encoded[role]
                continue
            shape, part = stored.whole.shape, encoded[role]
            whole = tensors.setdefault(stored.name, torch.empty(shape, dtype=part.dtype))
            size = int(np.prod(shape[1:], dtype=np.int64)) * part.element_size()
            whole[stored.offset // size].copy_(part)
    save_file(tensors, path, metadata={"format": "mlx"})
