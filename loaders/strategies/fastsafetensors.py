"""`fastsafetensors`: whole files to a device, past the CPU's memory where there is GPU direct storage (GDS).

Where GDS is missing, or fails when it is used, the library copies through the CPU's memory, and that is logged; with
gds=True it is an error. One file's buffer is on the device at a time, and 16 MiB for the library's copies. Tensors are
copied out of the buffer, on the device: tensors that point into it would keep all of it. Up to version 0.5 there is
another reason: when such a tensor is freed, the library runs Python code that fails while an exception is being raised,
and turns any error into "SystemError: error return without exception set".
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from loaders.backends.arrays import Told, placer, storage_shape
from loaders.backends.devices import torch_device
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, StorageError, WeightmillError
from loaders.missing import needed_for
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, cut_short, local_root
from loaders.strategies.lazy import MappedFiles

log = logging.getLogger("weightmill")
GDS_DEVICE = Path("/dev/nvidia-fs0")  # made by GDS' kernel module, nvidia-fs
NEEDED = (0, 5)  # older versions lack the tensor filter, or free buffers that tensors still use


def library() -> Any:
    """Return the package.

    Raises:
        BadSpec: it is not installed, or is older than NEEDED.
    """
    with needed_for("strategy=fastsafetensors"):
        import fastsafetensors
    version = importlib.metadata.version("fastsafetensors")
    if tuple(int(part) for part in version.split(".")[:2]) < NEEDED:
        raise BadSpec(f"strategy=fastsafetensors: expected version 0.5 or later, found {version}; upgrade it")
    return fastsafetensors


def gds_available(index: int = 0) -> bool:
    """Whether the driver of GPU direct storage is loaded, and its library and GPU `index` support it."""
    if not GDS_DEVICE.exists():
        return False
    from fastsafetensors import cpp

    with suppress(Exception):  # a broken driver may raise anything, and then there is no GDS
        cpp.load_library_functions()
        return bool(cpp.is_cufile_found()) and cpp.is_gds_supported(index) == 1
    return False


class Buffer:
    """One file's tensors in a buffer on a device."""

    def __init__(self, path: Path, names: Sequence[str], device: str, gds: bool) -> None:
        # With set_numa, fastsafetensors 0.5 binds the whole process to the NUMA node of the first GPU that it loads to,
        # for good, which would slow down everything else.
        self._files = library().SafeTensorsFileLoader(None, device, nogds=not gds, set_numa=False)
        wanted = set(names)
        self._files.set_tensor_filter(wanted.__contains__)
        self._files.add_filenames({0: [str(path)]})
        try:
            self._buffer = self._files.copy_files_to_device()
        except BaseException:  # interrupts too: the library's files must not stay open
            self._files.close()
            raise

    def copied(self, name: str) -> Any:
        return self._buffer.get_tensor(name).clone()

    def close(self) -> None:
        """Free the buffer. Tensors that were handed out are copies, and stay."""
        self._buffer.close()
        self._files.close()


class FastFiles:
    """A `PieceReader` that reads whole files into the CPU's memory, one at a time, and takes ranges from there."""

    def __init__(self, loader: FastSafetensorsLoader, root: Path, specs: Sequence[WeightSpec]) -> None:
        self._loader = loader
        self._root = root
        self._specs = specs
        self._maps = MappedFiles(root)
        self._file = ""
        self._held: dict[str, np.ndarray] = {}

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        if spec.file != self._file:
            self._held, self._file = {}, ""
            mine = [each for each in self._specs if each.file == spec.file]
            tensors = self._loader.file(self._root, mine, "cpu")
            self._held = {each.name: _bytes_of(tensor) for each, tensor in zip(mine, tensors, strict=True)}
            self._file = spec.file
        return self._held[spec.name][start:stop]

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._maps.mapped(spec, start, stop)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield self.read(piece.spec, piece.start, piece.stop)


