"""The interface of a strategy: whole tensors in order, pieces of them, or byte ranges from any thread.

A strategy implements `open`, which opens some files and gives a reader over them. Iterating, loading and counting are
written here, once for all.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from loaders.backends.arrays import gathered, placer
from loaders.backends.devices import device_name
from loaders.backends.memory import PeakMemory
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.file_lists import Given, open_weights
from loaders.dtypes import is_contiguous, storage_of
from loaders.errors import BadCheckpoint, BadSpec
from loaders.specs import WeightSpec
from loaders.stats import LoadStats
from loaders.storage import local
from loaders.storage.base import Entry, PinnedFiles
from loaders.words import counted

SLICE_BYTES = 32 << 20  # the default slice: large enough for a disk's full rate, small beside any memory
# Files that are sampled for the share in the page cache. More would not change the choice between warm and cold, and a
# checkpoint of hundreds of shards on a network filesystem would take long to sample.
SAMPLED = 16


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Bytes [start, stop) of a stored tensor."""

    spec: WeightSpec
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @staticmethod
    def whole(spec: WeightSpec) -> TensorBytes:
        return TensorBytes(spec, 0, spec.size)


@dataclass(frozen=True, eq=False, slots=True)
class Use:
    """What some steps of a pass will read of stored tensors; it is over when all of them are.

    `is_once` says that each byte will be read only once, so that its memory can be used again at once.
    """

    pieces: tuple[TensorBytes, ...]
    is_once: bool = False
    steps: int = 1

    @property
    def size(self) -> int:
        """The bytes that it reads."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Some weights of a stored tensor: flat storage items from `start` on, in the order in which they are stored."""

    spec: WeightSpec
    start: int
    data: np.ndarray


