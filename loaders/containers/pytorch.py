"""The reader of PyTorch files (`.bin`, `.pt`, `.pth`): a pickle that describes tensors, and their storages as raw
bytes.

Both forms are read in place: the zip of torch >= 1.6, whose members are stored uncompressed, and the legacy stream
before it. The pickle is run by an unpickler that knows a few harmless names and calls nothing else, so that a file that
wants to run code is refused before it does (CWE-502). What it describes is checked against the file's real size.

Formats: torch/serialization.py (_save, _legacy_save) and torch/_utils.py (_rebuild_tensor_v2, _v3).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, TypeVar

from loaders.containers.pytorch_unpickle import Refused, Storage, Tensor, unpickle
from loaders.dtypes import DType, is_contiguous
from loaders.errors import BadCheckpoint
from loaders.limits import (
    PICKLE_BYTES,
    PICKLE_LEGACY_OPS,
    PICKLE_LINE,
    PICKLE_OPS,
    PICKLE_OPS_PER_MEMBER,
    PICKLE_SHARED,
    PICKLE_VIEWS,
    TINY,
    ZIP_DIRECTORY,
    ZIP_MEMBERS,
    check_name,
    check_tensors,
    first_twice,
    shown,
)  # fmt: skip
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles

T = TypeVar("T")
ENCRYPTED, PATCHED, STRONGLY_ENCRYPTED = 1, 1 << 5, 1 << 6  # flags of a zip's member
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # MAGIC_NUMBER in torch/serialization.py
NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module")  # where trainers put the weights
MOST_LEVELS = 4  # of such keys one in another


@dataclass(frozen=True, slots=True)
class State:
    """What a file holds: its tensors, the keys under which they lie in it, and other keys that also hold tensors."""

    specs: tuple[WeightSpec, ...]
    keys: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


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
        check_tensors(len(tensors), "it")
        specs = [_spec(check_name(name), tensor, file, places, size) for name, tensor in tensors.items()]
        found_specs = _with_aliases(specs)
        _check_sharing(found_specs, size)
        return State(found_specs, keys, beside)

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
        except Refused as error:
            raise BadCheckpoint(
                f"{file}: its pickle asks for {error}, which weights do not need; it may want to run code."
                " Not loaded: convert it to safetensors where you trust it"
            ) from None
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{file}: {error}") from None
        # What Python's pickle and zipfile raise for damaged files. The unpickler runs nothing but what is listed in
        # this file, so that none of these hides a fault elsewhere.
        except (
            pickle.UnpicklingError, OSError, zipfile.BadZipFile, EOFError, ValueError, KeyError, IndexError, TypeError,
            AttributeError, struct.error, MemoryError, RecursionError, OverflowError, NotImplementedError, RuntimeError,
        ) as error:  # fmt: skip
            raise BadCheckpoint(
                f"{file}: not a PyTorch file, or truncated ({type(error).__name__}: {str(error)[:200]}); fetch it again"
            ) from None


# --- the two forms


def _read_zip(handle: IO[bytes], size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read a zip: the pickled object, and the place of each storage's bytes, key -> (offset, size)."""
    with open_zip(handle) as archive:
        listed = archive.infolist()
        members = {info.filename: info for info in listed}
        if len(members) < len(listed):
            twice = first_twice([info.filename for info in listed])
            raise BadCheckpoint(f"its member {shown(twice)} appears twice; do not trust this file")
        pickled = next((i for name, i in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if pickled is None:
            raise BadCheckpoint("a zip without data.pkl: not weights saved by torch")
        prefix = pickled.filename.removesuffix("data.pkl")
        for info in listed:
            _check_member(info)
        if pickled.file_size > PICKLE_BYTES:
            raise BadCheckpoint(f"data.pkl claims {pickled.file_size} bytes, at most {PICKLE_BYTES} are read")
        byteorder = members.get(prefix + "byteorder")
        if byteorder is not None and (byteorder.file_size > PICKLE_LINE or archive.read(byteorder) != b"little"):
            raise BadCheckpoint("its numbers are big-endian; save it again on a little-endian machine")
        raw = archive.read(pickled)
        found = unpickle(io.BytesIO(raw), len(raw), PICKLE_OPS + PICKLE_OPS_PER_MEMBER * len(listed))
        places = {
            name.removeprefix(prefix + "data/"): (_data_offset(handle, info), info.file_size)
            for name, info in members.items()
            if name.startswith(prefix + "data/")
        }
    return found, places


def open_zip(handle: IO[bytes]) -> zipfile.ZipFile:
    """Open a zip whose directory has a bounded number of members.

    Raises:
        BadCheckpoint: it has more, or is damaged.
    """
    try:
        # zipfile makes an object for each member before it tells how many they are.
        end = zipfile._EndRecData(handle)  # type: ignore[attr-defined]
        if (end is not None and max(end[3], end[4]) > ZIP_MEMBERS) or (end is not None and end[5] > ZIP_DIRECTORY):
            raise BadCheckpoint(f"a zip of {max(end[3], end[4])} members, at most {ZIP_MEMBERS} are read")
        return zipfile.ZipFile(handle)
    # The last two are what zipfile raises for versions and for names that it cannot read.
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise BadCheckpoint(f"it begins as a zip, but {error}: it is cut short or damaged; fetch it again") from None


def _check_member(info: zipfile.ZipInfo) -> None:
    """Raise BadCheckpoint unless a member's bytes lie in the file as they are.

    torch.save never compresses. Requiring that also bounds memory: a small compressed member could expand to any size.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise BadCheckpoint("its members are compressed, so their bytes cannot be read in place; save it again")
    if (
        info.flag_bits & (ENCRYPTED | PATCHED | STRONGLY_ENCRYPTED)
        or info.extract_version > zipfile.MAX_EXTRACT_VERSION
    ):
        raise BadCheckpoint(
            f"its member {shown(info.filename)} is encrypted, a patch, or of version {info.extract_version / 10} of the"
            " format; not weights saved by torch"
        )


def _data_offset(handle: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: after its local header, whose extra field differs from the directory's."""
    handle.seek(info.header_offset)
    local = handle.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise BadCheckpoint(f"{shown(info.filename)}: no member where the directory says")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def _read_legacy(handle: IO[bytes], size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read a legacy file: magic, protocol, system, object, storage keys; then for each key a count and its bytes."""
    magic = unpickle(handle, size, PICKLE_LINE)
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise BadCheckpoint("neither a zip nor a legacy file of torch")
    unpickle(handle, size, PICKLE_LINE)
    system = unpickle(handle, size, PICKLE_LINE)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise BadCheckpoint("its numbers are big-endian; save it again on a little-endian machine")
    storages: dict[str, Storage] = {}
    found = unpickle(handle, size, PICKLE_LEGACY_OPS, storages)
    keys = unpickle(handle, size, PICKLE_LEGACY_OPS)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadCheckpoint(f"its list of storages is {shown(keys)}; truncated? fetch it again")
    places = {}
    for key in keys:
        if key not in storages:
            raise BadCheckpoint(f"its storage {shown(key)} is of no tensor; fetch it again")
        storage = storages[key]
        [count] = struct.unpack("<q", handle.read(8))
        num_bytes = storage.dtype.item_bytes * count
        if count < 0 or handle.tell() + num_bytes > size:
            raise BadCheckpoint(f"storage {shown(key)} of {count} items leaves the file; truncated? fetch it again")
        places[key] = (handle.tell(), num_bytes)
        handle.seek(num_bytes, io.SEEK_CUR)
    return found, places


# --- from the pickled object to specs


def _state_dict(found: Any) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
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
        keys = list(found)[:8] if isinstance(found, dict) else []
        kinds: Any = [key if type(key) is str and len(key) < PICKLE_LINE else shown(key) for key in keys]
        kinds = kinds if isinstance(found, dict) else type(found).__name__
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


def _tensors(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _spec(name: str, tensor: Tensor, file: str, places: dict[str, tuple[int, int]], size: int) -> WeightSpec:
    """Check that a tensor lies within its storage and that within the file, and return the spec of its bytes."""
    place = places.get(tensor.storage.key)
    if place is None:
        raise BadCheckpoint(f"{shown(name)}: its storage {shown(tensor.storage.key)} is not in the file")
    start, storage_bytes = place
    item, numel = tensor.dtype.item_bytes, math.prod(tensor.shape)
    if numel * item > max(storage_bytes, TINY):
        raise BadCheckpoint(
            f"{shown(name)}: {tensor.dtype} {list(tensor.shape)} in a storage of {storage_bytes} bytes, each of which"
            " it would have many times; save it again as what it is"
        )
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True)) if numel else -1
    span = (last + 1) * item
    if tensor.offset * item + span > storage_bytes or start + storage_bytes > size:
        raise BadCheckpoint(
            f"{shown(name)}: {tensor.dtype} {list(tensor.shape)} at item {tensor.offset} leaves its storage of"
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


def _check_sharing(specs: Sequence[WeightSpec], size: int) -> None:
    """Raise BadCheckpoint if the tensors of a file of `size` bytes have its bytes many times, each in a little view."""
    views = sum(spec.dtype.item_bytes * spec.numel() for spec in specs if spec.alias is None)
    whole = sum(spec.dtype.item_bytes * spec.numel() for spec in specs)
    for what, taken, times in (("views", views, PICKLE_VIEWS), ("tensors", whole, PICKLE_SHARED)):
        if taken > times * size + TINY:
            raise BadCheckpoint(
                f"its {what} have {taken} bytes in a file of {size}, at most {times} times as many are read; they share"
                " storages: save each tensor as what it is (tensor.clone())"
            )
