"""Tensors in an engine's form: a checkpoint's tensors whose elements the engine holds in another arrangement or value.

An arrangement is a view of the tensor's elements, as numpy has them, so that nothing is moved before it is read. The
words of a family's table (`loaders.architectures.forms`) are the names of the functions here. What each engine does
was read in mlx-lm's models (sanitize) and in llama.cpp's conversion package (modify_tensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from loaders.architectures.families import text_config
from loaders.architectures.forms import Form
from loaders.architectures.gguf import number
from loaders.dtypes import DTYPES, DType, Shape, row_major
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.tensors.logical_tensor import LogicalTensor, Window

Config = Mapping[str, Any]
GROUPS = ("n_groups", "mamba_n_groups", "ssm_n_groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormedTensor(LogicalTensor):
    """A tensor in an engine's form.

    origin: the tensor of the checkpoint that it is made of.
    gather: the dimensions over which the window's strides run; their product is that of the shape.
    read_as: the dtype of the elements that are gathered; `dtype` is that of the result.
    values: what is done to the elements: a word of VALUES, or empty.
    """

    origin: str
    gather: Shape
    read_as: DType
    values: str = ""

    @property
    def source_name(self) -> str:
        return self.origin


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a tensor by a view, and the shape in which the engine holds them; None for the view's own.

    `dtype` is that of the elements where it is not the tensor's: of halves of its numbers.
    """

    view: np.ndarray
    shape: Shape | None = None
    dtype: str | None = None


# --- views


def _axis(view: np.ndarray, axis: int, sizes: Sequence[int]) -> np.ndarray:
    """Return a view with one axis cut into several."""
    if math.prod(sizes) != view.shape[axis]:
        raise BadCheckpoint(f"expected {' x '.join(map(str, sizes))} entries in dimension {axis} of {list(view.shape)}")
    inner = row_major(tuple(sizes))
    shape = (*view.shape[:axis], *sizes, *view.shape[axis + 1 :])
    strides = (*view.strides[:axis], *(view.strides[axis] * s for s in inner), *view.strides[axis + 1 :])
    return np.lib.stride_tricks.as_strided(view, shape, strides, writeable=False)


def swap_last(view: np.ndarray, config: Config) -> list[Piece]:
    """Swap the last two dimensions: a convolution's [channels, 1, kernel] is MLX's [channels, kernel, 1]."""
    return [Piece(view.swapaxes(-1, -2))]


def squeeze(view: np.ndarray, config: Config) -> list[Piece]:
    """Leave out the dimensions of one."""
    return [Piece(view.squeeze())]


