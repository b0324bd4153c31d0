"""The reader of PyTorch files (`.bin`, `.pt`, `.pth`): a pickle that describes tensors, and their storages as raw
bytes.

Both forms are read in place: the zip of torch >= 1.6, whose members are stored uncompressed, and the legacy stream
before it. The pickle is run by an unpickler that knows a few harmless names and calls nothing else, so that a file that
wants to run code is refused before it does (CWE-502). What it describes is checked against the file's real size.

Formats: torch/serialization.py (_save, _legacy_save) and torch/_utils.py (_rebuild_tensor_v2, _v3).
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Any, ClassVar, TypeVar

from loaders.dtypes import BY_TORCH_NAME, DTYPES, DType, Shape, is_contiguous
from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles

T = TypeVar("T")
# The most bytes of data.pkl that are read. It is read whole, so a hostile zip must not choose how much memory that
# takes; real ones have a few hundred bytes per tensor.
PICKLE_LIMIT = 1 << 30
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # MAGIC_NUMBER in torch/serialization.py
NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module")  # where trainers put the weights
MOST_LEVELS = 4  # of such keys one in another
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip


# Operations that build objects of arbitrary classes, beside REDUCE, which is narrowed below.
OBJECT_CODES = [
    code[0]
    for code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4)
]


@dataclass(frozen=True)
class _Storage:
    """A torch storage: a run of numbers of one dtype in the file, of which tensors are views."""

    key: str
    dtype: DType
    num_items: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it; offset and stride count elements of the storage."""

    storage: _Storage
    dtype: DType
    offset: int
    shape: Shape
    stride: Shape


@dataclass(frozen=True, slots=True)
class State:
    """What a file holds: its tensors, the keys under which they lie in it, and other keys that also hold tensors."""

    specs: tuple[WeightSpec, ...]
    keys: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


class _Refused(Exception):
    """The pickle asks for something that weights do not need."""


def read_specs(files: PinnedFiles, file: str) -> tuple[WeightSpec, ...]:
    """Read the tensors of one file, in the order of their bytes. One that shares an earlier one's bytes names it.

    Raises:
        BadCheckpoint: not a PyTorch file, truncated, wants to run code, tensors outside their storage, ...
    """
    return read_state(files, file).specs


def read_state(files: PinnedFiles, file: str) -> State:
    """Read the tensors of one file as `read_specs`, and where in the file they lie. Errors are the same."""
    size = files.entry(file).size

    def state_of(found: Any, places: dict[str, tuple[int, int]]) -> State:
        tensors, keys, beside = _state_dict(found)
        specs = [_spec(name, tensor, file, places, size) for name, tensor in tensors.items()]
        return State(_with_aliases(specs), keys, beside)

    return _read(files, file, state_of)


def read_values(files: PinnedFiles, file: str) -> dict[str, Any]:
    """Read the plain values of a file of modules (see `_flat`): "module.key" -> int, bool, str, tuple or DType.

    Raises:
        BadCheckpoint: as `read_specs`.
    """
    kinds = (int, bool, str, tuple, DType)
    return _read(files, file, lambda found, _: {n: v for n, v in _flat(found).items() if isinstance(v, kinds)})


def _read(files: PinnedFiles, file: str, use: Callable[[Any, dict[str, tuple[int, int]]], T]) -> T:
    size = files.entry(file).size
    with files.open(file) as handle:
        try:
            read = _read_zip if zipfile.is_zipfile(handle) else _read_legacy
            handle.seek(0)
            return use(*read(handle, size))
        except _Refused as error:
            raise BadCheckpoint(
                f"{file}: its pickle asks for {error}, which weights do not need; it may want to run code."
                " Not loaded: convert it to safetensors where you trust it"
            ) from None
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{file}: {error}") from None
        # What Python's pickle and zipfile raise for damaged files. The unpickler runs nothing but what is listed in
        # this file, so that none of these hides a fault elsewhere.
        except (
            pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError, IndexError, TypeError,
            AttributeError, struct.error, MemoryError, RecursionError, OverflowError,
        ) as error:  # fmt: skip
            raise BadCheckpoint(
                f"{file}: not a PyTorch file, or truncated ({type(error).__name__}: {error}); fetch it again"
            ) from None


# --- the two forms


