"""Measuring the error of each candidate on each tensor of a unit; nothing but the numbers is written.

Units, views, schemes and measurement are those of a job, so that what is measured is what a job then writes. A tensor
is encoded by all its candidates while it is in the CPU's cache. The result of each unit and candidate is kept in a file
of its own, named by a digest of everything it depends on. So another budget measures nothing again, and another
candidate only itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from jobs.execution.cluster import reach_source
from jobs.output.journal import Journal
from jobs.planning.plan import FORMAT, Unit
from loaders.backends import encoded_on, kernels_of, leased_kernels
from loaders.backends.threads import Crew, ThreadedWork
from loaders.errors import VerifyFailed, io_errors
from loaders.quantization.gate import Gate
from loaders.quantization.importance import Importance, weighted_error
from loaders.quantization.memory_parts import MemoryParts
from loaders.specs import RowOrder
from loaders.stats import ErrorSums
from loaders.storage import open_source
from loaders.storage.address import Address
from loaders.storage.atomic import write_file
from loaders.storage.base import PinnedFiles
from loaders.storage.hashes import text_digest
from loaders.strategies import WeightLoader
from loaders.tensors.encoding import Encoding, TensorEncoder
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.uses import Uses


@dataclass(frozen=True, slots=True)
class Loss:
    """A candidate's error on a tensor; `weighted` is in nats per token, by a calibration that covers the tensor."""

    error: ErrorSums
    weighted: float | None


Losses = Mapping[str, Loss]  # by tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringTask:
    """A `Task` that measures a unit's candidates. `wanted` has, by candidate, the tensors to measure it on."""

    unit: Unit
    source: Address
    wanted: Mapping[str, frozenset[str]]
    strategy: WeightLoader
    backend: str
    threads: int
    importances: Mapping[str, tuple[Importance, ...]] = field(default_factory=dict)  # by tensor
    journals: tuple[Journal, ...] = ()  # it only measures
    scratch_bytes: int = 0
    by_architecture: bool = False

    @property
    def memory_bytes(self) -> int:
        """The most bytes that running the task holds, besides the libraries; encoded tensors are held in memory."""
        return self.unit.memory_bytes(self.threads) + self.strategy.held_bytes + self._stored_bytes

    @property
    def _stored_bytes(self) -> int:
        sizes = [
            sum(slot.size for slot in placement.slots.values())
            for name, names in self.wanted.items()
            for placement in self.unit.outputs[name].placements
            if placement.name in names
        ]
        return sum(sorted(sizes)[-self.threads :])

    @property
    def gpus(self) -> int:
        return int(self.backend == "cuda")

    @property
    def work_bytes(self) -> int:
        """The source bytes to encode, counted once for each candidate."""
        tensors = tensors_in(self.unit)
        sizes = {name: tensor.spec.num_items * tensor.dtype.item_bytes for name, tensor in tensors.items()}
        return sum(sizes[name] for names in self.wanted.values() for name in names)

    def reach(self) -> None:
        reach_source(self.source, self.unit)

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> MeasuringReport:
        encodings = {
            name: {p.name: p.encoding for p in self.unit.outputs[name].placements if p.name in names}
            for name, names in self.wanted.items()
        }
        taken = [r for name, r in tensors_in(self.unit).items() if any(name in found for found in encodings.values())]
        specs = [spec for tensor in taken for _, spec in tensor.stored]
        with (
            self.strategy.open(PinnedFiles(open_source(self.source), self.unit.sources), specs) as reader,
            leased_kernels(self.backend) as kernels,
            Crew(self.threads, self.unit.id) as crew,
        ):
            # What is measured is kept for later choices, on whatever backend: so nothing is searched to other codes.
            work = {"cpu": ThreadedWork(kernels_of("cpu"), crew, stop)}
            work |= {self.backend: work["cpu"].on(kernels)}
            losses: dict[str, dict[str, Loss]] = {name: {} for name in encodings}

            encoders = {name: TensorEncoder(reader, each) for name, each in work.items()}
            uses = Uses(reader, taken, stop=stop)

            def look(tensor: LogicalTensor) -> None:
                with uses.of(tensor.name):
                    measure(tensor)

            def measure(tensor: LogicalTensor) -> None:
                # Two candidates may give a tensor the same encoding.
                known = dict[Encoding, Loss]()
                for name, found in encodings.items():
                    if (encoding := found.get(tensor.name)) is not None:
                        if encoding not in known:
                            where = encoded_on(encoding.scheme, self.backend, searches=False)
                            known[encoding] = self._loss(encoding, encoders[where], work[where], on_bytes)
                        losses[name][tensor.name] = known[encoding]

            work["cpu"].each(taken, look)
        return MeasuringReport(self.unit.id, losses)

    def _loss(
        self, encoding: Encoding, encoder: TensorEncoder, work: ThreadedWork, on_bytes: Callable[[int], None]
    ) -> Loss:
        """Encode, decode and compare one tensor under one candidate."""
        parts = MemoryParts(encoding.stored)
        error = encoder.encode(encoding, parts, on_bytes)
        if error.wrong and (fault := Gate().fault(encoding.tensor.name, error, encoding.scheme)):
            raise VerifyFailed(fault)
        importances = self.importances.get(encoding.tensor.name)
        if importances is None:
            return Loss(error, None)
        ordered, numbers = [reordered(each, encoding.order) for each in importances], encoder.numbers(encoding)
        return Loss(error, weighted_error(numbers, encoding.scheme, encoding.spec, parts, ordered, work))


