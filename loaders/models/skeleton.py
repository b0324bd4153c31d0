"""Skeletons: a model without weights, and the checkpoint's tensors for each of its parameters.

Parameters are on torch's meta device, so they have shapes and dtypes only. Buffers are real, since a model computes
them itself (rotary frequencies). Tied parameters are one parameter, as in the checkpoint.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.layouts.hf import plain_config
from loaders.models.foreign import check_config, model_of
from loaders.models.heads import has_causal_class, is_causal, not_causal
from loaders.models.weights import ModelWeights, Parts, torch_dtype
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import Sources
from loaders.words import model_type_said

# transformers 5 fuses a layer's experts into two parameters, one for gate and up, one for down; checkpoints store them
# one by one, under the names of most models or of Mixtral (w1, w2, w3).
EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
FUSED = re.compile(r"^(?P<layer>.*\.)mlp\.experts\.(?P<part>gate_up_proj|down_proj)$")
MIXTRAL = ("mlp.", "block_sparse_moe.")
SHOWN = 6  # names that a message lists before it counts the rest
# Functions of torch.nn.init and methods of tensors that set all values of their first argument, and nothing else of it.
FILLS = frozenset(
    {"constant_", "fill_", "kaiming_uniform_", "normal_", "ones_", "trunc_normal_", "uniform_", "zero_", "zeros_"}
)
# transformers 5.23 sets torch's default dtype, which is global to the process, while it builds a model. Two threads
# that build at once would give each other's models the wrong dtype.
BUILDING = threading.RLock()


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, the logical tensors of its parameters, and its tied parameters (name -> original)."""

    model: Any
    parameters: Mapping[str, Parts]
    tied: Mapping[str, str]

    @property
    def size(self) -> int:
        """The bytes of all parameters in the model's dtypes."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def skeleton_of(
    checkpoint: Checkpoint,
    sources: Sources,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    ignore_unexpected: Sequence[str] = (),
    auto: Any = None,
) -> Skeleton:
    """Build a causal language model on the meta device, and find the weights of all its parameters.

    `auto`: another of transformers' Auto classes, for another kind of model; its pooler is left out if the checkpoint
    has none.

    Raises:
        BadSpec: transformers has no such model, or the checkpoint is no causal language model.
        BadCheckpoint: weights are missing, unexpected, or of another shape; all of them listed.
    """
    from transformers import AutoModelForCausalLM

    auto = AutoModelForCausalLM if auto is None else auto
    config = model_config(checkpoint)
    if auto is AutoModelForCausalLM and not has_causal_class(checkpoint.config):
        raise not_causal(checkpoint)
    wanted = getattr(torch, dtype) if dtype is not None else default_dtype(checkpoint, sources)
    options = {} if attention is None else {"attn_implementation": attention}
    with BUILDING, EmptyOnMeta():
        model = model_of(auto, config, dtype=wanted, **options)
    # Some models create a buffer with torch.empty and fill it. Such a model is built again with real tensors, which
    # takes memory and time for its parameters.
    if any(buffer.is_meta for buffer in model.buffers()):
        with BUILDING:
            model = model_of(auto, config, dtype=wanted, **options)
    if checkpoint.quantized_by in checkpoint.family.single_experts:
        with BUILDING:
            make_experts_single(model, checkpoint.quantized_by, wanted)
    if getattr(model, "pooler", None) is not None and not any(t.name.startswith("pooler.") for t in sources.tensors):
        model.pooler = None
    forget(model)
    model.eval()
    keep_in_float32(model, wanted)
    try:
        parameters, tied = matched(model, sources, ignore_unexpected)
    except BadCheckpoint as error:
        if auto is AutoModelForCausalLM and not is_causal(checkpoint.config):
            raise not_causal(checkpoint) from error
        raise
    for name, original in tied.items():
        set_parameter(model, name, model.get_parameter(original))
    return Skeleton(model, parameters, tied)


def make_experts_single(model: Any, method: str | None, dtype: torch.dtype) -> None:
    """Replace stacks of experts by the linear layers that transformers makes of them in a quantized model."""
    quantizer: Any = import_module("transformers.quantizers.base").HfQuantizer
    asked = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        quantizer._convert_model_for_quantization(asked, model)
    finally:
        torch.set_default_dtype(before)


class EmptyOnMeta(TorchFunctionMode):
    """A mode in which torch.empty creates meta tensors.

    nn.Linear and nn.Embedding create their weights by it, which then take no memory and no time to initialize. All
    other tensors are real, so that buffers have their values.

    Filling a meta tensor is left out: it changes nothing, but torch 2.13 imports its compiler for it, which takes
    seconds, and then a millisecond for each weight.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**given, "device": "meta"})
        if getattr(func, "__name__", "") in FILLS:
            filled = args[0] if args else given.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        return func(*args, **given)


