"""Tensors in an engine's form: a checkpoint's tensors whose elements the engine holds in another arrangement or value.

An arrangement is a view of the tensor's elements, as numpy has them, so that nothing is moved before it is read. The
words of a family's table (`loaders.architectures.forms`) are the names of functions in `form_views` and `form_values`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from loaders.architectures.forms import Form
from loaders.dtypes import DTYPES, DType, Shape, row_major
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.tensors.form_values import FACTORS, UNDONE_BY, number_at
from loaders.tensors.form_views import BASE_ADDRESS, VIEWS, VIEWS_BACK, Piece, address, standing
from loaders.tensors.logical_tensor import LogicalTensor, Window

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A step of what is done to a tensor's elements, in float32: a word of VALUES, or a word of FACTORS or `times`.

    factors: where it is no word of VALUES: how many rows, and what these are multiplied by, in turn.
    """

    word: str
    factors: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FormedTensor(LogicalTensor):
    """A tensor in an engine's form.

    origin: the tensor of the checkpoint that it is made of.
    gather: the dimensions over which the window's strides run; their product is that of the shape.
    read_as: the dtype of the elements that are gathered; `dtype` is that of the result.
    changes: what is done to the elements, one after the other.
    """

    origin: str
    gather: Shape
    read_as: DType
    changes: tuple[Change, ...] = ()

    @property
    def source_name(self) -> str:
        return self.origin


def undone(rows: Sequence[Form], config: Config, tensor: LogicalTensor) -> LogicalTensor:
    """Return a tensor in an engine's form as it was published; rows that cut tensors are left out."""
    back = [
        replace(row, view=VIEWS_BACK[row.view] if row.view else "", values=UNDONE_BY[row.values] if row.values else "")
        for row in reversed(rows)
        if not row.to
    ]
    (made,) = Forms([replace(row, role="") for row in back], config).of(tensor)
    return made


class Forms:
    """The rows of an engine's table for one model, ready for tens of thousands of names.

    `floats` is the dtype of tensors whose values are changed, if it differs from the tensor's own.
    """

    def __init__(self, rows: Sequence[Form], config: Config, floats: str | None = None) -> None:
        self._rows = rows
        self._config = config
        self._floats = floats
        self._any = re.compile("|".join(f"(?:{row.name.pattern})" for row in rows)) if rows else None

    def of(self, tensor: LogicalTensor) -> Iterator[LogicalTensor]:
        """Yield the tensor's pieces in the engine's form; itself if no row is for it.

        Raises:
            BadCheckpoint: its shape is not what config.json says.
            BadSpec: an adapter is to be merged into it.
        """
        if self._any is None or self._any.search(tensor.name) is None:
            yield tensor
            return
        if tensor.merge is not None:
            raise BadSpec(
                f"{setting('transform')}: {tensor.name} is held in another form by this engine, into which the adapter"
                " cannot be merged on the way; write the merged model first"
                f" ({setting('quantize')}=none), then quantize that"
            )
        found = [tensor]
        for row in self._rows:
            found = [piece for each in found for piece in self._by(row, each)]
        yield from found

    def _by(self, row: Form, tensor: LogicalTensor) -> Iterator[LogicalTensor]:
        match = row.name.search(tensor.name)
        if match is None:
            yield tensor
            return
        try:
            pieces = VIEWS[row.view](_view(tensor), self._config) if row.view else [Piece(_view(tensor))]
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{tensor.name}: {error}") from None
        names = [tensor.name[: match.start()] + match.expand(to) + tensor.name[match.end() :] for to in row.to]
        times = tuple(factor for key in row.times if (factor := number_at(self._config, key, 1.0)) != 1)
        if row.times and not times and not row.view and not row.values:
            yield tensor
            return
        rounds = len(pieces) // max(1, len(names))
        names = [name.replace("{}", str(number)) for number in range(rounds) for name in names]
        for piece, name in zip(pieces, names or [tensor.name], strict=True):
            try:
                yield self._formed(tensor, name, piece, row, times)
            except BadCheckpoint as error:
                raise BadCheckpoint(f"{tensor.name}: {error}") from None

    def _formed(
        self, tensor: LogicalTensor, name: str, piece: Piece, row: Form, times: tuple[float, ...]
    ) -> FormedTensor:
        view, values, rows = piece.view, row.values, piece.view.shape[0] if piece.view.shape else 1
        own = {each.name: getattr(tensor, each.name) for each in fields(LogicalTensor)}
        stored = DTYPES[piece.dtype] if piece.dtype else tensor.dtype
        before = tensor if isinstance(tensor, FormedTensor) else None
        changes = before.changes if before else ()
        if values and changes and UNDONE_BY.get(values) == changes[-1].word:
            values, changes = "", changes[:-1]
        dtype = DTYPES[self._floats] if values and self._floats else stored
        if values:
            make = FACTORS.get(values.removeprefix("un"))
            factors = make(self._config, row.by, rows, tensor.dtype) if make else ()
            changes = (*changes, Change(values, tuple(factors)))
        return FormedTensor(
            **own | {
                "name": name,
                "shape": piece.shape or view.shape,
                "window": Window(address(view) - BASE_ADDRESS, tuple(view.strides)),
                "whole": tensor.whole or tensor.shape,
                "dtype": dtype,
                "role": row.role or tensor.role,
            },
            origin=tensor.source_name,
            gather=view.shape,
            read_as=before.read_as if before and not piece.dtype else stored,
            changes=(*changes, *(Change("times", ((rows, factor),)) for factor in times)),
        )  # fmt: skip


def _view(tensor: LogicalTensor) -> np.ndarray:
    """Return a view that stands for the tensor's elements: an element is a byte, and its address the offset."""
    window = tensor.window or Window(0, row_major(tensor.shape))
    return standing(window, tensor.gather if isinstance(tensor, FormedTensor) else tensor.shape)