@dataclass(frozen=True, slots=True)
class MeasuringReport:
    """The result of measuring a unit: the errors by candidate and tensor."""

    unit: str
    losses: Mapping[str, Losses]
    attempts: int = 1


def reordered(importance: Importance, order: RowOrder | None) -> Importance:
    """Reorder the rows of an importance as `loaders.tensors.views.ReorderedView` reorders those of the weight."""
    if order is None:
        return importance
    half = np.arange(order.size).reshape(2, -1).T.reshape(-1)
    heads = importance.rows.reshape(-1, order.size)
    return Importance(heads[:, np.argsort(half) if order.inverse else half].reshape(-1), importance.columns)


# --- what was measured


def tensors_in(unit: Unit) -> dict[str, LogicalTensor]:
    """Return a unit's tensors as the candidates' engine holds them, by name."""
    return {p.name: p.encoding.tensor for output in unit.outputs.values() for p in output.placements}


class Measurements:
    """A folder of measurements, with one file for each unit and candidate."""

    def __init__(self, folder: Path, weighting: str) -> None:
        self.folder = folder
        self._weighting = weighting

    def key(self, unit: Unit, candidate: str) -> str:
        """Return a digest of the sources, the tensors, the candidate's encodings, and the weighting of errors."""
        made = [placement.encoding for placement in unit.outputs[candidate].placements]
        return text_digest(f"{FORMAT} {unit.sources!r} {unit.tensors!r} {made!r} {self._weighting}")

    def find(self, unit: Unit, candidate: str, names: frozenset[str]) -> Losses | None:
        """Return what was measured of a unit under a candidate, or None if that does not cover all of `names`."""
        # There is no such file yet, or it is damaged; the unit is then measured again.
        with suppress(OSError, ValueError, KeyError, TypeError):
            rows = json.loads((self.folder / f"{self.key(unit, candidate)}.json").read_text())
            found = {name: Loss(ErrorSums(**row["error"]), row["weighted"]) for name, row in rows.items()}
            return found if names <= set(found) else None
        return None

    def add(self, unit: Unit, candidate: str, losses: Losses) -> None:
        """Write the measurements of a unit under a candidate.

        Raises:
            StorageError: they cannot be written.
        """
        rows = {name: {"error": asdict(loss.error), "weighted": loss.weighted} for name, loss in losses.items()}
        with io_errors("making", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / f"{self.key(unit, candidate)}.json", json.dumps(rows).encode())


def of_all(found: Sequence[Losses]) -> dict[str, Loss]:
    """Merge the measurements of several units."""
    return {name: loss for losses in found for name, loss in losses.items()}