class FastSafetensorsLoader(WeightLoader):
    """The strategy `fastsafetensors`, for "cpu", "cuda" and "cuda:N".

    use_gds: use GPU direct storage (GDS) where it is there, which False forbids. gds: the same, but that True demands
    it: loading fails without it.
    """

    name = "fastsafetensors"
    not_for_jobs = "it loads whole files, for a device; strategy=multithread reads ranges in parallel"

    second_names = ("use_gds",)

    def __init__(self, use_gds: bool = True, *, gds: bool | None = None) -> None:
        if gds and not use_gds:
            raise BadSpec("strategy.gds: it demands GPU direct storage, and use_gds=False forbids it; give one of them")
        self.gds = gds if use_gds else False
        self.said = ""  # how the last file was loaded, for logs and reports

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        check_container(specs)
        library()
        yield FastFiles(self, local_root(files, self.name), specs)

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        check_container(specs)
        library()
        by_file: dict[str, list[WeightSpec]] = {}
        for spec in specs:
            by_file.setdefault(spec.file, []).append(spec)
        root = local_root(checkpoint.source, self.name)
        on_torch = device is not None and device.partition(":")[0] in ("cpu", "cuda")
        told, place = Told(device or "cpu"), placer(device)
        for mine in by_file.values():
            for spec, tensor in zip(mine, self.file(root, mine, device if on_torch else "cpu"), strict=True):
                if on_torch:
                    told.dtype(spec.dtype)
                    yield _shaped(tensor, spec)
                else:
                    yield place(_bytes_of(tensor), spec)

    def file(self, root: Path, specs: Sequence[WeightSpec], device: str | None) -> Iterator[Any]:
        """Yield the tensors of one file, on a device of torch's.

        Raises:
            BadCheckpoint: the file is shorter than it was.
            StorageError: the library cannot read it.
        """
        path, names = root / specs[0].file, [spec.own_name or spec.name for spec in specs]
        device = _with_index(device or "cpu")
        size = Folder(root).entry_of(specs[0].file).size
        for spec in specs:
            if size < spec.offset + spec.size:
                raise cut_short(spec, size)
        buffer = self._filled(path, names, device)
        try:
            for name in names:
                yield buffer.copied(name)
        finally:
            buffer.close()

    def _filled(self, path: Path, names: Sequence[str], device: str) -> Buffer:
        """Load a file's tensors into a buffer, with GDS or without it."""
        gds, why = self._wants_gds(device)
        if gds:
            try:
                buffer = self._buffer(path, names, device, True)
                self._say("with GPU direct storage")
                return buffer
            except WeightmillError:
                raise
            except Exception as error:  # the errors of the library and of the driver have no common class
                if self.gds:
                    raise StorageError(f"strategy.gds: GPU direct storage failed on {path} ({error})") from error
                why = f"GPU direct storage failed ({error})"
        self._say(f"without GPU direct storage: {why}")
        try:
            return self._buffer(path, names, device, False)
        except OSError as error:
            raise StorageError(f"reading {path}: {error}") from error
        except WeightmillError:
            raise
        except Exception as error:  # likewise: here the library could not make sense of the file
            raise BadCheckpoint(
                f"{path.name}: fastsafetensors cannot read it ({error}); strategy=lazy may say why"
            ) from error

    def _buffer(self, path: Path, names: Sequence[str], device: str, gds: bool) -> Buffer:
        return Buffer(path, names, device, gds)

    def _wants_gds(self, device: str) -> tuple[bool, str]:
        """Return whether to try GDS, and if not, why.

        Raises:
            BadSpec: it was asked for, and there is none.
        """
        if self.gds is False:
            return False, "as asked"
        if not device.startswith("cuda"):
            if self.gds:
                raise BadSpec(f"strategy.gds: GPU direct storage loads to a GPU, not to device={device}")
            return False, f"device={device}"
        if not gds_available(int(device.partition(":")[2] or 0)):
            if self.gds:
                raise BadSpec(f"strategy.gds: this machine has no GPU direct storage (no {GDS_DEVICE}, or no support)")
            return False, f"this machine has none ({GDS_DEVICE} or its library is missing)"
        return True, ""

    def _say(self, how: str) -> None:
        """Log how files are loaded, once for each way; a fallback that nobody asked for is a warning."""
        if how != self.said:
            self.said = how
            level = logging.WARNING if "failed" in how or "none" in how else logging.INFO
            log.log(level, "fastsafetensors loads %s", how)


def check_container(specs: Sequence[WeightSpec]) -> None:
    """Raise BadSpec if a file is not a safetensors file."""
    others = sorted({spec.file for spec in specs if not spec.file.endswith(".safetensors")})
    if others:
        raise BadSpec(
            f"strategy=fastsafetensors: it reads safetensors, found {', '.join(others[:3])};"
            " strategy=multithread reads it"
        )


def _with_index(device: str) -> str:
    """Return a device with its index, which the library requires; "cuda" alone is torch's current GPU."""
    torch, target = torch_device(device)
    return f"cuda:{torch.cuda.current_device()}" if target.type == "cuda" and target.index is None else device


def _bytes_of(tensor: Any) -> np.ndarray:
    import torch

    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return np.asarray(flat.numpy())


def _shaped(tensor: Any, spec: WeightSpec) -> Any:
    """Return a tensor in the shape that other strategies give it: formats of less than a byte are bytes."""
    import torch

    if spec.dtype.bits < 8:
        return tensor.view(torch.uint8).reshape(storage_shape(spec.dtype, spec.shape))
    return tensor.reshape(spec.shape)


__all__ = ["FastSafetensorsLoader", "check_container", "gds_available", "library"]
