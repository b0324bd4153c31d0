"""Streaming: running a model larger than memory by loading a module's weights for its forward and freeing them after.

Modules in a module list (decoder blocks) are loaded as a whole, others one by one. While one computes, the next are
read within the budget, in the order of the last forward. Of an embedding, only the rows that are looked up are read.
Quantized sources are decoded while they are read.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loaders.errors import BadSpec
from loaders.models.skeleton import set_parameter
from loaders.models.weights import ModelWeights

MB = 1_000_000
Held = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """The parameters of a module that are loaded and freed together: the meta tensors by their names in the model."""

    path: str
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters.values())


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
        for name, tensor in held.items():
            set_parameter(self._model, name, tensor)

    def leave(self, index: int) -> None:
        for name, parameter in self._groups[index].parameters.items():
            set_parameter(self._model, name, parameter)
        self._here.discard(index)

    def _fetch(self, index: int) -> None:
        self._coming[index] = self._pool.submit(self._load, index)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _load(self, index: int) -> Held:
        made = {}
        for name, parameter in self._groups[index].parameters.items():
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
            self._weights.fill(self._sources[name], tensor)
            made[name] = tensor
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


def stream(model: Any, weights: ModelWeights, device: str, budget_mb: float) -> Streamer:
    """Add streaming to a model on the meta device; its `Streamer` is also set as `model.streamer`.

    Raises:
        BadSpec: a single module needs more than the budget.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    buffers = [name for name in weights.parameters if name not in expected]
    groups, embeddings = _groups(model, expected)
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


def _groups(model: nn.Module, expected: dict[str, nn.Parameter]) -> tuple[list[Group], list[str]]:
    """Return the groups to stream, in the order of the modules, and the paths of embeddings, which are read by row."""
    listed = [f"{path}.{i}" for path, m in model.named_modules() if isinstance(m, nn.ModuleList) for i in range(len(m))]
    outer = [path for path in listed if not any(path.startswith(other + ".") for other in listed)]
    found: dict[str, dict[str, nn.Parameter]] = {}
    embeddings = []
    for name, parameter in expected.items():
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if type(module) is nn.Embedding and module.max_norm is None:
            embeddings.append(path)
            continue
        block = next((each for each in outer if name.startswith(each + ".")), path)
        found.setdefault(block, {})[name] = parameter
    return [Group(path, parameters) for path, parameters in found.items()], embeddings


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
