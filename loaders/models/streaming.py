"""Streaming: running a model larger than memory by loading a module's weights for its forward and freeing them after.

Modules in a module list (decoder blocks) are loaded as a whole, others one by one. While one computes, the next are
read within the budget, in the order of the last forward. Of an embedding, only the rows that are looked up are read.

Weights that are held quantized are read as they are stored, from the checkpoint or from the cache of encoded weights,
and their layer has the engine's module during the forward. Others of a quantized source are decoded while they are
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loaders.errors import BadSpec
from loaders.models.quantized_modules import QuantizedWeight
from loaders.models.skeleton import set_parameter
from loaders.models.weights import ModelWeights

MB = 1_000_000


class StreamedLinear(nn.Module):
    """The place of a quantized linear layer. Its engine's module is here during a forward alone."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, bias_name: str) -> None:
        """Take the place of a layer with such a weight, and with a bias on meta or none."""
        super().__init__()
        self.out_features, self.in_features = weight.tensor.shape
        self.size = weight.size + (0 if bias is None else bias.numel() * bias.element_size())
        self.engine: nn.Module | None = None
        self._weight = weight
        self._bias = None if bias is None else (bias_name, bias.shape, bias.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute as the engine's module does."""
        assert self.engine is not None
        return self.engine(inputs)  # type: ignore[no-any-return]

    def read(self, weights: ModelWeights, device: str) -> nn.Module:
        """Make the engine's module."""
        bias = None
        if self._bias is not None:
            name, shape, dtype = self._bias
            bias = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            weights.fill(name, bias)
        return self._weight.module(weights, bias, device)


@dataclass
class Held:
    """What a group has in memory: tensors by their names in the model, and the modules of quantized layers by path."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """What is loaded and freed together for a module: meta tensors by their names in the model, and quantized layers
    by their paths.
    """

    path: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    layers: dict[str, StreamedLinear] = field(default_factory=dict)

    @property
    def size(self) -> int:
        plain = sum(p.numel() * p.element_size() for p in self.parameters.values())
        return plain + sum(layer.size for layer in self.layers.values())


class Streamer:
    """A loader of groups ahead of their use. `held_bytes` counts the weights held now, `peak_bytes` the most so far."""

    def __init__(self, model: nn.Module, weights: ModelWeights, groups: list[Group], device: str, budget: int) -> None:
        self._model = model
        self._weights = weights
        self._groups = groups
        self._device = device
        self._budget = budget
        self._sources = {name: name for name in weights.parameters}
        self._next = {i: (i + 1) % len(groups) for i in range(len(groups))}
        self._last: int | None = None
        # One thread, since groups are needed one after another; reading a group uses the shared workers.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._coming: dict[int, Future[Held]] = {}
        self._here: set[int] = set()
        self.peak_bytes = 0

    @property
    def largest_bytes(self) -> int:
        """The bytes of the largest group."""
        return max(group.size for group in self._groups)

    @property
    def held_bytes(self) -> int:
        return sum(self._groups[i].size for i in {*self._coming, *self._here})

    def close(self) -> None:
        """Drop what was read ahead and close the files; the model cannot run any more."""
        self._coming.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._weights.close()

    def tie(self, name: str, original: str) -> None:
        self._sources[name] = original

    def enter(self, index: int) -> None:
        # The order of modules is learned: it may differ from that of their definition, and change from call to call.
        if self._last is not None:
            self._next[self._last] = index
        self._last = index
        if index not in self._coming:
            self._make_room(self._groups[index].size)
            self._fetch(index)
        self._here.add(index)
        self._read_ahead(index)
        held = self._coming.pop(index).result()
        for name, tensor in held.tensors.items():
            set_parameter(self._model, name, tensor)
        for path, module in held.modules.items():
            self._groups[index].layers[path].engine = module

    def leave(self, index: int) -> None:
        for name, parameter in self._groups[index].parameters.items():
            set_parameter(self._model, name, parameter)
        for layer in self._groups[index].layers.values():
            layer.engine = None
        self._here.discard(index)

    def _fetch(self, index: int) -> None:
        self._coming[index] = self._pool.submit(self._load, index)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _load(self, index: int) -> Held:
        made = Held()
        for name, parameter in self._groups[index].parameters.items():
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            self._weights.fill(self._sources[name], tensor)
            made.tensors[name] = tensor
        for path, layer in self._groups[index].layers.items():
            made.modules[path] = layer.read(self._weights, self._device)
        return made

    def _read_ahead(self, index: int) -> None:
        at = self._next[index]
        while at not in self._here and at not in self._coming:
            if self.held_bytes + self._groups[at].size > self._budget:
                return
            self._fetch(at)
            at = self._next[at]

    def _make_room(self, size: int) -> None:
        """Drop groups that were read ahead for another order of modules, the latest first."""
        while self._coming and self.held_bytes + size > self._budget:
            index = next(reversed(self._coming))
            future = self._coming.pop(index)
            if not future.cancel():
                future.result()


def stream(
    model: Any, weights: ModelWeights, device: str, budget_mb: float, quantized: Mapping[str, QuantizedWeight]
) -> Streamer:
    """Add streaming to a model on the meta device; its `Streamer` is also set as `model.streamer`.

    `quantized`: the weights that are held quantized, by name.

    Raises:
        BadSpec: a single module needs more than the budget.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    buffers = [name for name in weights.parameters if name not in expected]
    groups, embeddings = _groups(model, expected, quantized)
    budget = int(budget_mb * MB)
    largest = max(groups, key=lambda group: group.size)
    if largest.size > budget:
        raise BadSpec(
            f"memory_budget_mb: {largest.path} alone takes {largest.size / MB:.1f} MB, the budget is {budget_mb:g};"
            " give more"
        )
    streamer = Streamer(model, weights, groups, device, budget)
    ties = {id(p): n for n, p in expected.items() if n in weights.parameters}
    for name, parameter in expected.items():
        if name not in weights.parameters:
            streamer.tie(name, ties[id(parameter)])
    for name in buffers:
        made = torch.empty_like(model.get_buffer(name), device=device)
        weights.fill(name, made)
        set_parameter(model, name, made)
    for name, buffer in list(model.named_buffers()):
        set_parameter(model, name, buffer.to(device))
    for group in groups:
        for path, layer in group.layers.items():
            model.set_submodule(path, layer)
    for index, group in enumerate(groups):
        module = model.get_submodule(group.path)
        module.register_forward_pre_hook(lambda m, args, i=index: streamer.enter(i))
        module.register_forward_hook(lambda m, args, out, i=index: streamer.leave(i), always_call=True)
    for path in embeddings:
        _look_up(model.get_submodule(path), f"{path}.weight", weights, device)
    model.requires_grad_(False)
    model.streamer = streamer
    _on(model, device)
    return streamer


def _groups(
    model: nn.Module, expected: Mapping[str, nn.Parameter], quantized: Mapping[str, QuantizedWeight]
) -> tuple[list[Group], list[str]]:
    """Return the groups to stream, in the order of the modules, and the paths of embeddings, which are read by row."""
    listed = [f"{path}.{i}" for path, m in model.named_modules() if isinstance(m, nn.ModuleList) for i in range(len(m))]
    outer = [path for path in listed if not any(path.startswith(other + ".") for other in listed)]
    found: dict[str, Group] = {}
    embeddings = []
    for name, parameter in expected.items():
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        if type(module) is nn.Embedding and module.max_norm is None:
            embeddings.append(path)
            continue
        block = next((each for each in outer if name.startswith(each + ".")), path)
        group = found.setdefault(block, Group(block))
        if f"{path}.weight" not in quantized:
            group.parameters[name] = parameter
        elif name == f"{path}.weight":
            group.layers[path] = StreamedLinear(quantized[name], module.bias, f"{path}.bias")
    return list(found.values()), embeddings


def _look_up(module: Any, name: str, weights: ModelWeights, device: str) -> None:
    """Replace an embedding's forward by one that reads only the rows of the given ids."""
    weight: Any = module.weight
    rows, columns = weight.shape
    dtype = weight.dtype

    def forward(ids: torch.Tensor) -> torch.Tensor:
        wanted, places = torch.unique(ids.cpu(), return_inverse=True)
        if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < rows:
            raise IndexError(f"{name}: ids from {int(wanted[0])} to {int(wanted[-1])}, it has {rows} rows")
        table = torch.empty((wanted.numel(), columns), dtype=dtype)
        for at, row in enumerate(wanted.tolist()):
            weights.fill(name, table[at], row * columns)
        return table[places].to(device)

    module.forward = forward


def _on(model: Any, device: str) -> None:
    """Make the model's `device` the one that it computes on, which `generate` asks for; its parameters are on meta.

    `device` is a read-only property of transformers' class, so the model gets a subclass of its own.
    """
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"device": property(lambda self: torch.device(device))})