def forget(model: nn.Module) -> None:
    """Move all parameters to the meta device; tied parameters stay tied."""
    empty = {each: nn.Parameter(each.to("meta"), each.requires_grad) for each in model.parameters()}
    for module in model.modules():
        module._parameters.update({name: empty[each] for name, each in module._parameters.items() if each is not None})


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Set the parameters to float32 that transformers keeps in float32 for any dtype: routers' biases, some norms.

    Source: transformers 5.23, modeling_utils.py and core_model_loading.py. A model lists parts of names, with `*` for
    anything: `_keep_in_fp32_modules` applies in float16, `_keep_in_fp32_modules_strict` in bfloat16 too.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    parts = re.compile("|".join(part.replace("*", ".*") for part in plan))
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if value.is_floating_point() and parts.search(name):
            set_parameter(model, name, value.detach().float())


def open_weights(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    *,
    workers: int | None = None,
    read: str = "lazy",
    use_cache: bool = False,
) -> ModelWeights:
    """Open the weights of a skeleton's parameters. The caller closes them once the model is loaded."""
    return ModelWeights(checkpoint, skeleton.parameters, workers=workers, read=read, use_cache=use_cache)


def model_config(checkpoint: Checkpoint) -> Any:
    """Return a checkpoint's config as transformers' object, without its quantization.

    Raises:
        BadSpec: transformers does not know the model_type.
        BadCheckpoint: the config names code of the Hub.
    """
    from transformers import AutoConfig

    plain = plain_config(checkpoint.config)
    check_config(plain, str(checkpoint.address))
    try:
        made = AutoConfig.for_model(str(plain.get("model_type")))
    except ValueError:
        raise BadSpec(
            f"{setting('checkpoint')}: transformers has no class of its own for {model_type_said(plain)}; code that"
            " comes with a checkpoint is never run"
        ) from None
    return type(made).from_dict(plain)


def default_dtype(checkpoint: Checkpoint, sources: Sources) -> torch.dtype:
    """Return the config's dtype, else that of the first float weight, as transformers chooses it."""
    found = load_dtype(checkpoint.config) or next((r.dtype for r in sources.tensors if r.dtype.is_float), None)
    return torch.float32 if found is None or found.name == "F64" else torch_dtype(found)


# --- which weights are whose


def matched(model: Any, sources: Sources, ignore: Sequence[str]) -> tuple[dict[str, Parts], dict[str, str]]:
    """Return the logical tensors of each parameter and persistent buffer, and the tied parameters (name -> original).

    Raises:
        BadCheckpoint: see `skeleton_of`.
    """
    tensors = {tensor.name: tensor for tensor in sources.tensors}
    expected = dict(model.state_dict(keep_vars=True))
    found: dict[str, Parts] = {}
    missing = []
    ties = {dropped: kept for kept, dropped in sources.tied} | dict(getattr(model, "all_tied_weights_keys", {}))
    tied = {}
    for name in expected:
        parts = parts_of(name, tensors)
        if parts:
            found[name] = parts
        elif name in ties and parts_of(ties[name], tensors):
            tied[name] = ties[name]
        else:
            missing.append(name)
    used = {tensor.name for parts in found.values() for tensor in parts}
    unexpected = [
        r.name
        for r in sources.tensors
        if r.name not in used and r.role != "buffer" and not any(re.search(p, r.name) for p in ignore)
    ]
    wrong = [
        f"{name} {list(expected[name].shape)} from {[list(r.shape) for r in parts][:2]}"
        for name, parts in found.items()
        if not _fits(expected[name], parts)
    ]
    faults = {
        "missing": missing,
        "unexpected (ignore_unexpected takes patterns)": unexpected,
        "of another shape": wrong,
    }
    if any(faults.values()):
        said = "; ".join(f"{len(names)} {why}: {_shown(names)}" for why, names in faults.items() if names)
        raise BadCheckpoint(f"{type(model).__name__} and the checkpoint do not fit: {said}")
    return found, tied


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def parts_of(name: str, tensors: Mapping[str, LogicalTensor]) -> Parts:
    """Return the logical tensors that make up a parameter, in flat order; empty if the checkpoint has none."""
    for each in (name, name.replace(*MIXTRAL)):
        if each in tensors:
            return (tensors[each],)
    match = FUSED.match(name)
    if match is None:
        return ()
    for prefix in MIXTRAL:
        for parts in EXPERT_PARTS[match["part"]]:
            made: list[LogicalTensor] = []
            stem = f"{match['layer']}{prefix}experts"
            while all(f"{stem}.{len(made) // len(parts)}.{part}.weight" in tensors for part in parts):
                made += [tensors[f"{stem}.{len(made) // len(parts)}.{part}.weight"] for part in parts]
            if made:
                return tuple(made)
    return ()


def _fits(parameter: torch.Tensor, parts: Parts) -> bool:
    if len(parts) == 1:
        return tuple(parameter.shape) == parts[0].shape
    return parameter.numel() == sum(r.spec.numel for r in parts) and all(
        r.shape[-1] == parameter.shape[-1] and len(r.shape) == 2 for r in parts
    )


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer of a model by its name; a plain tensor becomes a parameter."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._buffers:
        module._buffers[last] = value
    else:
        old = module._parameters[last]
        trains = old is not None and old.requires_grad
        module._parameters[last] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, trains)
