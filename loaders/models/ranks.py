"""The processes that share a model, and steps that all of them do or none does.

A step that fails on one rank raises the same error on all of them, so that none waits for a collective that never
comes. What ends a process at once (a kill) is noticed by the others' backend, as a lost connection or its timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from loaders.errors import BadSpec, WeightmillError

T = TypeVar("T")
Named = tuple[str, str, torch.Tensor]  # a parameter's name, the role of a part of it ("" if it is whole), and the part


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh of one dimension; `device` is this rank's."""

    mesh: DeviceMesh
    device: torch.device

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    @property
    def is_first(self) -> bool:
        return dist.get_rank(self.group) == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do a piece of work on every rank and return the results of all, by rank. They must be picklable.

        Raises:
            WeightmillError: it failed on some rank; the same on all.
        """
        outcomes: list[Any] = [None] * self.mesh.size()
        mine = _attempt(work)
        dist.all_gather_object(outcomes, mine, group=self.group)
        outcomes[dist.get_rank(self.group)] = mine  # its error still has its cause
        return _results(outcomes)

    def agree(self, work: Callable[[], tuple[T, Mapping[str, object]]]) -> T:
        """Do a piece of work on every rank; it returns its result, which stays here, and facts that all must share.

        Raises:
            BadSpec: some fact differs between ranks; the same on all.
            WeightmillError: as `gather`.
        """
        made: list[T] = []

        def facts() -> dict[str, str]:
            result, found = work()
            made.append(result)
            return {name: repr(value) for name, value in found.items()}

        first, *others = self.gather(facts)
        problems = []
        for rank, each in enumerate(others, 1):
            for name in first.keys() | each.keys():
                ours, theirs = first.get(name, "not given"), each.get(name, "not given")
                if ours != theirs:
                    problems.append(f"{name}: the ranks disagree: {ours} on rank 0, {theirs} on rank {rank}")
        if problems:
            raise BadSpec(sorted(problems), "give every rank the same")
        return made[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do a piece of work on every rank and return the own result.

        Raises:
            WeightmillError: as `gather`.
        """
        return self.agree(lambda: (work(), {}))

    def from_first(self, work: Callable[[], T]) -> T:
        """Do a piece of work on rank 0 alone and return its result, which must be picklable, on all.

        Raises:
            WeightmillError: it failed; the same on all.
        """
        outcome = [_attempt(work) if self.is_first else None]
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(self.group, 0), group=self.group)
        result: T = _results(outcome)[0]
        return result

    def send(self, read: Callable[[], Iterator[Named]]) -> Iterator[Named]:
        """Yield on all ranks, on their devices, the tensors that rank 0 reads. It reads all before the first is sent.

        Raises:
            WeightmillError: as `from_first`.
        """
        kept: list[Named] = []

        def names() -> list[tuple[str, str, torch.Size, torch.dtype]]:
            kept.extend(read())
            return [(name, role, part.shape, part.dtype) for name, role, part in kept]

        for name, role, shape, dtype in self.from_first(names):
            mine = kept.pop(0)[2].contiguous().to(self.device) if self.is_first else None
            yield name, role, self.copied(torch.empty(shape, dtype=dtype, device=self.device) if mine is None else mine)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite a contiguous tensor by that of rank 0, and return it."""
        if tensor.numel():
            # As bytes, so that no backend need know the dtype.
            as_bytes = tensor.detach().reshape(-1).view(torch.uint8)
            dist.broadcast(as_bytes, src=dist.get_global_rank(self.group, 0), group=self.group)
        return tensor


def ranks_of(mesh_or_group: Any) -> Ranks:
    """Return the ranks of a DeviceMesh of one dimension or of a process group; None is the default group.

    Raises:
        BadSpec: there is no group yet, this process is not one of its ranks, or the mesh has more dimensions.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise BadSpec(
            "mesh_or_group: there is no process group; start the program by torchrun and call"
            " torch.distributed.init_process_group first"
        )
    if isinstance(mesh_or_group, DeviceMesh):
        mesh = mesh_or_group
        if mesh.ndim != 1:
            raise BadSpec(
                f"mesh_or_group: expected a mesh of one dimension, found {tuple(mesh.shape)}; give the dimension over"
                " which weights are cut, as mesh['shard']"
            )
        if mesh.get_coordinate() is None:
            raise BadSpec(
                f"mesh_or_group: the mesh has {mesh.size()} of {dist.get_world_size()} ranks, and rank"
                f" {dist.get_rank()} is none of them; make one of all, or call this on its ranks only"
            )
        return Ranks(mesh, _device(mesh.device_type))
    group = dist.group.WORLD if mesh_or_group is None else mesh_or_group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise BadSpec(f"mesh_or_group: rank {dist.get_rank()} is not of the group; call this on the group's ranks only")
    if not isinstance(group, dist.ProcessGroup):
        raise BadSpec(f"mesh_or_group: expected a DeviceMesh or a process group, found {mesh_or_group!r:.80}")
    device_type = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    return Ranks(DeviceMesh.from_group(group, device_type), _device(device_type))


def _device(device_type: str) -> torch.device:
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, torch.cuda.current_device())


def _attempt(work: Callable[[], T]) -> tuple[T | None, WeightmillError | None]:
    try:
        return work(), None
    except WeightmillError as error:
        return None, error
    # The other ranks wait for this one's outcome: whatever happened, they must hear of it. Another library's exception
    # may not be picklable, its text is.
    except Exception as error:
        said = WeightmillError(f"{type(error).__name__}: {error}")
        said.__cause__ = error
        return None, said


def _results(outcomes: list[Any]) -> list[Any]:
    """Return the results, or raise the first error; it names its rank unless all ranks found the same."""
    errors = [error for _, error in outcomes]
    if all(error is None for error in errors):
        return [result for result, _ in outcomes]
    rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
    if all(str(error) == str(first) for error in errors):
        raise first
    raise type(first)(f"rank {rank}: {first}") from first
