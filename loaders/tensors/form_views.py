"""The words for views in a family's table: a tensor's elements in an engine's arrangement, as one tensor or in pieces.

An element is a byte of an array that is never read: a view's addresses and strides say which elements it stands for.
What each engine does was read in mlx-lm's models (sanitize) and in llama.cpp's conversion package (modify_tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.dtypes import Shape, row_major
from loaders.errors import BadCheckpoint
from loaders.tensors.logical_tensor import Window

Config = Mapping[str, Any]
GROUPS = ("n_groups", "mamba_n_groups", "ssm_n_groups")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a tensor by a view, and the shape in which the engine holds them; None for the view's own.

    `dtype` is that of the elements where it is not the tensor's: of halves of its numbers.
    """

    view: np.ndarray
    shape: Shape | None = None
    dtype: str | None = None


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


def scalar(view: np.ndarray, config: Config) -> list[Piece]:
    """Take the one number of a vector."""
    return [Piece(view.reshape(()))]


def vector(view: np.ndarray, config: Config) -> list[Piece]:
    """Make a vector of one number."""
    return [Piece(view.reshape((1,)))]


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
    whole = Window(2 * (address(view) - BASE_ADDRESS), tuple(2 * stride for stride in view.strides))
    return [Piece(standing(whole, view.shape), dtype="I32")]


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


def experts(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut a stack [experts, outputs, inputs] into the experts' matrices."""
    return [Piece(each) for each in view]


def expert_halves(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut a stack [experts, 2 * outputs, inputs] into two matrices of each expert."""
    return [piece for each in view for piece in halves(each, config)]


def grouped_heads(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the heads of queries, then one of keys and one of values of each group into all of each kind."""
    heads = number(config, "num_attention_heads")
    groups = number(config, "num_key_value_heads", heads)
    each = heads // max(1, groups)
    size = view.shape[0] // max(1, groups * (each + 2))
    by_group = _axis(view, 0, (groups, each + 2, size))
    rows = ((by_group[:, :each], heads), (by_group[:, each], groups), (by_group[:, each + 1], groups))
    return [Piece(piece, (count * size, *view.shape[1:])) for piece, count in rows]


def state_parts(view: np.ndarray, config: Config) -> list[Piece]:
    """Cut the rows that enter a Mamba 2 into those of gates, inputs, B, C and steps."""
    inner = number(config, "mamba_d_ssm", number(config, "mamba_expand", 2) * number(config, "hidden_size"))
    state = number(config, "mamba_n_groups", 1) * number(config, "mamba_d_state")
    pieces, start = [], 0
    for size in (inner, inner, state, state, view.shape[0] - 2 * (inner + state)):
        if size < 1:
            raise BadCheckpoint(f"expected more than {start} rows as config.json says, found {view.shape[0]}")
        pieces.append(Piece(view[start : start + size]))
        start += size
    return pieces


def after_padding(view: np.ndarray, config: Config) -> list[Piece]:
    """Leave out the positions up to that of the padding: RoBERTa counts from the one after it."""
    if text_config(config, "pad_token_id") is None:
        return [Piece(view)]
    first = number(config, "pad_token_id") + 1
    if first >= view.shape[0]:
        raise BadCheckpoint(f"expected more than {first} positions, as pad_token_id says, found {view.shape[0]}")
    return [Piece(view[first:])]


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
        scalar,
        vector,
        experts,
        expert_halves,
        grouped_heads,
        state_parts,
        after_padding,
    )
}
# The words whose views are undone by a word; the others cut what no view of one tensor joins.
VIEWS_BACK = {"swap_last": "swap_last", "scalar": "vector", "vector": "scalar"}


# An array of one byte, of which views are made that are never read: their strides and addresses say which elements they
# stand for.
_BASE = np.zeros(1, np.int8)


def address(view: np.ndarray) -> int:
    return int(view.__array_interface__["data"][0])


BASE_ADDRESS = address(_BASE)


def standing(window: Window, shape: Shape) -> np.ndarray:
    interface = {
        "data": (BASE_ADDRESS + window.offset, True), "shape": shape, "strides": window.stride, "typestr": "|i1",
        "version": 3,
    }  # fmt: skip
    return np.asarray(_Standing(interface))


@dataclass(frozen=True, slots=True)
class _Standing:
    __array_interface__: Mapping[str, Any]
