"""Comparisons of jobs, one for each model: jobs of different models share no table, no Pareto front and no picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from jobs.report.comparison import BITS, ComparedJob, Comparison, by_source, error_of
from loaders.words import counted


class Comparisons:
    """The comparison of the jobs of each model, by the model's name. Pure.

    `error` is the metric that is compared with bits per weight; without it, each model has that of its jobs.
    """

    def __init__(self, jobs: Sequence[ComparedJob], error: str | None = None) -> None:
        ordered = sorted(jobs, key=lambda job: (not job.is_comparable, job.metrics.get(BITS, 0.0), job.name))
        self.of = {source: Comparison(mine, error or error_of(mine)) for source, mine in by_source(ordered).items()}

    @property
    def jobs(self) -> list[ComparedJob]:
        """All jobs, model by model."""
        return [job for each in self.of.values() for job in each.jobs]

    @property
    def front(self) -> list[str]:
        """The names of the jobs on the Pareto fronts of their models."""
        return [name for each in self.of.values() for name in each.front]

    def lines(self) -> list[RenderableType]:
        """Return all tables and fronts for a terminal, each with its model if there are several."""
        found: list[RenderableType] = []
        for source, each in self.of.items():
            if len(self.of) > 1:
                found.append(Text(f"{source}: {counted(len(each.jobs), 'job')}", style="bold"))
            found += each.lines()
        return found

    def markdown(self, title: str, picture: str | None) -> str:
        """Return the comparisons as a Markdown page; `picture` is the file name of their figure."""
        lines = [f"# {title}", ""]
        for source, each in self.of.items():
            lines += [f"## {source}", ""] if len(self.of) > 1 else []
            lines += each.markdown()
        lines += [f"![error against size, and by layer]({picture})", ""] if picture is not None else []
        return "\n".join(lines)

    def document(self, most: int) -> list[dict[str, Any]]:
        """Return, for each model, its jobs, its Pareto front, and at most so many tensors that differ, as JSON."""
        return [
            {"source": source, "error": each.error, "jobs": [job.name for job in each.jobs], "pareto": each.front,
             "differing": each.differing[:most]}
            for source, each in self.of.items()
        ]  # fmt: skip