class Reader(Protocol):
    """Open files of a checkpoint, from which stored tensors are read."""

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        """Read bytes [start, stop) of a stored tensor, uint8, valid until this thread reads into the slot again.

        Raises:
            BadCheckpoint: the file is shorter than it was when it was planned for.
            StorageError: the file cannot be read.
        """
        ...

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return bytes [start, stop) of a stored tensor in one piece, for elements that are not contiguous.

        They are valid until the reader is closed, or the use of them is over.
        """
        ...


class PieceReader(Reader, Protocol):
    """A reader that also gives pieces one after another, and so can fetch ahead."""

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        """Yield the bytes of each piece, uint8, in this order. An array belongs to the caller.

        Raises:
            BadCheckpoint, StorageError: as for `read`.
        """
        ...


@runtime_checkable
class Expecting(Protocol):
    """A reader that fetches what is going to be used, ahead of its use, and keeps it until its use is over."""

    def expect(self, uses: Sequence[Use], stop: threading.Event | None = None) -> None:
        """Announce uses, in about their order. Threads that wait for bytes give up when `stop` is set."""
        ...

    def using(self, use: Use) -> AbstractContextManager[None]:
        """Return the context of one step of an announced use. It may wait for room, so it must not be nested."""
        ...


class WeightLoader(ABC):
    """A way of reading. `stats` adds up over everything that one loader has loaded.

    `not_for_jobs` says why a job, which reads ranges within a stated memory, cannot use the strategy; else it is empty.
    `is_local` says that it reads files of a folder of this machine, and no other store. `second_names` are parameters
    that only say in other libraries' words what a setting says.
    """

    name: ClassVar[str]
    not_for_jobs: ClassVar[str] = ""
    is_local: ClassVar[bool] = True
    second_names: ClassVar[tuple[str, ...]] = ()
    stats: LoadStats = LoadStats()

    @abstractmethod
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> AbstractContextManager[PieceReader]:
        """Open the files of `specs`, which will be read in about this order."""

    @contextmanager
    def ahead(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[None]:
        """Begin to fetch what `open` will be asked for in the block, in about this order, if the strategy does that."""
        yield

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name in settings_of(type(self)))
        return f"{type(self).__name__}({own})"

    # --- the same for all strategies, by open()

    def get_weight_specs(self, file_paths: Given) -> dict[str, WeightSpec]:
        """Return what is stored, by name, in the order in which it is loaded. Only headers are read.

        file_paths: as for `iterate_weights`.

        Raises:
            BadSpec: no weights there (MissingFile: no file), or the files of a list do not belong together.
            BadCheckpoint: they are damaged or incomplete.
        """
        return {spec.name: spec for spec in self.order(open_weights(file_paths).weights)}

    def iterate_weights(
        self, file_paths: Given, device: Any = None, *, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield every stored tensor, whole and as it is stored, in order: (name, tensor).

        file_paths: a list of weight files, one file, a folder, an address (s3://..., hf://..., https://...), or a
        Checkpoint. A list is one source: its files are of one container and one model, in any folders, each tensor
        once; tensors come in the order of the list. One file is exactly that file, also if it is a shard of several.

        device: without one, tensors are numpy arrays of the dtype's `storage` (bfloat16 as uint16); with "cpu",
        "cuda", "cuda:1", "mps", or a torch.device, they are torch tensors there, and with "mlx" mlx arrays. Formats of
        ggml, and others of less than a byte, stay bytes.

        names: the tensors that are wanted. A tensor belongs to the caller; one that is not kept makes room for the
        next.

        Raises:
            BadSpec: a name that the checkpoint does not have, no such device, or as `get_weight_specs`.
            BadCheckpoint: a file is damaged, or changed since its headers were read.
            StorageError: a file cannot be read.
        """
        device, checkpoint = device_name(device), open_weights(file_paths)
        specs, unchanged = self.order(_selected(checkpoint, names)), Unchanged(checkpoint)
        with (
            self._counted(checkpoint, specs) as counting,
            closing(self._tensors(checkpoint, specs, device)) as tensors,
        ):
            for spec in specs:
                with counting:
                    unchanged.check(spec.file)
                    value = next(tensors)
                counting.count(TensorBytes.whole(spec), fetches=self.fetches)
                yield spec.name, value
                # Otherwise this frame would keep the tensor alive while the next one is read.
                del value

    def iterate_slices(
        self, file_paths: Given, *, names: Iterable[str] | None = None, slice_bytes: int | None = None
    ) -> Iterator[WeightSlice]:
        """Yield every stored tensor in pieces of at most `slice_bytes` bytes, in memory that does not grow with
        tensors.

        Raises:
            As iterate_weights; BadSpec: `slice_bytes` is less than a number takes.
        """
        checkpoint = open_weights(file_paths)
        specs, unchanged = self.order(_selected(checkpoint, names)), Unchanged(checkpoint)
        size = self.slice_bytes if slice_bytes is None else slice_bytes
        pieces = [piece for spec in specs for piece in _cut(spec, size)]
        with self._counted(checkpoint, specs) as counting, self.open(checkpoint.source, specs) as reader:
            arrays = reader.stream(pieces)
            for piece in pieces:
                with counting:
                    unchanged.check(piece.spec.file)
                    array = next(arrays)
                counting.count(piece)
                storage = storage_of(piece.spec.dtype)
                yield WeightSlice(piece.spec, piece.start // storage.itemsize, array.view(storage))
                del array

    def load_weights(
        self, file_paths: Given, device: Any = None, *, names: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Load all tensors, or those of `names`, by name. Those that share their bytes on disk share their memory.

        Arguments and errors as `iterate_weights`.
        """
        checkpoint = open_weights(file_paths)
        specs = _selected(checkpoint, names)
        aliases = {s.name: s.alias for s in specs if s.alias is not None and _same_place(checkpoint, s)}
        fetched = {s.name for s in specs} - {
            name for name, alias in aliases.items() if alias in {s.name for s in specs}
        }
        loaded = dict(
            self.iterate_weights(checkpoint, names=[s.name for s in specs if s.name in fetched], device=device)
        )
        return {s.name: loaded[s.name if s.name in fetched else str(s.alias)] for s in self.order(specs)}

    # --- what a strategy may override

    @property
    def fetches(self) -> bool:
        """Whether bytes are read at all."""
        return True

    @property
    def held_bytes(self) -> int:
        """The bytes that its reader holds beside the ranges that it is asked for; a job's memory includes them."""
        return 0

    def scratch_bytes(self, uses: Iterable[Use]) -> int:
        """Return the most bytes of scratch files that reading for these uses takes at a time."""
        return 0

    def priority(self, name: str) -> int:
        """Return the rank of a tensor where the order is free, as that of a job's units is; lower comes first."""
        return 0

    @property
    def slice_bytes(self) -> int:
        """The largest slice where the caller does not ask for one."""
        return SLICE_BYTES

    def open_on(
        self, device: str | None, files: PinnedFiles, specs: Sequence[WeightSpec]
    ) -> AbstractContextManager[PieceReader]:
        """Open the files for whole tensors on a device. torch wants memory that it may write to."""
        return self.open(files, specs)

    def order(self, specs: Sequence[WeightSpec]) -> list[WeightSpec]:
        """Return tensors in the order in which they are loaded: file by file, by their offsets."""
        return list(specs)

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        """Yield whole tensors in order, on the device."""
        place = placer(device)
        with self.open_on(device, checkpoint.source, specs) as reader:
            arrays = reader.stream([TensorBytes.whole(spec) for spec in specs])
            for spec in specs:
                yield place(gathered(next(arrays), spec), spec)

    @contextmanager
    def _counted(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec]) -> Iterator[Stopwatch]:
        """Add what happens inside the context to `stats`; what was cached is sampled before anything is read."""
        files = {spec.file for spec in specs}
        share = cached_share(checkpoint.source, [entry for entry in checkpoint.files if entry.name in files])
        watch, began = Stopwatch(), time.perf_counter()
        memory = PeakMemory()
        try:
            with memory:
                yield watch
        finally:
            self.stats = self.stats + LoadStats(
                files=len(watch.files), tensors=watch.tensors, bytes=watch.bytes, read_s=watch.seconds,
                wall_s=time.perf_counter() - began, peak_anonymous_bytes=memory.peak_bytes,
                **by_warmth(share, watch.bytes),
            )  # fmt: skip


def settings_of(made: type[WeightLoader]) -> tuple[str, ...]:
    """Return the names of a strategy's settings."""
    named = () if made.__init__ is object.__init__ else tuple(signature(made).parameters)
    return tuple(name for name in named if name not in made.second_names)


class Stopwatch:
    """A sum of the seconds spent inside `with`, and of the tensors, bytes and files that were loaded."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tensors = 0
        self.bytes = 0
        self.files: set[str] = set()
        self._began = 0.0

    def count(self, piece: TensorBytes, *, fetches: bool = True) -> None:
        self.tensors += piece.stop == piece.spec.size
        if not fetches:
            return
        self.bytes += piece.size
        self.files.add(piece.spec.file)

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *of_an_error: object) -> None:
        self.seconds += time.perf_counter() - self._began


def cut_short(spec: WeightSpec, size: int) -> BadCheckpoint:
    """Return the error of a file that ends before a tensor does."""
    return BadCheckpoint(
        f"{spec.file}: {spec.name!r} ends at byte {spec.offset + spec.size}, the file now has {size};"
        " it changed while it was read"
    )


class Unchanged:
    """Checks that files are those whose headers were read; a few microseconds, so that every tensor's is looked at."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.source
        self._wanted = {entry.name: entry for entry in checkpoint.files}

    def check(self, file: str) -> None:
        """Raise StorageError if a file is gone, BadCheckpoint if it is another version."""
        self._source.store.check_unchanged(self._wanted[file])


def local_root(files: PinnedFiles, strategy: str) -> Path:
    """Return the local folder of a source's files.

    Raises:
        BadSpec: they are in a store that is not local.
    """
    return files.path("", f"strategy={strategy} reads files of a folder (strategy=remote reads all others)")


def _selected(checkpoint: Checkpoint, names: Iterable[str] | None) -> Sequence[WeightSpec]:
    if names is None:
        return checkpoint.weights
    if isinstance(names, str):  # whose letters would be taken for names
        raise BadSpec(f"names: expected a list of names, found the text {names!r}; give [{names!r}]")
    wanted = set(names)
    unknown = sorted(wanted - {spec.name for spec in checkpoint.weights})
    if unknown:
        raise BadSpec(
            f"names: {counted(len(unknown), 'tensor')} that {checkpoint.address} does not have, {unknown[0]!r} first"
        )
    return [spec for spec in checkpoint.weights if spec.name in wanted]


def _same_place(checkpoint: Checkpoint, spec: WeightSpec) -> bool:
    """Whether a tensor is the same, name apart, as the one with which it shares its bytes."""
    [original] = [other for other in checkpoint.weights if other.name == spec.alias]
    return replace(spec, name=original.name, alias=original.alias, own_name=original.own_name) == original


def _cut(spec: WeightSpec, size: int) -> Iterator[TensorBytes]:
    """Yield a tensor in pieces of whole numbers, of at most `size` bytes each."""
    item = storage_of(spec.dtype).itemsize
    if size < item:
        raise BadSpec(f"slice_bytes: expected at least {item}, the size of a number of {spec.name!r}, found {size}")
    if spec.stride is not None and not is_contiguous(spec.shape, spec.stride):
        raise BadSpec(
            f"{spec.name}: its weights do not lie in order in {spec.file}, so that slices of it would not either;"
            " iterate_weights gives it whole"
        )
    step = size // item * item
    for start in range(0, spec.size, step):
        yield TensorBytes(spec, start, min(start + step, spec.size))


def cached_share(files: PinnedFiles, entries: Sequence[Entry]) -> float | None:
    """Return the share (0 to 1) of files that is in the page cache, estimated from samples; None if unknown."""
    seen = []
    for entry in entries[:: max(1, -(-len(entries) // SAMPLED))]:
        path = files.store.local_path(entry.name)
        if path is not None and path.is_file():  # if it is missing, the read that follows says so
            share = local.cached_share(path)
            if share is not None:
                seen.append((share, entry.size))
    total = sum(size for _, size in seen)
    return sum(share * size for share, size in seen) / total if total else None


def by_warmth(share: float | None, size: int) -> dict[str, int]:
    """Return how many of `size` bytes were cached and how many were not, as LoadStats names them."""
    warm = 0 if share is None else round(share * size)
    return {} if share is None else {"warm_bytes": warm, "cold_bytes": size - warm}
