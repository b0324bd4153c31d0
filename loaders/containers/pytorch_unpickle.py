"""The machine that runs a PyTorch file's pickle: it knows a few harmless names and calls nothing else.

What comes of it are values: dicts, lists, texts, numbers, and descriptions of storages and tensors. A pickle that asks
for more is `Refused`, one that no torch wrote raises ValueError, IndexError, TypeError or KeyError. Operations and
their arguments are read by Python's pickletools, which runs none of them; what they do is here.

Formats: torch/serialization.py (persistent ids) and torch/_utils.py (_rebuild_tensor_v2, _v3); Python's pickletools.py,
whose text says of each operation what it does.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pickle import STOP
from types import FunctionType
from typing import IO, Any

from loaders.dtypes import BY_TORCH_NAME, DTYPES, DType, Shape
from loaders.limits import MOST_NUMBERS, PICKLE_ARGUMENTS, PICKLE_KEY, PICKLE_LINE, check_shape, shown

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip

TOO_MANY = "more operations than weights need"
SEQUENCE = (list, tuple)  # made once: a file has thousands of tensors
PROTOCOL = 5  # the newest of pickle's, as of Python 3.14


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
    return _Machine({} if storages is None else storages).run(_Bounded(stream, size, ops))


class _Bounded:
    """The stream of a pickle: no read is longer than what is left, no line than PICKLE_LINE, and reads are counted.

    Each operation reads at least once, so that their number bounds the operations, and the memory that they take.
    """

    __slots__ = ("_left", "_read", "_readline", "_size", "_tell")

    def __init__(self, stream: IO[bytes], size: int, ops: int) -> None:
        self._read, self._readline, self._tell = stream.read, stream.readline, stream.tell
        self._size = size
        self._left = 2 * ops

    def read(self, count: int) -> bytes:
        self._left = left = self._left - 1
        if left < 0:
            raise ValueError(TOO_MANY)
        if count > 64 and count > self._size - self._tell():
            raise ValueError(f"{count} bytes, which the file does not have")
        return self._read(count)

    def readline(self) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError(TOO_MANY)
        found = self._readline(PICKLE_LINE)
        if len(found) == PICKLE_LINE:
            raise ValueError(f"a line of {PICKLE_LINE} bytes")
        return found


class _Machine:
    """The stack, the stacks below its marks, and the memo, on which operations work.

    A tuple can hold itself twice, and that again, so that to hash, compare or print it takes for ever: keys are texts
    or small whole numbers, and no value is printed. The hashes of large numbers can be made equal, which those of texts
    cannot.
    """

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self, stream: _Bounded) -> Any:
        """Run operations up to STOP, and return what they leave on the stack."""
        while (code := stream.read(1)) != STOP:
            known = OPERATIONS.get(code)
            if known is None:
                raise ValueError(f"no operation {code!r}" if code else "it ends before its last operation")
            read_argument, step = known
            argument = None if read_argument is None else read_argument(stream)
            if step is None:
                self.stack.append(argument)
            else:
                step(self, argument)
        return self.stack.pop()

    def above_mark(self) -> list[Any]:
        """Take off what is above the last mark, and the mark."""
        found = self.stack
        self.stack = self.below.pop()
        return found

    def last(self, kind: type) -> Any:
        """Return the last value of the stack, which an operation changes and which therefore must be of a kind."""
        found = self.stack[-1]
        if not isinstance(found, kind):
            raise ValueError(f"a {kind.__name__} that is a {type(found).__name__}")
        return found


def _refuse(_: _Machine, __: object) -> None:
    raise Refused("objects of other classes")


def _mark(machine: _Machine, _: None) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _: None) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.above_mark()


def _gather(machine: _Machine, kind: Callable[[list[Any]], Any]) -> None:
    values = machine.above_mark()
    machine.stack.append(kind(values))


def _protocol(_: _Machine, version: int) -> None:
    if version > PROTOCOL:
        raise ValueError(f"a pickle of protocol {version}, at most {PROTOCOL} is read")


def _python_2_text(machine: _Machine, text: str) -> None:
    """Push a text of Python 2, whose bytes pickletools takes for Latin-1; names of tensors are UTF-8."""
    machine.stack.append(text.encode("latin-1").decode())


def _tuple_of(count: int) -> Step:
    def step(machine: _Machine, _: None) -> None:
        if len(machine.stack) < count:
            raise ValueError(f"a tuple of {count} values, of which there are {len(machine.stack)}")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _append(machine: _Machine, _: None) -> None:
    value = machine.stack.pop()
    machine.last(list).append(value)


def _extend(machine: _Machine, _: None) -> None:
    values = machine.above_mark()
    machine.last(list).extend(values)


def _set_item(machine: _Machine, _: None) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.last(dict).update(_pairs([key, value]))


def _set_items(machine: _Machine, _: None) -> None:
    values = machine.above_mark()
    machine.last(dict).update(_pairs(values))


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Pair keys and values that alternate."""
    _check_keys(values[::2])
    return zip(values[::2], values[1::2], strict=True)


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _put_anywhere(machine: _Machine, index: int) -> None:
    """Put a value into the memo at a place that is written in digits, and could be of any size."""
    if not 0 <= index <= PICKLE_KEY:
        raise ValueError(f"a place in its memo that is {shown(index)}")
    _put(machine, index)


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _call(machine: _Machine, _: None) -> None:
    """Call what may be called. The functions of ALLOWED are the only ones that get on a stack."""
    arguments = machine.stack.pop()
    function = machine.stack[-1]
    if type(function) is not FunctionType:
        raise Refused(f"a call of {shown(function)}")
    if type(arguments) is not tuple or len(arguments) > PICKLE_ARGUMENTS:
        raise ValueError(f"a call with {shown(arguments)}")
    machine.stack[-1] = function(*arguments)