def _read_zip(handle: IO[bytes], size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read a zip: the pickled object, and the place of each storage's bytes, key -> (offset, size)."""
    with zipfile.ZipFile(handle) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickled = next((i for name, i in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if pickled is None:
            raise BadCheckpoint("a zip without data.pkl: not weights saved by torch")
        prefix = pickled.filename.removesuffix("data.pkl")
        # torch.save never compresses. Requiring that also bounds memory: a small compressed member could expand to
        # any size.
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise BadCheckpoint("its members are compressed, so their bytes cannot be read in place; save it again")
        if pickled.file_size > PICKLE_LIMIT:
            raise BadCheckpoint(f"data.pkl claims {pickled.file_size} bytes, at most {PICKLE_LIMIT} are read")
        byteorder = members.get(prefix + "byteorder")
        if byteorder is not None and archive.read(byteorder) != b"little":
            raise BadCheckpoint("its numbers are big-endian; save it again on a little-endian machine")
        found = _unpickle(io.BytesIO(archive.read(pickled)))
        places = {
            name.removeprefix(prefix + "data/"): (_data_offset(handle, info), info.file_size)
            for name, info in members.items()
            if name.startswith(prefix + "data/")
        }
    return found, places


def _data_offset(handle: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: after its local header, whose extra field differs from the directory's."""
    handle.seek(info.header_offset)
    local = handle.read(30)
    if local[:4] != b"PK\x03\x04":
        raise BadCheckpoint(f"{info.filename}: no member where the directory says")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def _read_legacy(handle: IO[bytes], size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read a legacy file: magic, protocol, system, object, storage keys; then for each key a count and its bytes."""
    if _unpickle(handle) != LEGACY_MAGIC:
        raise BadCheckpoint("neither a zip nor a legacy file of torch")
    _unpickle(handle)
    system = _unpickle(handle)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise BadCheckpoint("its numbers are big-endian; save it again on a little-endian machine")
    storages: dict[str, _Storage] = {}
    found = _unpickle(handle, storages)
    places = {}
    for key in _unpickle(handle):
        storage = storages[key]
        [count] = struct.unpack("<q", handle.read(8))
        num_bytes = storage.dtype.item_bytes * count
        if count < 0 or handle.tell() + num_bytes > size:
            raise BadCheckpoint(f"storage {key!r} of {count} items leaves the file; truncated? fetch it again")
        places[key] = (handle.tell(), num_bytes)
        handle.seek(num_bytes, io.SEEK_CUR)
    return found, places


# --- the pickle


def _unpickle(stream: IO[bytes], storages: dict[str, _Storage] | None = None) -> Any:
    """Run one pickle of the stream; `storages` collects those that it refers to, by key."""
    return _Unpickler(stream, {} if storages is None else storages).load()


class _Unpickler(pickle._Unpickler):
    """Python's own pickle machine with a closed list of names.

    The one in C cannot be narrowed operation by operation, and can be made to allocate memory at will.
    """

    def __init__(self, stream: IO[bytes], storages: dict[str, _Storage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self.stack: list[Any]
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        known = ALLOWED.get((module, name))
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageType(DTYPES[STORAGES[name]])
        if module == "torch" and name in BY_TORCH_NAME:
            return BY_TORCH_NAME[name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, num_items = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError(f"unknown persistent id {pid!r}")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("it holds views of storages, a form that torch left in 2017; save it again")
        return self._storages.setdefault(key, _Storage(key, storage_type.dtype, num_items))

    # REDUCE and BUILD can call or change what is already there, and are narrowed; the other operations that build
    # objects are refused.

    def load_reduce(self) -> None:
        # find_class allows only these names, but a storage type or dtype could be called too.
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is known for known in ALLOWED.values()):
            raise _Refused(f"a call of {function!r}")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        self.stack.pop()  # state dicts carry attributes (`_metadata`) that say nothing of weights
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise _Refused(f"changing {type(self.stack[-1]).__name__} objects")

    def load_other_object(self) -> None:
        raise _Refused("objects of other classes")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        **dict.fromkeys(OBJECT_CODES, load_other_object),
    }


@dataclass(frozen=True)
class _StorageType:
    """A class of torch's such as FloatStorage: only its dtype is of interest."""

    dtype: DType


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: DType | None = None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(stride):
        raise ValueError(f"a tensor with offset {offset}, shape {shape}, stride {stride}")
    return _Tensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(stride))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _tensor(storage, offset, shape, stride)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    if not isinstance(dtype, DType):
        raise ValueError(f"a tensor of dtype {dtype!r}")
    return _tensor(storage, offset, shape, stride, dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


# --- from the pickled object to specs


def _state_dict(found: Any) -> tuple[dict[str, _Tensor], tuple[str, ...], tuple[str, ...]]:
    """Find the tensors by name, the keys that lead to them, and the other keys that hold tensors.

    A trainer's checkpoint holds the model some levels down, beside an optimizer, a loss, averaged weights (EMA).
    """
    keys, beside = list[str](), list[str]()
    # A pickle can hold itself, so the levels are counted.
    for _ in range(MOST_LEVELS):
        inner = [key for key in NESTED_KEYS if isinstance(found, dict) and _holds_tensors(found.get(key))]
        if not inner:
            break
        keys.append(inner[0])
        beside += [
            key for key, value in found.items() if key != inner[0] and isinstance(key, str) and _holds_tensors(value)
        ]
        found = found[inner[0]]
    tensors = _tensors(found) or _tensors(_flat(found))
    if not tensors:
        kinds = list(found)[:8] if isinstance(found, dict) else type(found).__name__
        what = ", which is the state of an optimizer" if kinds == ["state", "param_groups"] else ""
        raise BadCheckpoint(
            f"it holds no state dict of tensors, at the top or under {', '.join(NESTED_KEYS)}; found {kinds}{what}"
        )
    return tensors, tuple(keys), tuple(beside)


def _holds_tensors(value: Any, levels: int = MOST_LEVELS) -> bool:
    """Whether a value is a state dict, or holds one where a model is looked for."""
    if not isinstance(value, dict) or not levels:
        return False
    return bool(_tensors(value)) or any(_holds_tensors(value.get(key), levels - 1) for key in NESTED_KEYS)


def _flat(found: Any) -> dict[str, Any]:
    """Flatten a dict of modules, as hqq saves them ({module: {key: value}}), to names "module.key".

    Other dicts of dicts are several state dicts, such as those of two models, whose keys are names with dots.
    """
    if not isinstance(found, dict):
        return {}
    modules = {name: values for name, values in found.items() if isinstance(name, str) and isinstance(values, dict)}
    if any(isinstance(key, str) and "." in key for values in modules.values() for key in values):
        return {}
    return {
        f"{module}.{key}": value
        for module, values in modules.items()
        for key, value in values.items()
        if isinstance(key, str)
    }


def _tensors(found: Any) -> dict[str, _Tensor]:
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _spec(name: str, tensor: _Tensor, file: str, places: dict[str, tuple[int, int]], size: int) -> WeightSpec:
    """Check that a tensor lies within its storage and that within the file, and return the spec of its bytes."""
    place = places.get(tensor.storage.key)
    if place is None:
        raise BadCheckpoint(f"{name!r}: its storage {tensor.storage.key!r} is not in the file")
    start, storage_bytes = place
    item, numel = tensor.dtype.item_bytes, math.prod(tensor.shape)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True)) if numel else -1
    span = (last + 1) * item
    if tensor.offset * item + span > storage_bytes or start + storage_bytes > size:
        raise BadCheckpoint(
            f"{name!r}: {tensor.dtype} {list(tensor.shape)} at item {tensor.offset} leaves its storage of"
            f" {storage_bytes} bytes, or that leaves the file of {size}; truncated? fetch it again"
        )
    stride = None if is_contiguous(tensor.shape, tensor.stride) else tensor.stride
    return WeightSpec(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=file,
        offset=start + tensor.offset * item,
        size=span,
        stride=stride,
    )


def _with_aliases(specs: list[WeightSpec]) -> tuple[WeightSpec, ...]:
    """Sort specs by place; a tensor with the same bytes as an earlier one names that one as its alias."""
    first: dict[tuple[Any, ...], str] = {}
    found = []
    for spec in sorted(specs, key=lambda s: (s.offset, s.size, s.name)):
        key = (spec.offset, spec.dtype, spec.shape, spec.stride)
        is_shared = spec.numel() > 0 and key in first
        found.append(replace(spec, alias=first[key]) if is_shared else spec)
        first.setdefault(key, spec.name)
    return tuple(found)