def latent_heads(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut kv_b_proj [heads * (nope + value), rank] by heads: [heads, rank, nope] and [heads, value, rank]."""
    heads, nope, value = (number(config, key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    by_head = _axis(view, 0, (heads, nope + value))
    return [Piece(by_head[:, :nope].swapaxes(1, 2)), Piece(by_head[:, nope:])]


def halves(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the first dimension into two halves."""
    if view.shape[0] % 2:
        raise BadCheckpoint(f"expected an even number of rows, found {view.shape[0]}")
    half = view.shape[0] // 2
    return [Piece(view[:half]), Piece(view[half:])]


def row_halves(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the rows of each expert in a stack [experts, rows, columns] into two halves."""
    if len(view.shape) != 3 or view.shape[1] % 2:
        raise BadCheckpoint(f"expected [experts, an even number of rows, columns], found {list(view.shape)}")
    half = view.shape[1] // 2
    return [Piece(view[:, :half]), Piece(view[:, half:])]


def column(view: np.ndarray, config: Config) -> list[Piece]:
    """Make a vector a matrix of one column."""
    return [Piece(_axis(view, 0, (view.shape[0], 1)))]


def state_groups(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the norm of a state space into a row for each group."""
    groups = next((number(config, key) for key in GROUPS if text_config(config, key) is not None), 1)
    return [Piece(_axis(view, 0, (groups, view.shape[0] // max(1, groups))))]


def low_halves(view: np.ndarray, config: Config) -> list[Piece]:
    """Take the low four bytes of whole numbers of eight, which have room for numbers of experts."""
    whole = Window(2 * (_address(view) - _BASE_ADDRESS), tuple(2 * stride for stride in view.strides))
    return [Piece(_standing(whole, view.shape), dtype="I32")]


def _value_heads(view: np.ndarray, config: Config, axis: int) -> np.ndarray:
    """Return heads of values for each head of keys in turn: [keys, values, size] becomes [values, keys, size]."""
    keys, values = (number(config, f"linear_num_{kind}_heads") for kind in ("key", "value"))
    each = values // max(1, keys)
    return _axis(view, axis, (keys, each, view.shape[axis] // max(1, values))).swapaxes(axis, axis + 1)


def value_rows(view: np.ndarray, config: Config) -> list[Piece]:
    """Take rows by heads of values in llama.cpp's order, where neighbours have different heads of keys."""
    return [Piece(_value_heads(view, config, 0), view.shape)]


def value_columns(view: np.ndarray, config: Config) -> list[Piece]:
    """Take columns by heads of values in llama.cpp's order."""
    return [Piece(_value_heads(view, config, 1), view.shape)]


def keys_and_values(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the rows of queries and keys from those of values, whose heads are taken in llama.cpp's order."""
    rows = 2 * number(config, "linear_key_head_dim") * number(config, "linear_num_key_heads")
    view = view.squeeze() if view.ndim > 2 else view
    return [Piece(view[:rows]), Piece(_value_heads(view[rows:], config, 0), view[rows:].shape)]


def by_key_heads(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut [query, key, values, gates] of each head of keys into all queries, all keys, all values, and all gates."""
    heads, values = (number(config, f"linear_num_{kind}_heads") for kind in ("key", "value"))
    key, value = (number(config, f"linear_{kind}_head_dim") for kind in ("key", "value"))
    sizes = [key, key, *[values // max(1, heads) * value] * 2]
    by_head, pieces, start = _axis(view, 0, (heads, sum(sizes))), [], 0
    for size in sizes:
        piece = by_head[:, start : start + size]
        pieces.append(Piece(piece, (heads * size, *view.shape[1:])))
        start += size
    return pieces


def grouped_heads(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the heads of queries, then one of keys and one of values of each group into all of each kind."""
    heads = number(config, "num_attention_heads")
    groups = number(config, "num_key_value_heads", heads)
    each = heads // max(1, groups)
    size = view.shape[0] // max(1, groups * (each + 2))
    by_group = _axis(view, 0, (groups, each + 2, size))
    rows = ((by_group[:, :each], heads), (by_group[:, each], groups), (by_group[:, each + 1], groups))
    return [Piece(piece, (count * size, *view.shape[1:])) for piece, count in rows]


VIEWS: dict[str, Callable[[np.ndarray, Config], list[Piece]]] = {
    each.__name__: each
    for each in (
        swap_last,
        squeeze,
        latent_heads,
        halves,
        row_halves,
        column,
        state_groups,
        low_halves,
        value_rows,
        value_columns,
        keys_and_values,
        by_key_heads,
        grouped_heads,
    )
}


# --- values


def plus_one(numbers: np.ndarray) -> np.ndarray:
    """Add one: norms that compute with 1 + weight."""
    return numbers + np.float32(1)


def minus_exp(numbers: np.ndarray) -> np.ndarray:
    """Return -exp(x), rounded once: the decay of state spaces, stored as its logarithm.

    torch's exp gives a neighbour of this for one number in a hundred, and which ones depends on the machine: on the
    vector library (MKL's or Sleef's) that it was built with.
    """
    found: np.ndarray = -np.exp(numbers.astype(np.float64)).astype(np.float32)
    return found


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {each.__name__: each for each in (plus_one, minus_exp)}


# --- forming


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
        for piece, name in zip(pieces, names or [tensor.name], strict=True):
            yield self._formed(tensor, name, piece, row.values)

    def _formed(self, tensor: LogicalTensor, name: str, piece: Piece, values: str) -> FormedTensor:
        view = piece.view
        own = {each.name: getattr(tensor, each.name) for each in fields(LogicalTensor)}
        stored = DTYPES[piece.dtype] if piece.dtype else tensor.dtype
        dtype = DTYPES[self._floats] if values and self._floats else stored
        before = tensor if isinstance(tensor, FormedTensor) else None
        return FormedTensor(
            **own | {
                "name": name,
                "shape": piece.shape or view.shape,
                "window": Window(_address(view) - _BASE_ADDRESS, tuple(view.strides)),
                "whole": tensor.whole or tensor.shape,
                "dtype": dtype,
            },
            origin=tensor.source_name,
            gather=view.shape,
            read_as=before.read_as if before and not piece.dtype else stored,
            values=values or (before.values if before else ""),
        )  # fmt: skip


# An array of one byte, of which views are made that are never read: their strides and addresses say which elements they
# stand for.
_BASE = np.zeros(1, np.int8)


def _address(view: np.ndarray) -> int:
    return int(view.__array_interface__["data"][0])


_BASE_ADDRESS = _address(_BASE)


def _view(tensor: LogicalTensor) -> np.ndarray:
    """Return a view that stands for the tensor's elements: an element is a byte, and its address the offset."""
    window = tensor.window or Window(0, row_major(tensor.shape))
    return _standing(window, tensor.gather if isinstance(tensor, FormedTensor) else tensor.shape)


def _standing(window: Window, shape: Shape) -> np.ndarray:
    interface = {
        "data": (_BASE_ADDRESS + window.offset, True), "shape": shape, "strides": window.stride, "typestr": "|i1",
        "version": 3,
    }  # fmt: skip
    return np.asarray(_Standing(interface))


@dataclass(frozen=True, slots=True)
class _Standing:
    __array_interface__: Mapping[str, Any]