def _leave_state(machine: _Machine, _: None) -> None:
    """Drop an object's state: state dicts carry attributes (`_metadata`) that say nothing of weights."""
    machine.stack.pop()
    if not isinstance(machine.stack[-1], collections.OrderedDict):
        raise Refused(f"changing {type(machine.stack[-1]).__name__} objects")


def _global(machine: _Machine, words: str) -> None:
    module, _, name = words.partition(" ")
    machine.stack.append(_named(module, name))


def _stack_global(machine: _Machine, _: None) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("a name that is no text")
    machine.stack.append(_named(module, name))


def _named(module: str, name: str) -> Any:
    """Return what a name in a pickle stands for here. Nothing is imported."""
    known = ALLOWED.get((module, name))
    if known is not None:
        return known
    if module in ("torch", "torch.storage") and name in STORAGES:
        return _StorageType(DTYPES[STORAGES[name]])
    if module == "torch" and name in BY_TORCH_NAME:
        return BY_TORCH_NAME[name]
    raise Refused(f"{shown(module)}.{shown(name)}".replace("'", ""))


def _persistent(machine: _Machine, _: None) -> None:
    """Replace a persistent id, which torch makes of a storage, by that storage."""
    pid = machine.stack.pop()
    if type(pid) is not tuple or len(pid) < 5:
        raise ValueError(f"a persistent id that is {shown(pid)}")
    kind, storage_type, key, _location, num_items = pid[:5]
    if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
        raise ValueError("a persistent id of no storage")
    if type(num_items) is not int or num_items < 0:
        raise ValueError(f"a storage of {shown(num_items)} items")
    if len(pid) > 5 and pid[5] is not None:
        raise ValueError("it holds views of storages, a form that torch left in 2017; save it again")
    machine.stack.append(machine.storages.setdefault(key, Storage(key, storage_type.dtype, num_items)))


def _persistent_text(machine: _Machine, text: str) -> None:
    """Refuse a persistent id of protocol 0, which torch never wrote; a zip that is cut short begins as one."""
    machine.stack.append(text)
    _persistent(machine, None)


Step = Callable[[_Machine, Any], None]
# Operations whose argument is the value, and the others that weights need. All others are refused: those that build
# objects of any class (INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1 and the like), and sets, which hash, and buffers.
VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
)  # fmt: skip
STEPS: dict[str, Step | None] = {
    **dict.fromkeys(VALUES),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _python_2_text),
    "LIST": lambda machine, _: _gather(machine, list),
    "DICT": lambda machine, _: _gather(machine, lambda values: dict(_pairs(values))),
    "TUPLE": lambda machine, _: _gather(machine, tuple),
    **{f"TUPLE{count}": _tuple_of(count) for count in (1, 2, 3)},
    "APPEND": _append,
    "APPENDS": _extend,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.above_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    "PUT": _put_anywhere,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "PERSID": _persistent_text,
    "BINPERSID": _persistent,
    "REDUCE": _call,
    "BUILD": _leave_state,
    "PROTO": _protocol,
    "FRAME": lambda machine, _: None,  # a length that says how much Python's own machine would read at once
}  # fmt: skip

# By its byte: what reads an operation's argument, and the step.
OPERATIONS: dict[bytes, tuple[Callable[[Any], Any] | None, Step | None]] = {
    each.code.encode("latin-1"): (None if each.arg is None else each.arg.reader, STEPS.get(each.name, _refuse))
    for each in pickletools.opcodes
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
    is_whole = type(offset) is int and 0 <= offset <= MOST_NUMBERS and isinstance(steps, SEQUENCE)
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
    if not isinstance(values, SEQUENCE):
        raise ValueError(f"a size that is {shown(values)}")
    return tuple(values)


def _ordered(rows: Any = ()) -> collections.OrderedDict[Any, Any]:
    """Make an OrderedDict; Python 2 gave its rows of keys and values to the call."""
    if not isinstance(rows, SEQUENCE) or not all(isinstance(row, SEQUENCE) and len(row) == 2 for row in rows):
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
