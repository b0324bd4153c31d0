"""Detection of the method that quantized a checkpoint: from config.json, another file, or the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from loaders.architectures.families import text_config
from loaders.architectures.mlx import is_stack, model_of
from loaders.architectures.mlx_config import settings_of
from loaders.quantization.schemes.bitsandbytes_int8 import SCALES

HQQ_CODES = ".W_q"
MODELOPT_CONFIG = "hf_quant_config.json"
BNB_STATE = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$")
BNB_PART = re.compile(rf"{BNB_STATE.pattern}|\.{SCALES}$")  # a name that only bitsandbytes gives


def quantized_by(container: str, config: Mapping[str, Any], aux: Collection[str], names: Sequence[str]) -> str | None:
    """Return the method by which a checkpoint says it was quantized; None for a plain one.

    A GGUF always counts as quantized, since a plain one needs the same translation of names and row orders. mlx-lm's
    checkpoints are known by their "quantization" block or their stacked experts.
    """
    if container == "gguf":
        return "gguf"
    block: Any = text_config(config, "quantization_config")
    model = model_of(config)
    if settings_of(config) is not None or any(is_stack(model, name) for name in names):
        return "mlx"
    if block is None and MODELOPT_CONFIG in aux:
        return "modelopt"
    # Single files, and folders whose config was edited, have no block; but these tools' tensor names are their own.
    if block is None:
        if any(name.endswith(HQQ_CODES) for name in names):
            return "hqq"
        return "bitsandbytes" if any(map(BNB_PART.search, names)) else None
    method = block.get("quant_method") if isinstance(block, dict) else None
    return method if isinstance(method, str) else "an unknown method"
