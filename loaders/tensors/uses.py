"""What a pass over tensors will read of a checkpoint, told to a reader that fetches ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from loaders.dtypes import is_contiguous, storage_of
from loaders.quantization.scheme import RangeEncoder, Sharing, fits
from loaders.specs import WeightSpec
from loaders.strategies.base import Expecting, TensorBytes, Use
from loaders.tensors.encoding import Encoding
from loaders.tensors.formed import FormedTensor
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.views import gathered_spec

if TYPE_CHECKING:
    from loaders.strategies import Reader  # all strategies, which settings and rules do without


class Uses:
    """The uses that a pass makes of its tensors, each a step; for readers that do not fetch ahead, nothing.

    `tensors` are in the order of the pass. `encodings` says what is made of a tensor, by its name. Partners that share
    scales are one use: whichever comes first reads all of them. With `in_one_trip`, the pass itself reads each range of
    a tensor once, for instance to measure what was made.
    """

    def __init__(
        self,
        reader: Reader,
        tensors: Iterable[LogicalTensor],
        encodings: Mapping[str, Sequence[Encoding]] | None = None,
        stop: threading.Event | None = None,
        *,
        in_one_trip: bool = False,
    ) -> None:
        self._reader = reader if isinstance(reader, Expecting) else None
        self._uses: dict[str, Use] = {}
        if self._reader is not None:
            self._uses = uses_of(tensors, encodings or {}, in_one_trip=in_one_trip)
            self._reader.expect(list(dict.fromkeys(self._uses.values())), stop)

    def of(self, name: str) -> AbstractContextManager[None]:
        """Return the context of the step that is a tensor's, by its name."""
        use = self._uses.get(name)
        return nullcontext() if use is None or self._reader is None else self._reader.using(use)


def uses_of(
    tensors: Iterable[LogicalTensor], encodings: Mapping[str, Sequence[Encoding]], *, in_one_trip: bool = False
) -> dict[str, Use]:
    """Return the use that each tensor's step is a part of, by the tensor's name; see `Uses`."""
    together: dict[str, list[LogicalTensor]] = {}
    for tensor in tensors:
        shares = any(fits(each.scheme, Sharing) for each in encodings.get(tensor.name, ()))
        key = f"group {tensor.group}" if shares and tensor.group is not None else tensor.name
        together.setdefault(key, []).append(tensor)
    uses: dict[str, Use] = {}
    for partners in together.values():
        first = partners[0]
        is_once = len(partners) == 1 and reads_once(first, encodings.get(first.name, ()), in_one_trip=in_one_trip)
        pieces = tuple(dict.fromkeys(piece for tensor in partners for piece in pieces_of(tensor)))
        use = Use(pieces, is_once, len(partners))
        uses |= {tensor.name: use for tensor in partners}
    return uses


def reads_once(tensor: LogicalTensor, encodings: Sequence[Encoding], *, in_one_trip: bool) -> bool:
    """Whether a pass reads each stored byte of a tensor only once: to make these encodings of it and measure them, or,
    if it goes `in_one_trip`, whatever it does.
    """
    if len(encodings) > 1:
        return False
    for encoding in encodings:
        tensor = encoding.tensor
        if encoding.order is not None:
            return False
    is_plain = tensor.decode is None and tensor.order is None and tensor.merge is None and tensor.dtype.block == 1
    if not is_plain or tensor.window is None or not is_contiguous(gathered_spec(tensor).shape, tensor.window.stride):
        return False
    return in_one_trip or any(_makes_in_one_trip(each) for each in encodings)


def _makes_in_one_trip(encoding: Encoding) -> bool:
    scheme = encoding.scheme
    if fits(scheme, Sharing) or not fits(scheme, RangeEncoder):
        return False
    return scheme.range_align(encoding.spec) is not None


def pieces_of(tensor: LogicalTensor) -> tuple[TensorBytes, ...]:
    """Return the bytes of stored tensors that a tensor is made from.

    Of a quantized stack of experts, an expert's are the share that its place in the stack gives it.
    """
    if tensor.decode is not None:
        return tuple(_share(tensor, spec) for _, spec in tensor.stored)
    [(_, stored)] = tensor.stored
    assert tensor.window is not None
    read = gathered_spec(tensor)
    if read.dtype.bits < 8 or read.dtype.block > 1:
        return (TensorBytes.whole(stored),)
    item = storage_of(read.dtype).itemsize
    start, stop = tensor.window.extent(read.shape)
    return (TensorBytes(stored, start * item, stop * item),)


def _share(tensor: LogicalTensor, stored: WeightSpec) -> TensorBytes:
    whole, window = tensor.whole, tensor.window
    if whole is None or window is None or len(whole) < 3 or not stored.shape or stored.shape[0] != whole[0]:
        return TensorBytes.whole(stored)
    if stored.stride is not None or isinstance(tensor, FormedTensor):
        return TensorBytes.whole(stored)
    start, stop = window.extent(tensor.shape)
    of_one = max(1, tensor.decoded_spec.numel // whole[0])
    first, last = start // of_one, -(-stop // of_one)
    size = stored.size // whole[0]
    return TensorBytes(stored, first * size, last * size)
