"""The shared parts of `weightmill bench gpu`: trials, their results, and the resources that they use."""

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

SMALL_GB = 0.6  # gigabytes of the random Llama that is loaded as a model, and encoded by slow schemes
LONGEST_FAULT = 400  # characters of an error that a row shows: some libraries' errors have pages


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The resources of trials: torch's name of the device, the weight's shape, laps, a scratch folder."""

    device: str
    parts: tuple[str, ...]  # the requested parts
    path: str | None
    gb: float
    shape: tuple[int, int]
    laps: int
    work: Path
    ends: float  # the time.monotonic() after which no trial begins

    @property
    def left_s(self) -> float:
        """The seconds in which trials may still begin."""
        return self.ends - time.monotonic()

    @cached_property
    def source(self) -> Path:
        """The checkpoint of the parts jobs, cores and loading."""
        return self._given_or_random("random-llama", self.gb)

    @cached_property
    def small(self) -> Path:
        """The checkpoint of the part models, and of slow jobs."""
        return self._given_or_random("small-llama", min(self.gb, SMALL_GB))

    def _given_or_random(self, name: str, gb: float) -> Path:
        if self.path is not None:
            return Path(self.path)
        note(f"making a random Llama of {gb:g} GB in {self.work / name}")
        make_llama(self.work / name, gb)
        return self.work / name


@dataclass(frozen=True)
class Found:
    """The result of a trial: numbers (`seconds`, `gbps`, and others), a text, and a fault if something is wrong."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    said: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Trial:
    """A trial, which does not depend on the success of others."""

    name: str
    call: Callable[[], Found]


@dataclass(frozen=True)
class Row:
    """A trial's row of the table, whether it ran or was left out."""

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
        """The row as one line, for progress."""
        rates = (self.seconds and f"{self.seconds} s", self.gbps and f"{self.gbps} GB/s")
        shown = [text for text in (*rates, self.found.said, self.found.fault) if text]
        return f"{self.part}: {self.case}: {', '.join(shown)}"

    @property
    def document(self) -> dict[str, Any]:
        found = self.found
        return {"part": self.part, "case": self.case, **found.numbers, "said": found.said, "fault": found.fault or None}


def tried(part: str, trial: Trial) -> Row:
    """Run a trial and return its row; an exception becomes its fault."""
    try:
        return Row(part, trial.name, trial.call())
    # Any error of a library or a driver is a result, and the other trials go on.
    except Exception as error:
        said = " ".join(str(error).split())[:LONGEST_FAULT]
        return Row(part, trial.name, Found(fault=f"{type(error).__name__}: {said}"))
    finally:
        gc.collect()


def rate(seconds: float, size: int, said: str = "") -> Found:
    """Return the result of processing `size` bytes of source in some seconds."""
    return Found({"seconds": seconds, "gbps": size / seconds / 1e9}, said)


def median_s(call: Callable[[], object], laps: int, warm_up: int = 1) -> float:
    """Return the median seconds of `laps` calls, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    took = []
    for _ in range(laps):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def finish(device: str) -> Callable[[], None]:
    """Return a function that waits until a device has finished all its work; the CPU has nothing to wait for."""
    import torch

    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    return waits.get(device.partition(":")[0], lambda: None)
