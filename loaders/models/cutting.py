"""Cutting a model over ranks by torch's FSDP, a decoder block at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from loaders.errors import BadSpec
from loaders.models.adapters import dora_layers
from loaders.models.ranks import Ranks
from loaders.models.skeleton import Skeleton

Prepare = Callable[[Any], Any]
Place = tuple[nn.Module, str]  # a module and the name of a parameter in it


@dataclass(frozen=True)
class Unit:
    """A module that is cut at once: a decoder block, or the model, for what is in no block.

    `modules` are those within it, without those of blocks. `filled` are the places that the checkpoint fills, by the
    parameters' names in the plain model; `added` those that came with adapters.
    """

    module: nn.Module
    modules: tuple[nn.Module, ...]
    filled: Mapping[str, Place]
    added: tuple[Place, ...]


def prepared_units(skeleton: Skeleton, prepare: Prepare | None) -> tuple[Any, list[Unit]]:
    """Return the model as `prepare` makes it, and its units, the model itself last.

    Raises:
        BadSpec: transformers does not say what the model's blocks are, or `prepare` touched weights.
    """
    model = skeleton.model
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    places = {name: _place(model, name) for name in (*skeleton.parameters, *skeleton.tied)}
    _stand_in(model)
    prepared = model if prepare is None else prepare(model)
    _check_untouched(prepared, places)
    modules = [*_outermost(prepared, blocks), prepared]
    if len(modules) == 1:
        raise BadSpec(
            f"path: transformers does not say what the blocks of {type(model).__name__} are: it cannot be cut"
        )
    return prepared, _units(modules, places)


def _place(model: nn.Module, name: str) -> Place:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _stand_in(model: nn.Module) -> None:
    """Replace all parameters by one NaN each on the CPU, seen in their shapes.

    Adapters are initialized for the device and dtype that they see; what they make of values that are not there is NaN.
    """
    made = {
        each: nn.Parameter(torch.full((), torch.nan, dtype=each.dtype).expand(each.shape), each.requires_grad)
        for each in model.parameters()
    }
    for module in model.modules():
        module._parameters.update({name: made[each] for name, each in module._parameters.items() if each is not None})


def _check_untouched(prepared: Any, places: Mapping[str, Place]) -> None:
    if not isinstance(prepared, nn.Module):
        raise BadSpec(f"prepare: expected the model that is to be cut, found {prepared!r:.80}; return it")
    present = {id(module) for module in prepared.modules()}
    for name, (owner, last) in places.items():
        parameter = owner._parameters.get(last)
        if id(owner) not in present or (parameter is not None and parameter.numel() > 1 and any(parameter.stride())):
            raise BadSpec(
                f"prepare: {name} was replaced or changed before its weights are there (as"
                " prepare_model_for_kbit_training would, which is not needed here); add adapters only"
            )
    known = {(id(owner), last) for owner, last in places.values()}
    known |= {(id(dora), "weight") for _, _, dora in dora_layers(prepared.modules())}
    for path, module in prepared.named_modules():
        for last, parameter in module._parameters.items():
            is_new = parameter is not None and (id(module), last) not in known
            if is_new and (parameter.is_meta or bool(parameter.detach().reshape(-1)[:1].isnan().any())):
                raise BadSpec(
                    f"prepare: {path}.{last} is made of weights that are not there yet, or has no values (peft's"
                    " modules_to_save, an init_lora_weights that looks at weights, low_cpu_mem_usage=True); leave"
                    " that out"
                )


def _outermost(model: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    """Yield the modules of classes of these names that lie in no other of them."""
    for child in model.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _units(modules: list[nn.Module], places: Mapping[str, Place]) -> list[Unit]:
    filled = {(id(owner), last): name for name, (owner, last) in places.items()}
    units: list[Unit] = []
    seen: set[int] = set()
    for module in modules:
        own = tuple(each for each in module.modules() if id(each) not in seen)
        seen |= {id(each) for each in own}
        mine: dict[str, Place] = {}
        added: list[Place] = []
        for each in own:
            for last in (*each._parameters, *each._buffers):
                name = filled.get((id(each), last))
                if name is not None:
                    mine[name] = (each, last)
                elif each._parameters.get(last) is not None:
                    added.append((each, last))
        units.append(Unit(module, own, mine, tuple(added)))
    return units


# --- FSDP


def cut(model: Any, module: nn.Module, ranks: Ranks, fsdp: int) -> Any:
    """Cut a module of a model, whose weights are all there, over the ranks, and return the model.

    With FullyShardedDataParallel the module is replaced by one around it; the model, if it is itself cut, too.

    Raises:
        BadSpec: it holds weights that FullyShardedDataParallel cannot put together.
    """
    if fsdp == 2:
        fully_shard(module, mesh=ranks.mesh)
        return model
    return _replaced(model, module, _wrapped(module, ranks))


def _replaced(model: Any, module: nn.Module, by: nn.Module) -> Any:
    if module is model:
        return by
    path = next(path for path, each in model.named_modules() if each is module)
    model.set_submodule(path, by)
    return model


def _wrapped(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap a module, and before that those within it that differ from the rest in dtype or in being trained.

    FullyShardedDataParallel lays the weights of a module out in one tensor, which is of one dtype and trained or not.
    """
    sizes: Counter[tuple[torch.dtype, bool]] = Counter()
    for each in _not_wrapped(module):
        for parameter in each.parameters(recurse=False):
            sizes[_kind(parameter)] += parameter.nbytes
    if len(sizes) > 1:
        [(usual, _)] = sizes.most_common(1)
        for each in list(_not_wrapped(module)):
            kinds = {_kind(parameter) for parameter in each.parameters(recurse=False)}
            if len(kinds) > 1:
                raise BadSpec(
                    f"fsdp: the weights of a {type(each).__name__} are of several dtypes, or trained in part"
                    f" ({', '.join(sorted(str(dtype) for dtype, _ in kinds))}); give fsdp=2"
                )
            if each is not module and kinds and kinds != {usual}:
                _replaced(module, each, _wrap(each, ranks))
    return _wrap(module, ranks)


def _kind(parameter: torch.Tensor) -> tuple[torch.dtype, bool]:
    return parameter.dtype, parameter.requires_grad


def _not_wrapped(module: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(module, FullyShardedDataParallel):
        yield module
        for child in module.children():
            yield from _not_wrapped(child)


def _wrap(module: nn.Module, ranks: Ranks) -> nn.Module:
    return FullyShardedDataParallel(module, process_group=ranks.group, device_id=ranks.device)
