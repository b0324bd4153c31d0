"""Which of several processes this is, by torch.distributed's group or by what the caller says."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from loaders.errors import BadSpec
from loaders.models.config import LoadingStrategy, ModelLoadingConfig


@dataclass(frozen=True, slots=True)
class ProcessRank:
    """This process's number among those that load the same model."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shares(self, config: ModelLoadingConfig) -> bool:
        """Whether the first process alone loads the weights, for others to get them from it."""
        return self.world_size > 1 and config.loading_strategy is LoadingStrategy.LOW_MEMORY


def rank_of(config: ModelLoadingConfig) -> ProcessRank:
    """Return this process's rank. `rank` and `world_size` left at 0 and 1 are those of the group, if there is one.

    Raises:
        BadSpec: the group has others than the ones given.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ProcessRank(config.rank, config.world_size)
    found = ProcessRank(dist.get_rank(), dist.get_world_size())
    if (config.rank, config.world_size) not in ((0, 1), (found.rank, found.world_size)):
        raise BadSpec(
            f"rank: rank {config.rank} of world_size={config.world_size} was given, and torch.distributed's group has"
            f" this process as rank {found.rank} of {found.world_size}; leave both out, or give the group's"
        )
    return found
