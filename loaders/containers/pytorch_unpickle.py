"""The machine that runs a PyTorch file's pickle: it knows a few harmless names and calls nothing else.

What comes of it are values: dicts, lists, texts, numbers, and descriptions of storages and tensors. A pickle that asks
for more is `Refused`, one that no torch wrote raises what Python's own machine raises.

Formats: torch/serialization.py (persistent ids) and torch/_utils.py (_rebuild_tensor_v2, _v3).
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from loaders.dtypes import BY_TORCH_NAME, DTYPES, DType, Shape
from loaders.limits import MOST_NUMBERS, PICKLE_ARGUMENTS, PICKLE_KEY, PICKLE_LINE, check_shape, shown

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip


# Operations that build objects of arbitrary classes, beside REDUCE, which is narrowed below; and those that hash, or
# take memory before they read.
OBJECT_CODES = [
    code[0]
    for code in (
        pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
        pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
    )
]  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A torch storage: a run of numbers of one dtype in the file, of which tensors are views."""

    key: str
    dtype: DType
    num_items: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as the pickle describes it; offset and stride count elements of the storage."""

    storage: Storage
    dtype: DType
    offset: int
    shape: Shape
    stride: Shape


class Refused(Exception):
    """The pickle asks for something that weights do not need."""


def unpickle(stream: IO[bytes], size: int, ops: int, storages: dict[str, Storage] | None = None) -> Any:
    """Run one pickle of the stream, of `size` bytes; `storages` collects those that it refers to, by key."""
    return _Unpickler(_Bounded(stream, size, ops), {} if storages is None else storages).load()


class _Bounded:
    """The stream of a pickle: no read is longer than what is left, no line than PICKLE_LINE, and reads are counted.

    Each operation reads at least once, so that their number bounds the operations, and the memory that they take.
    """

    def __init__(self, stream: IO[bytes], size: int, ops: int) -> None:
        self._stream = stream
        self._size = size
        self._left = 2 * ops

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more operations than weights need")

    def read(self, count: int) -> bytes:
        self._count()
        if count > 64 and count > self._size - self._stream.tell():
            raise ValueError(f"{count} bytes, which the file does not have")
        return self._stream.read(count)

    def readline(self) -> bytes:
        self._count()
        found = self._stream.readline(PICKLE_LINE)
        if len(found) == PICKLE_LINE:
            raise ValueError(f"a line of {PICKLE_LINE} bytes")
        return found


class _Unpickler(pickle._Unpickler):
    """Python's own pickle machine with a closed list of names.

    The one in C cannot be narrowed operation by operation, and can be made to allocate memory at will. A tuple can hold
    itself twice, and that again, so that to hash, compare or print it takes for ever: keys are texts or small whole
    numbers, and no value is printed. The hashes of large numbers can be made equal, which those of texts cannot.
    """

    def __init__(self, stream: _Bounded, storages: dict[str, Storage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self.read: Callable[[int], bytes]
        self.readline: Callable[[], bytes]
        self.stack: list[Any]
        self.memo: dict[int, Any]
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        known = ALLOWED.get((module, name))
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageType(DTYPES[STORAGES[name]])
        if module == "torch" and name in BY_TORCH_NAME:
            return BY_TORCH_NAME[name]
        raise Refused(f"{shown(module)}.{shown(name)}".replace("'", ""))

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) < 5:
            raise ValueError(f"a persistent id that is {shown(pid)}")
        kind, storage_type, key, _location, num_items = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError("a persistent id of no storage")
        if type(num_items) is not int or num_items < 0:
            raise ValueError(f"a storage of {shown(num_items)} items")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("it holds views of storages, a form that torch left in 2017; save it again")
        return self._storages.setdefault(key, Storage(key, storage_type.dtype, num_items))

    # REDUCE and BUILD can call or change what is already there, and are narrowed; the other operations that build
    # objects are refused.

    def load_reduce(self) -> None:
        # find_class allows only these names, but a storage type or dtype could be called too.
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is known for known in ALLOWED.values()):
            raise Refused(f"a call of {shown(function)}")
        if type(arguments) is not tuple or len(arguments) > PICKLE_ARGUMENTS:
            raise ValueError(f"a call with {shown(arguments)}")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        self.stack.pop()  # state dicts carry attributes (`_metadata`) that say nothing of weights
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise Refused(f"changing {type(self.stack[-1]).__name__} objects")

    def load_frame(self) -> None:
        """Read past a frame's length: Python's machine would take all of it in one read, past all counts and bounds."""
        self.read(8)

    def load_put(self) -> None:
        index = int(self.readline())
        if not 0 <= index <= PICKLE_KEY:
            raise ValueError(f"a place in its memo that is {shown(index)}")
        self.memo[index] = self.stack[-1]

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        self._as_python(pickle.SETITEM)

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        self._as_python(pickle.SETITEMS)

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        self._as_python(pickle.DICT)

    def _as_python(self, code: bytes) -> None:
        pickle._Unpickler.dispatch[code[0]](self)  # type: ignore[arg-type]

    def load_other_object(self) -> None:
        raise Refused("objects of other classes")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.FRAME[0]: load_frame,
        pickle.PUT[0]: load_put,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        **dict.fromkeys(OBJECT_CODES, load_other_object),
    }


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises ValueError if a key is neither text, bytes, nor a whole number up to PICKLE_KEY."""
    for key in keys:
        if type(key) not in (str, bytes, int, bool, type(None)):
            raise ValueError(f"a key that is a {type(key).__name__}")
        if type(key) is int and abs(key) > PICKLE_KEY:
            raise ValueError(f"a key that is {shown(key)}, at most {PICKLE_KEY} is read")


@dataclass(frozen=True)
class _StorageType:
    """A class of torch's such as FloatStorage: only its dtype is of interest."""

    dtype: DType


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: DType | None = None) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    sizes, steps = check_shape(shape), stride
    is_whole = type(offset) is int and 0 <= offset <= MOST_NUMBERS and isinstance(steps, list | tuple)
    if not is_whole or len(sizes) != len(steps) or not all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in steps):
        raise ValueError(f"a tensor with offset {shown(offset)}, shape {shown(shape)}, stride {shown(stride)}")
    return Tensor(storage, dtype or storage.dtype, offset, sizes, tuple(steps))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    return _tensor(storage, offset, shape, stride)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if not isinstance(dtype, DType):
        raise ValueError(f"a tensor of dtype {shown(dtype)}")
    return _tensor(storage, offset, shape, stride, dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _size(values: Any = ()) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"a size that is {shown(values)}")
    return tuple(values)


def _ordered(rows: Any = ()) -> collections.OrderedDict[Any, Any]:
    """Make an OrderedDict; Python 2 gave its rows of keys and values to the call."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        raise ValueError("a dict of no rows")
    _check_keys(row[0] for row in rows)
    return collections.OrderedDict(rows)


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
}
