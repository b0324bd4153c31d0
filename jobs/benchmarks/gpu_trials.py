"""What the parts of `jobs.bench gpu` share: a trial, what it finds, and where it is done."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.benchmarks.random_llama import make_llama
from jobs.cli.verb import note

SMALL_GB = 0.6  # of the random Llama that becomes models
LONGEST_FAULT = 400


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What trials work with: torch's name of the device, the weight's shape, laps, a scratch folder."""

    device: str
    parts: tuple[str, ...]  # that are asked for
    path: str | None
    gb: float
    shape: tuple[int, int]
    laps: int
    work: Path
    ends: float  # of time.monotonic

    @property
    def left_s(self) -> float:
        """Seconds until no trial begins any more."""
        return self.ends - time.monotonic()

    @cached_property
    def source(self) -> Path:
        """The checkpoint of jobs and of loading."""
        return self._given_or_random("random-llama", self.gb)

    @cached_property
    def small(self) -> Path:
        """The checkpoint of models, and of what is slow."""
        return self._given_or_random("small-llama", min(self.gb, SMALL_GB))

    def _given_or_random(self, name: str, gb: float) -> Path:
        if self.path is not None:
            return Path(self.path)
        note(f"making a random Llama of {gb:g} GB in {self.work / name}")
        make_llama(self.work / name, gb)
        return self.work / name


@dataclass(frozen=True)
class Found:
    """What a trial found: numbers (`seconds`, `gbps`, and others of its own), words, what is wrong."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    said: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Trial:
    """Something to try, independent of what else fails."""

    name: str
    call: Callable[[], Found]


@dataclass(frozen=True)
class Row:
    """A trial that was made, or left out."""

    part: str
    case: str
    found: Found

    @property
    def seconds(self) -> str:
        return f"{self.found.numbers['seconds']:.4g}" if "seconds" in self.found.numbers else ""

    @property
    def gbps(self) -> str:
        return f"{self.found.numbers['gbps']:.3g}" if "gbps" in self.found.numbers else ""

    @property
    def line(self) -> str:
        """All of it, for someone who waits."""
        rates = (self.seconds and f"{self.seconds} s", self.gbps and f"{self.gbps} GB/s")
        shown = [text for text in (*rates, self.found.said, self.found.fault) if text]
        return f"{self.part}: {self.case}: {', '.join(shown)}"

    @property
    def document(self) -> dict[str, Any]:
        found = self.found
        return {"part": self.part, "case": self.case, **found.numbers, "said": found.said, "fault": found.fault or None}


def tried(part: str, trial: Trial) -> Row:
    """The row of a trial; what it raises is its fault."""
    try:
        return Row(part, trial.name, trial.call())
    except Exception as error:  # whatever a library or a driver may raise is a result, and the other trials go on
        said = " ".join(str(error).split())[:LONGEST_FAULT]
        return Row(part, trial.name, Found(fault=f"{type(error).__name__}: {said}"))
    finally:
        gc.collect()


def rate(seconds: float, size: int, said: str = "") -> Found:
    """So many bytes of source in so many seconds."""
    return Found({"seconds": seconds, "gbps": size / seconds / 1e9}, said)


def median_s(call: Callable[[], object], laps: int, warm_up: int = 1) -> float:
    """Seconds of a call, the median of some, after some that do not count."""
    for _ in range(warm_up):
        call()
    took = []
    for _ in range(laps):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def finish(device: str) -> Callable[[], None]:
    """What waits until a device has done all that it was asked for."""
    import torch

    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    return waits.get(device.partition(":")[0], lambda: None)
