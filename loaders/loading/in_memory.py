"""Tensors in memory as a checkpoint: `quantize` makes of them what `load_weights` makes of a file, without a copy.

A range that is read is a view of the caller's own memory; of a tensor on a GPU it is a copy of that range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.file_lists import Given
from loaders.checkpoints.tensor_names import unwrapped
from loaders.dtypes import DTYPES, DType, Shape, is_contiguous
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles, Range, Store
from loaders.strategies import WeightLoader
from loaders.strategies.base import PieceReader, TensorBytes
from loaders.words import model_type_said

PLACE = Address("memory")  # where messages say that the tensors are
FILE = "tensors"


class MemoryStore(Store):
    """A `Store` with one file, in which the tensors lie one after another, from the offsets of `starts` on."""

    address = PLACE
    is_local = False

    def __init__(self, tensors: Sequence[HeldTensor]) -> None:
        self._tensors = tensors
        self.starts = [0, *accumulate(tensor.size for tensor in tensors)]
        self._entry = Entry(FILE, self.starts[-1], "")

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        return (self._entry,)

    def find(self, name: str) -> Entry | None:
        return self._entry if name == FILE else None

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        return None

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        # Every range is one of a tensor; those without elements have none.
        index = bisect_right(self.starts, start) - 1
        if start == stop:
            return memoryview(b"")
        at = self.starts[index]
        return np.ascontiguousarray(self._tensors[index].read(start - at, stop - at)).data

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)

    def check_unchanged(self, entry: Entry) -> None:
        pass

    def local_path(self, name: str) -> Path | None:
        return None


def model_config(config: Any) -> Mapping[str, Any]:
    """Return the config.json of a model as a mapping: it may be transformers' object for it, and None is {}.

    Raises:
        BadSpec: it is something else.
    """
    if config is None or isinstance(config, Mapping):
        return config or {}
    if hasattr(config, "to_dict") and not isinstance(config, type):
        return dict(config.to_dict())
    raise BadSpec(
        f"config: expected a model's config.json as a mapping, or transformers' config, found {type(config).__name__};"
        " json.loads(Path(...).read_text()) reads one"
    )


def check_known_to_mlx(config: Mapping[str, Any]) -> None:
    """Check that a config says which model it is: mlx-lm's layers and names depend on that.

    Raises:
        BadSpec: it does not.
    """
    if not config.get("model_type"):
        raise BadSpec(
            f"config: {model_type_said(config)} is not one whose layers and names mlx-lm has; give its config.json as"
            " config="
        )


class HeldTensor:
    """A tensor of numpy's or torch's: its dtype and shape, and its bytes, strided as they lie.

    numpy has bfloat16 by ml_dtypes alone; its uint16, as which loaders give bfloat16, is refused.

    Raises:
        BadSpec: it is neither, or has no weights in memory, or a dtype that is not known.
    """

    def __init__(self, name: str, tensor: Any) -> None:
        if type(tensor).__module__.partition(".")[0] == "numpy" and isinstance(tensor, np.ndarray | np.generic):
            if tensor.dtype == np.uint16:
                raise BadSpec(
                    f"{name}: expected a dtype of weights, found numpy's uint16, as which loaders give bfloat16; load"
                    " it as torch's (device='cpu'), or give torch.from_numpy(array).view(torch.bfloat16)"
                )
            dtype, self._bytes, self.shape, self.stride = _of_numpy(np.asarray(tensor))
        elif hasattr(tensor, "untyped_storage"):
            dtype, self._bytes, self.shape, self.stride = _of_torch(name, tensor)
        else:
            raise BadSpec(f"{name}: expected a tensor of torch or an array of numpy, found {type(tensor).__name__}")
        found = next((each for each in DTYPES.values() if each.torch == dtype), None)
        if found is None:
            raise BadSpec(f"{name}: expected a dtype that checkpoints store, found {dtype}; cast it first")
        self.dtype: DType = found

    @property
    def size(self) -> int:
        """The bytes from its first element to its last."""
        return int(self._bytes.shape[0])

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same of tensors that share their elements."""
        start = self._bytes.ctypes.data if isinstance(self._bytes, np.ndarray) else self._bytes.data_ptr()
        return start, self.dtype.name, self.shape, self.stride

    def read(self, start: int, stop: int) -> np.ndarray:
        part = self._bytes[start:stop]
        return part if isinstance(part, np.ndarray) else np.asarray(part.cpu().numpy())


