"""Loading a model into several processes: each rank reads its own rows, or rank 0 loads them all and sends them.

It works on models to which torch's fully_shard (FSDP2) was applied on the meta device, and on whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from loaders.errors import BadSpec
from loaders.models.skeleton import Skeleton, set_parameter
from loaders.models.weights import ModelWeights


def is_first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rows_of(parameter: DTensor) -> tuple[int, int]:
    """Return the rows [start, stop) of a parameter on this rank. FSDP2 cuts by torch.chunk over the shard dimension.

    Raises:
        BadSpec: the parameter is sharded in another way.
    """
    return _cut(parameter, parameter.device_mesh.get_coordinate())


def _cut(parameter: DTensor, coordinate: Any) -> tuple[int, int]:
    start, stop = 0, parameter.shape[0] if parameter.dim() else 1
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if not (isinstance(placement, Shard) and placement.dim == 0):
            raise BadSpec(f"a parameter is placed as {placement}; expected rows, as fully_shard cuts by default")
        chunk = -(-(stop - start) // parameter.device_mesh.size(axis))
        first = min(start + chunk * coordinate[axis], stop)
        start, stop = first, min(first + chunk, stop)
    return start, stop


def load_sharded(skeleton: Skeleton, weights: ModelWeights, device: str = "cpu") -> None:
    """Load the weights of a model that was sharded on the meta device: each rank reads its own rows, nothing else."""
    _fill(skeleton, device, weights.fill)


def _fill(skeleton: Skeleton, device: str, read: Callable[[str, torch.Tensor, int], None]) -> None:
    model: nn.Module = skeleton.model
    # to_empty also replaces the buffers, which the model has computed and no file holds, so they are put back.
    own = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device=torch.device(device))
    for name, buffer in own.items():
        set_parameter(model, name, buffer)
    filled: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in filled:
            continue
        filled.add(id(parameter))
        source = skeleton.tied.get(name, name)
        if isinstance(parameter, DTensor):
            start, stop = rows_of(parameter)
            local = parameter.to_local().detach()  # the same memory, which is written to outside of autograd
            columns = _columns(parameter)
            assert local.numel() == (stop - start) * columns, (name, local.shape, start, stop)
            read(source, local, start * columns)
        else:
            read(source, parameter.data, 0)
    for name in skeleton.parameters:
        if name in own:
            read(name, model.get_buffer(name), 0)


def _columns(parameter: torch.Tensor) -> int:
    """Return the number of elements in a row."""
    return int(np.prod(parameter.shape[1:], dtype=np.int64))


def scatter(skeleton: Skeleton, full: Any, device: str = "cpu") -> None:
    """Send every rank its rows of the model on rank 0, one parameter at a time.

    `skeleton` is, on every rank, a model that was sharded on the meta device; `full` is the whole model on rank 0
    (LoadingStrategy.LOW_MEMORY), and is ignored on the others.
    """
    theirs = full.state_dict(keep_vars=True) if is_first() else {}

    def receive(name: str, local: torch.Tensor, start: int) -> None:
        size = torch.tensor([start, local.numel()])
        wanted = [torch.empty_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(wanted, size)
        if not is_first():
            if local.numel():
                dist.recv(local, src=0)
            return
        flat = theirs[name].detach().reshape(-1)
        for rank, (first, count) in enumerate(each.tolist() for each in wanted):
            if rank and count:
                dist.send(flat[first : first + count].contiguous(), dst=rank)
        local.view(-1).copy_(flat[start : start + local.numel()])

    _fill(skeleton, device, receive)


def broadcast(model: Any) -> None:
    """Send the whole model on rank 0 to every rank, one parameter at a time; the others have meta tensors before."""
    tied: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in tied:
            set_parameter(model, name, tied[id(parameter)])
            continue
        there = parameter if is_first() else nn.Parameter(torch.empty_like(parameter, device="cpu"))
        dist.broadcast(there.data, src=0)
        set_parameter(model, name, there)
        tied[id(parameter)] = there
