"""The writer of a PyTorch file's pickle: tensors by name, or modules of tensors and plain values.

It writes, in protocol 2, only what torch.load(weights_only=True) takes. Numbers have a fixed width, so that the
pickle's length, which the plan needs, is the same before and after bound lengths are known. Python's own pickler would
do neither. Forms: torch/_utils.py, torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loaders.dtypes import DType, Shape, row_major
from loaders.errors import BadSpec, setting

STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a tensor of the file, by name; with `is_parameter` it loads as a torch.nn.Parameter."""

    tensor: str
    is_parameter: bool = False


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it: the storage that holds it, dtype, shape."""

    key: str
    dtype: DType
    shape: Shape


def check_dtype(name: str, dtype: DType) -> None:
    """Raise BadSpec if torch has no such dtype."""
    if dtype.bits < 8:
        raise BadSpec(f"{setting('container')}: {name} is {dtype}, which PyTorch files cannot hold; use safetensors")


def state_dict(items: Iterable[tuple[str, Any]], tensors: Mapping[str, PickledTensor]) -> bytes:
    """Pickle a dict, perhaps of dicts, of references (`Ref`), whole numbers, flags, text, shapes (tuples) and dtypes.

    `items` are its keys and values. `tensors` says what the references stand for.
    """
    written = _Pickle(tensors)
    written.items(items)
    return b"".join([pickle.PROTO, b"\x02", written.raw, pickle.STOP])


class _Pickle:
    """The bytes of a pickle so far. `_memo` holds the names of torch that were written already."""

    def __init__(self, tensors: Mapping[str, PickledTensor]) -> None:
        self.raw = bytearray()
        self._tensors = tensors
        self._memo: dict[tuple[str, str], int] = {}
        self._around: dict[tuple[DType, Shape], tuple[bytes, bytes]] = {}

    def value(self, value: Any) -> None:
        if isinstance(value, str):
            self._text(value)
        elif isinstance(value, bool):
            self.raw += pickle.NEWTRUE if value else pickle.NEWFALSE
        elif isinstance(value, int):
            self._number(value)
        elif isinstance(value, Ref):
            self._parameter(value.tensor) if value.is_parameter else self._tensor(value.tensor)
        elif isinstance(value, Mapping):
            self.items(value.items())
        elif isinstance(value, DType):
            self._known("torch", value.torch)
        else:
            self._known("torch", "Size")
            self._tuple([value])
            self.raw += pickle.REDUCE

    def items(self, items: Iterable[tuple[str, Any]]) -> None:
        """Write a dict."""
        self.raw += pickle.EMPTY_DICT + pickle.MARK
        for key, value in items:
            self._text(key)
            self.value(value)
        self.raw += pickle.SETITEMS

    def _text(self, value: str) -> None:
        raw = value.encode()
        self.raw += pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def _number(self, value: int) -> None:
        if value < 1 << 31:
            self.raw += pickle.BININT + struct.pack("<i", value)
        else:
            self.raw += pickle.LONG1 + b"\x08" + struct.pack("<q", value)

    def _known(self, module: str, name: str) -> None:
        """Write a global name; it is spelled out once and looked up from then on."""
        if (module, name) in self._memo:
            self.raw += pickle.BINGET + bytes([self._memo[module, name]])
            return
        index = self._memo[module, name] = len(self._memo)
        self.raw += pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.BINPUT + bytes([index])

    def _tuple(self, values: Iterable[Any]) -> None:
        """Write a tuple of plain values; a tuple among them stays a tuple."""
        self.raw += pickle.MARK
        for value in values:
            self._tuple(value) if isinstance(value, tuple) else self.value(value)
        self.raw += pickle.TUPLE

    def _hooks(self) -> None:
        """Write an empty OrderedDict: torch's backward hooks of a tensor."""
        self._known("collections", "OrderedDict")
        self.raw += pickle.EMPTY_TUPLE + pickle.REDUCE

    def _tensor(self, name: str) -> None:
        """Write the call that rebuilds a tensor."""
        stored = self._tensors[name]
        # What is before and after the key is the same for all tensors of a dtype and shape, once the names of torch
        # that it uses were spelled out.
        around = self._around.get((stored.dtype, stored.shape))
        if around is not None:
            self.raw += around[0]
            self._text(stored.key)
            self.raw += around[1]
            return
        begin, spelled = len(self.raw), len(self._memo)
        self._before_key(stored)
        middle = len(self.raw)
        self._text(stored.key)
        after = len(self.raw)
        self._after_key(stored)
        if len(self._memo) == spelled:
            self._around[stored.dtype, stored.shape] = bytes(self.raw[begin:middle]), bytes(self.raw[after:])

    def _before_key(self, stored: PickledTensor) -> None:
        """Write what rebuilds a tensor. Dtypes without a storage class, such as float8, need version 3."""
        typed = STORAGES.get(stored.dtype.name)
        self._known("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.raw += pickle.MARK + pickle.MARK
        self.value("storage")
        self._known("torch" if typed else "torch.storage", typed or "UntypedStorage")

    def _after_key(self, stored: PickledTensor) -> None:
        typed = STORAGES.get(stored.dtype.name)
        self.value("cpu")
        items = stored.dtype.size(stored.shape) // (stored.dtype.item_bytes if typed else 1)
        self._number(items)
        self.raw += pickle.TUPLE + pickle.BINPERSID
        self._number(0)
        self._tuple(stored.shape)
        self._tuple(row_major(stored.shape))
        self.value(False)
        self._hooks()
        if not typed:
            self.value(stored.dtype)
        self.raw += pickle.TUPLE + pickle.REDUCE

    def _parameter(self, name: str) -> None:
        self._known("torch._utils", "_rebuild_parameter")
        self.raw += pickle.MARK
        self._tensor(name)
        self.value(False)
        self._hooks()
        self.raw += pickle.TUPLE + pickle.REDUCE
