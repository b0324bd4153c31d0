"""Fast jobs for tests that need many outputs: one pass over a source for several presets, without a command line."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jobs.cli.compose import compose, take_apart
from jobs.execution.unit import Share, UnitTask
from jobs.output.journal import Journal
from jobs.output.publish import complete
from jobs.planning.build import make_plan
from jobs.planning.plan import Plan
from jobs.planning.targets import NAMELESS, Target, target_of
from jobs.spec.job import JobSpec
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.quantization.gate import Gate
from loaders.storage.address import Address
from loaders.strategies.lazy import LazyLoader


@cache
def target(preset: str, *settings: str) -> Target:
    """Return the target of quant=PRESET."""
    spec = compose("run", JobSpec, take_apart("run", JobSpec, [f"quant={preset}", *settings]))
    return replace(target_of(spec), id=preset, naming=NAMELESS)


@dataclass(frozen=True)
class Written:
    """One output of a pass."""

    folder: Path
    config: Mapping[str, Any] | None

    @property
    def weights(self) -> list[bytes]:
        """The bytes of the weight files."""
        checkpoint = open_checkpoint(self.folder)
        return [(self.folder / tag.name).read_bytes() for tag in checkpoint.files]

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """The dtype, shape and bytes of each tensor, for containers that store a tensor in one piece."""
        specs = open_checkpoint(self.folder).weights
        files = {spec.file: (self.folder / spec.file).read_bytes() for spec in specs}
        return {s.name: (s.dtype.name, s.shape, files[s.file][s.offset : s.offset + s.size]) for s in specs}


def plan(source: Path, *presets: str, settings: Sequence[str] = ()) -> Plan:
    return make_plan(open_checkpoint(source), [target(preset, *settings) for preset in presets], 1000)


def run(source: Path, out: Path, *presets: str, settings: Sequence[str] = ()) -> dict[str, Written]:
    """Quantize a source by each preset, in one pass; returns the outputs by preset."""
    planned = plan(source, *presets, settings=settings)
    journals = {preset: Journal(Address.of(out / preset), "0" * 12) for preset in presets}
    with ExitStack() as held:
        for journal in journals.values():
            held.enter_context(journal.hold({}, overwrite=False))
        reports = []
        for unit in planned.units:
            shares = {
                p: Share(
                    unit=unit,
                    target=p,
                    output=j.output,
                    key=j.key,
                    gate=Gate(allow_nonfinite=False),
                    backend="cpu",
                )
                for p, j in journals.items()
            }
            task = UnitTask(
                unit=unit,
                source=planned.checkpoint.address,
                shares=shares,
                strategy=LazyLoader(),
                threads=1,
            )
            reports.append(task.run(lambda _: None, threading.Event()))
        for report in reports:
            assert not report.failures, report.failures
        for preset, journal in journals.items():
            complete(planned, planned.targets[preset], journal, [report.done[preset] for report in reports])
    return {
        preset: Written(journal.destination.files.path, planned.targets[preset].config)
        for preset, journal in journals.items()
    }