def _of_numpy(array: np.ndarray) -> tuple[str, Any, Shape, Shape]:
    size = array.dtype.itemsize
    is_plain = array.dtype.isnative and all(step >= 0 and step % size == 0 for step in array.strides)
    # Arrays that run backwards, or of another machine's order of bytes, are rare, and copied.
    if not is_plain:
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    stride = tuple(step // size for step in array.strides)
    flat = np.lib.stride_tricks.as_strided(array, (_extent(array.shape, stride),), (size,), writeable=False)
    return array.dtype.name, flat.view(np.uint8), array.shape, stride


def _of_torch(name: str, tensor: Any) -> tuple[str, Any, Shape, Shape]:
    import torch

    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "a meta tensor" if tensor.is_meta else str(tensor.layout) if not tensor.is_quantized else "quantized"
        raise BadSpec(f"{name}: expected a dense tensor with weights in memory, found {kind}; load or convert it first")
    held = tensor.detach()
    if held.is_neg() or held.is_conj():
        held = held.resolve_neg().resolve_conj()
    shape, stride = tuple(held.shape), tuple(held.stride())
    flat = held.as_strided((_extent(shape, stride),), (1,)).view(torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), flat if flat.device.type != "cpu" else flat.numpy(), shape, stride


def _extent(shape: Shape, stride: Shape) -> int:
    """Return the elements from the first to the last."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


class MemoryReader:
    """A `PieceReader` over tensors in memory, by their names."""

    def __init__(self, tensors: Mapping[str, HeldTensor]) -> None:
        self._tensors = tensors

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self._tensors[spec.own_name or spec.name].read(start, stop)

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.read(spec, start, spec.size if stop is None else stop)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        return (self.read(piece.spec, piece.start, piece.stop).copy() for piece in pieces)


def _on(tensor: Any, device: str | None) -> Any:
    """Return a tensor of torch on a device: itself, if it is there; arrays of numpy stay."""
    return tensor if device is None or isinstance(tensor, np.ndarray | np.generic) else tensor.to(device)


class MemoryLoader(WeightLoader):
    """The strategy of tensors in memory. Those that stay as they are, are given back themselves."""

    name = "memory"
    is_local = False

    def __init__(self, tensors: Mapping[str, Any], hold: Callable[[str, Any], HeldTensor] = HeldTensor) -> None:
        self._given = tensors
        self.held = {name: hold(name, tensor) for name, tensor in tensors.items()}

    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> AbstractContextManager[PieceReader]:
        return nullcontext(MemoryReader(self.held))

    def load_weights(
        self, file_paths: Given, device: Any = None, *, names: Iterable[str] | None = None
    ) -> dict[str, Any]:
        assert isinstance(file_paths, Checkpoint)
        wanted = None if names is None else set(names)
        return {
            spec.name: _on(self._given[spec.own_name or spec.name], device)
            for spec in file_paths.weights
            if wanted is None or spec.name in wanted
        }

    def checkpoint(self, config: Mapping[str, Any]) -> Checkpoint:
        """Return the tensors as a checkpoint of a model with a config.json; {} is none."""
        store = MemoryStore([*self.held.values()])
        specs, first = list[WeightSpec](), dict[Any, str]()
        for (name, held), offset in zip(self.held.items(), store.starts, strict=False):
            alias = first.setdefault(held.key, name) if held.size else name
            strided = not is_contiguous(held.shape, held.stride)
            specs.append(
                WeightSpec(
                    name=name, dtype=held.dtype, shape=held.shape, file=FILE, offset=offset, size=held.size,
                    stride=held.stride if strided else None, alias=None if alias == name else alias,
                )
            )  # fmt: skip
        weights, notes = unwrapped(tuple(specs))
        entry = store.list()[0]
        return Checkpoint(
            source=PinnedFiles(store, [entry]), container="pytorch", files=(entry,), weights=weights,
            config=config, aux=(), notes=tuple(notes),
        )  # fmt: skip
