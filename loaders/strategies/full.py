"""`full`: everything is read at once, by all threads that help, and then handed out from memory. The model must fit.

What the page cache holds already is mapped from there; `eager` copies that, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loaders.backends.machine import free_memory
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, local_root
from loaders.strategies.eager import HeldTensors
from loaders.strategies.lazy import MappedFiles
from loaders.strategies.multithread import MultiThreadWeightLoader


class FullLoader(WeightLoader):
    """The strategy `full`, whose reader holds everything that it is opened for; what does not fit is refused first."""

    name = "full"
    not_for_jobs = "it holds all tensors of a unit of work at once; strategy=multithread reads as fast within 256 MB"

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        need, free = sum(spec.size for spec in specs), free_memory()
        if need > free:
            raise BadSpec(
                f"strategy=full: {need / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory are free;"
                " strategy=streaming loads within a budget, strategy=lazy maps the files"
            )
        with MultiThreadWeightLoader().open(files, specs) as reader:
            arrays = reader.stream([TensorBytes.whole(spec) for spec in specs])
            held = {spec.name: array for spec, array in zip(specs, arrays, strict=True)}
        yield HeldTensors(held, MappedFiles(local_root(files, self.name)))
