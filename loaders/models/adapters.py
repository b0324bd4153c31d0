"""Adapters of peft on a model cut by FSDP: DoRA's first magnitudes, what was trained, and saving it.

peft itself is not imported: its layers and models are known by their attributes. Checked with peft 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from loaders.errors import BadSpec
from loaders.models.ranks import Ranks, ranks_of

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def dora_layers(layers: Iterable[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Yield the DoRA adapters of some layers: the layer, the adapter's name, and the module with its magnitude."""
    for layer in layers:
        vectors: Any = getattr(layer, "lora_magnitude_vector", None) or {}
        for adapter, dora in vectors.items():
            yield layer, adapter, dora


def begin_dora(layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Compute the magnitudes of new DoRA adapters of some layers from their weights, which are whole at this time.

    They were made when the weights were NaN, and so are NaN; those of a loaded adapter are not, and stay.
    """
    for layer, adapter, dora in dora_layers(layers):
        before = dora.weight
        if not before.isnan().any():
            continue
        # In the model's dtype, as peft has them when it makes a magnitude, and casts the result.
        low, high = (each[adapter].weight.to(dtype) for each in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            dora.update_layer(
                base_layer=layer.get_base_layer(), lora_A=low, lora_B=high, scaling=layer.scaling[adapter]
            )
        dora.weight = nn.Parameter(dora.weight.detach().to(before), before.requires_grad)


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """Gather the trained parameters of a model that `load_sharded_model` cut; all its ranks call it.

    Returns them on rank 0, whole, on the CPU, by their names in the model before it was cut; nothing on other ranks.
    One module's are whole at a time.
    """
    is_first = _ranks(model).is_first
    return {name: whole.detach().cpu().clone() for name, whole in _whole(model) if is_first}


def save_adapter(model: Any, folder: str | Path) -> None:
    """Save the adapter of a peft model that `load_sharded_model` cut, in peft's files; all its ranks call it.

    Raises:
        BadSpec: the model has no adapter.
        WeightmillError: rank 0 could not write; raised on all ranks.
    """
    if not hasattr(model, "peft_config"):
        raise BadSpec("model: it has no adapter of peft to save; trained_weights gives what was trained")
    weights = trained_weights(model)

    def save() -> None:
        with _unwrapped(model) as peft_model:
            peft_model.save_pretrained(folder, state_dict=weights)

    _ranks(model).from_first(save)


@contextmanager
def _unwrapped(model: Any) -> Iterator[Any]:
    """Take the wrappers of FullyShardedDataParallel off a model for a while: peft finds weights by modules' names."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, FullyShardedDataParallel)
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = child.module
        yield model.module if isinstance(model, FullyShardedDataParallel) else model
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _whole(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(model, FullyShardedDataParallel):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        return
    for path, module in model.named_modules():
        # The whole model comes first, whatever it trains: by it FullyShardedDataParallel gets to know its parts.
        if isinstance(module, FullyShardedDataParallel) and (
            module is model or any(each.requires_grad for each in module.module.parameters(recurse=False))
        ):
            with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
                yield from _own(path, module)


def _own(path: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a summoned module holds itself, and not the modules cut within it."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "_flat_param" not in name:
            full = f"{path}.{name}".lstrip(".")
            for wrapper in WRAPPERS:
                full = full.replace(wrapper, "")
            yield full, parameter


def _ranks(model: Any) -> Ranks:
    if isinstance(model, FullyShardedDataParallel):
        return ranks_of(model.process_group)
    mesh = next((each.device_mesh for each in model.parameters() if isinstance(each, DTensor)), None)
    if mesh is None:
        raise BadSpec("model: expected one that load_sharded_model cut")
    return ranks_of(mesh)
