"""A job's encoding and measuring alone, of whole tensors from the page cache to memory.

    python -m jobs.benchmarks.job.kernels_alone THREADS OVERRIDES

Nothing is written, hashed or synced: what a job on as many threads could do. It prints
a JSON object: `seconds`, and `bytes` of the weights that the scheme encodes; what is kept as it is does not count.
"""

from __future__ import annotations

import json
import sys
import threading
from time import perf_counter

from jobs.cli.compose import compose, take_apart
from jobs.orchestration.preflight import plan_job
from jobs.planning.targets import TARGET
from jobs.spec.job import JobSpec
from loaders.backends import leased_kernels
from loaders.backends.threads import Crew, ThreadedWork
from loaders.quantization.memory_parts import MemoryParts
from loaders.storage import open_source
from loaders.storage.base import PinnedFiles
from loaders.tensors.encoding import Encoding, TensorEncoder


def main(threads: int, *overrides: str) -> int:
    """Encode and measure all weights on `threads` threads; the first one twice, so that kernels are loaded."""
    planned = plan_job(compose("run", JobSpec, take_apart("run", JobSpec, overrides)))
    units = planned.plan.units
    placed = [placement for unit in units for placement in unit.outputs[TARGET].placements]
    encodings = [each.encoding for each in placed if each.encoding.action == "quantize"]
    # The largest first, so that threads end together.
    encodings.sort(key=lambda each: each.tensor.source_bytes, reverse=True)
    files = PinnedFiles(open_source(planned.plan.checkpoint.address), [name for unit in units for name in unit.sources])
    specs = [spec for each in encodings for _, spec in each.tensor.stored]
    with (
        planned.strategy[0].open(files, specs) as reader,
        leased_kernels(planned.backend[0]) as kernels,
        Crew(threads) as crew,
    ):
        work = ThreadedWork(kernels, crew, threading.Event())
        encoder = TensorEncoder(reader, work, [each.encoding for each in placed])

        def trip(encoding: Encoding) -> None:
            parts = MemoryParts(encoding.stored)
            encoder.encode(encoding, parts)

        work.each(encodings[-1:], trip)
        began = perf_counter()
        work.each(encodings, trip)
        seconds = perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes": sum(each.tensor.source_bytes for each in encodings)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
