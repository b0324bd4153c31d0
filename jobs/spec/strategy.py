"""The settings of strategies: one model for each `kind` in conf/strategy, and the loader that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from jobs.spec.base import Spec
from loaders.errors import BadSpec

# Strategies and checkpoints are imported where a request is acted on, since `--help` and faulty requests need neither.
if TYPE_CHECKING:
    from loaders.checkpoints.checkpoint import Checkpoint
    from loaders.strategies import WeightLoader


class Strategy(Spec):
    """The base of all strategies in conf/strategy. A strategy without settings has only its kind."""

    @property
    def loader(self) -> WeightLoader:
        """The strategy's loader, with its settings.

        Raises:
            BadSpec: a setting is wrong.
        """
        from loaders.strategies import loader

        settings = self.model_dump()
        return loader(settings.pop("kind"), **settings)


class PlainStrategy(Strategy):
    kind: Literal["auto", "lazy", "eager", "read", "full", "unified_memory", "pinned"]


class MultiThreadStrategy(Strategy):
    kind: Literal["multithread"]
    max_workers: int | None = Field(ge=1, description="threads at most; null: what CPUs and storage suggest")
    adaptive_workers: bool = Field(description="begin with two, and measure whether more are faster")
    min_file_size_per_worker: float = Field(gt=0, description="megabytes (1e6 bytes) a thread has to read, at least")


class StreamingStrategy(Strategy):
    kind: Literal["streaming"]
    memory_budget_mb: float = Field(description="megabytes (1e6 bytes) in use and being fetched")
    prefetch_count: int = Field(ge=0, description="batches fetched ahead of the one in use")
    priority_weights: tuple[str, ...] = Field(description="names, parts of names or patterns that come first")

    @field_validator("memory_budget_mb")
    @classmethod
    def _holds_two_ranges(cls, budget: float) -> float:
        from loaders.strategies.streaming import LEAST_MB

        if budget < LEAST_MB:
            raise ValueError(f"expected at least {LEAST_MB}")
        return budget


class RemoteStrategy(Strategy):
    kind: Literal["remote"]
    memory_budget_mb: float = Field(description="megabytes (1e6 bytes) fetched and not used up, and on their way")

    @field_validator("memory_budget_mb")
    @classmethod
    def _has_room_for_requests(cls, budget: float) -> float:
        from loaders.strategies.remote import LEAST_MB

        if budget < LEAST_MB:
            raise ValueError(f"expected at least {LEAST_MB}")
        return budget


class FastSafetensorsStrategy(Strategy):
    kind: Literal["fastsafetensors"]
    gds: bool | None = Field(
        description="GPU direct storage: null uses it if present, true fails without it, false does not use it"
    )


class RunaiStrategy(Strategy):
    kind: Literal["runai"]
    batch_mb: float = Field(gt=0, description="megabytes (1e6 bytes) requested at once")


class LowMemoryStrategy(Strategy):
    kind: Literal["low_memory"]
    rank: int | None = Field(ge=0, description="which process this is; null: torch.distributed's, or RANK")


StrategySpec = Annotated[
    PlainStrategy
    | MultiThreadStrategy
    | StreamingStrategy
    | RemoteStrategy
    | FastSafetensorsStrategy
    | RunaiStrategy
    | LowMemoryStrategy,
    Field(discriminator="kind"),
]


def reading(spec: StrategySpec, checkpoint: Checkpoint) -> tuple[WeightLoader, str]:
    """Return the loader with which a job reads a checkpoint, and the reason.

    Raises:
        BadSpec: the strategy does not serve jobs, or cannot read from the checkpoint's store.
    """
    from loaders.strategies import auto, loader
    from loaders.strategies.base import local_root

    if spec.kind == "auto":
        name, why = auto.choose(checkpoint.source, [tag.name for tag in checkpoint.files], by_ranges=True)
        return loader(name), why
    made = spec.loader
    if made.not_for_jobs:
        raise BadSpec(f"strategy: {spec.kind} does not serve jobs: {made.not_for_jobs}")
    if made.is_local:
        local_root(checkpoint.source, spec.kind)
    return made, "as asked"
