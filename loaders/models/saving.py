"""What transformers knows of a quantized model that it loads itself, set on those loaded here: so it saves them, too.

`save_pretrained`, Trainer and peft look at these attributes. Source: transformers 5.23, quantizers/base.py
(HfQuantizer.preprocess_model, postprocess_model). Models that would not be read back from what `save_pretrained` writes
refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.layouts.hf import is_skipped, quantization_config
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import LlmInt8
from loaders.quantization.schemes.hqq import Hqq


def mark_quantized(
    model: Any,
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    compute_dtype: torch.dtype | None,
    *,
    trains_blocks: bool = False,
) -> None:
    """Set on a model without weights what transformers sets on one whose weights it quantizes.

    schemes: those of the weights that will be held quantized, by their names. compute_dtype: of their products; None:
    the model's. trains_blocks: plain blocks are trained among quantized ones. Trainer refuses models that say that
    they `is_quantized` and have no adapters, so that such a model does not say it.
    """
    kinds = {type(scheme) for scheme in schemes.values()}
    if Hqq in kinds:
        _refuse_to_save(
            model, "transformers does not load weights of HQQ",
            "a job (weightmill run) writes what hqq loads, and weightmill.save what transformers 4 does",
        )  # fmt: skip
    if not kinds & {Bnb4, LlmInt8}:
        return
    transformers: Any = import_module("transformers")
    plain = [
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D) and f"{path}.weight" not in schemes
    ]
    dtype = str(compute_dtype or model.dtype).removeprefix("torch.")
    blocks = [quantization_config(scheme, plain, dtype) for scheme in dict.fromkeys(schemes.values())]
    made = transformers.BitsAndBytesConfig.from_dict(blocks[0])
    known: Any = import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    model.hf_quantizer = known["bitsandbytes_8bit" if made.load_in_8bit else "bitsandbytes_4bit"](made)
    model.hf_quantizer.postprocess_model(model)
    model.quantization_method = made.quant_method
    model.is_quantized = not trains_blocks
    model.dequantize = partial(_dequantized, model)
    paths = [name.rpartition(".")[0] for name in schemes]
    is_converted = (
        all(block == blocks[0] for block in blocks)
        and all(type(model.get_submodule(path)) is nn.Linear for path in paths)
        and not any(is_skipped(path, plain) for path in paths)
        and (checkpoint.quantized_by is not None or "bitsandbytes" not in checkpoint.family.single_experts)
    )
    if not is_converted:
        _refuse_to_save(
            model, "transformers would look for other quantized layers than this model has",
            "a job (weightmill run), or weightmill.save, writes what it can load, or says which tensors to keep",
        )  # fmt: skip


def _dequantized(model: Any, *given: Any, **options: Any) -> Any:
    # What bitsandbytes has packed anew (quantized_modules.py), transformers would decode as if it were not. To tell
    # its state, a module unpacks it.
    model.state_dict()
    return type(model).dequantize(model, *given, **options)


def refuse_to_save_streamed(model: Any) -> None:
    """Have a streaming model refuse `save_pretrained`: its weights are in memory during a forward alone."""
    remedy = "load it with strategy='full', or have a job (weightmill run) or weightmill.save write the folder"
    _refuse_to_save(model, "a model with strategy='streaming' has no weights of its own to save", remedy)


def refuse_to_save_cut(model: Any) -> None:
    """Have a quantized model that is cut over ranks refuse `save_pretrained`: each rank has a part of its weights."""
    remedy = "save_adapter writes its adapter, trained_weights gathers what was trained, a job quantizes the whole"
    _refuse_to_save(model, "the quantized weights are cut over ranks", remedy)


def _refuse_to_save(model: Any, why: str, remedy: str) -> None:
    model.save_pretrained = partial(_save_nothing_but_adapters, model, f"save_pretrained: {why}; {remedy}")


def _save_nothing_but_adapters(model: Any, refusal: str, *given: Any, **options: Any) -> None:
    # Of a model with adapters that transformers itself has added, save_pretrained writes these alone.
    if not getattr(model, "_hf_peft_config_loaded", False):
        raise BadSpec(refusal)
    type(model).save_pretrained(model, *given, **options)
