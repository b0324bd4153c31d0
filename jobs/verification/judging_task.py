"""verify=logits and verify=embeddings on a cluster: one task, on a machine with memory for the model.

The driver has read the text and cut it into windows of token ids, which are small. The machine opens original and
output by itself, as units do, and gives back the numbers alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.cli.progress import Meter
from jobs.execution.choose import choose, is_local
from jobs.execution.cluster import Cluster, UnitFailed, reach_source
from jobs.output.journal import Journal
from jobs.planning.plan import Unit
from jobs.spec.cluster import ClusterSpec
from jobs.spec.keys import KEYS
from loaders.backends.threads import Stopped
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, StorageError, VerifyFailed, settings_called
from loaders.quantization.scheme import Decoder
from loaders.specs import TensorSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry

# This module imports torch, which takes seconds.
if TYPE_CHECKING:
    from loaders.models.evaluating import Windows
    from loaders.models.hidden_states import Closeness
    from loaders.models.quality import Quality
    from loaders.models.runners import Engine

LIBRARIES_BYTES = 2 << 30  # of torch, an engine, and a batch of numbers, beside the model


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTask:
    """A `Task` that evaluates an output. It counts tokens, those of the original and of the output."""

    silent_s: ClassVar[float] = 1800.0  # loading a model, and computing with a large one, tells nothing for long
    by_architecture: ClassVar[bool] = False
    scratch_bytes: ClassVar[int] = 0
    journals: ClassVar[tuple[Journal, ...]] = ()

    kind: str  # "logits" or "embeddings"
    source: Address  # the original
    container: str
    files: tuple[Entry, ...]  # the original's
    output: Address
    name: str
    folder: Path  # of the original's numbers
    windows: Windows
    device: str
    dtype: str
    engine: Engine
    model_bytes: int
    tokens: int  # that the original computes, and then the output
    threads: int
    quantized: tuple[tuple[TensorSpec, Decoder], ...] = field(repr=False)
    is_probe: bool = False  # whether it only asks machines whether they could

    @property
    def unit(self) -> Unit:
        return Unit(f"verify={self.kind}", self.files[:1], (), {})

    @property
    def memory_bytes(self) -> int:
        return self.model_bytes + LIBRARIES_BYTES

    @property
    def work_bytes(self) -> int:
        return 2 * self.tokens

    @property
    def gpus(self) -> int:
        return int(self.device == "cuda")

    def reach(self) -> None:
        """Check that this machine has the engines, and sees the original and the output.

        Raises:
            BadSpec, StorageError: it has not, or does not.
        """
        from loaders.models import runners

        with settings_called({**KEYS, "evaluate": f"verify={self.kind}"}):
            for each, what in ((runners.ORIGINAL, "the original"), (self.engine, "the output")):
                runners.check_engine(each, self.device, what)
            runners.check_tensors(self.engine, self.device, self.quantized)
        reach_source(self.source, self.unit)
        if (why := open_store(self.output).absence()) is not None:
            raise StorageError(f"{self.output}: {why}")

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> JudgeReport:
        if self.is_probe:
            return JudgeReport(self.unit.id)
        from loaders.models.evaluating import Reference, judge, judge_states, kept

        def count(tokens: int) -> None:
            if stop.is_set():
                raise Stopped("the evaluation was cancelled")
            on_bytes(tokens)

        is_states = self.kind == "embeddings"
        original = open_checkpoint(self.source, self.container)
        reference = Reference(original, self.windows, self.device, self.dtype, is_states)
        try:
            with kept(self.folder) as folder:
                found: Quality | Closeness = (judge_states if is_states else judge)(
                    reference, open_checkpoint(self.output, key="output.path"), self.engine, folder, key=self.name,
                    on_tokens=count,
                )  # fmt: skip
        # The kind of an error decides what is said of the output, and would be lost on the way.
        except (BadCheckpoint, VerifyFailed) as error:
            return JudgeReport(self.unit.id, error=error)
        return JudgeReport(self.unit.id, found)


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What the evaluation found, or why it could not."""

    unit: str
    found: Any = None  # Quality or Closeness
    error: BadCheckpoint | VerifyFailed | None = None
    attempts: int = 1


def check_can_judge(cluster: Cluster, tasks: Sequence[JudgeTask]) -> None:
    """Check, before any other work, that a machine has the memory and the engines for each evaluation.

    Raises:
        BadSpec: none has.
    """
    for task in tasks:
        with closing(_outcomes(cluster, replace(task, is_probe=True), lambda count: None)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, UnitFailed):
                    raise BadSpec(f"verify={task.kind}: {outcome.reason}")


def judged_on(cluster: Cluster, task: JudgeTask, doing: str) -> Quality | Closeness:
    """Evaluate an output on one of the cluster's machines, with a progress display.

    Raises:
        BadCheckpoint: an engine cannot load the original or the output.
        VerifyFailed: the output computes NaN or infinities, or other numbers of logits or hidden states.
        StorageError: no machine could finish it.
    """
    with Meter(doing, task.work_bytes, "tokens") as meter, closing(_outcomes(cluster, task, meter.add)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, UnitFailed):
                raise StorageError(f"{outcome.unit}: {outcome.reason}")
            if outcome.error is not None:
                raise outcome.error
            found: Quality | Closeness = outcome.found
            return found
    raise StorageError(f"{task.unit.id}: the cluster ended without a report")


def _outcomes(
    cluster: Cluster, task: JudgeTask, on_tokens: Callable[[int], None]
) -> Generator[JudgeReport | UnitFailed]:
    task = replace(task, threads=cluster.threads)
    try:
        cluster.check([task])
    except BadSpec as error:
        raise BadSpec(f"verify={task.kind}: {error}") from None
    yield from cluster.run([task], on_tokens)


@contextmanager
def cluster_to_judge(spec: ClusterSpec) -> Iterator[Cluster | None]:
    """Yield the settings' cluster for an evaluation by itself; None if that is this process."""
    if is_local(spec):
        yield None
        return
    cluster, _ = choose(spec)
    try:
        yield cluster
    finally:
        cluster.close()
