"""Stacks of experts cut into the experts' matrices by windows, without moving a byte.

A window of a plain stack picks its elements; a window of a quantized one says what to decode of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loaders.architectures.family import Family
from loaders.architectures.stacks import Stack
from loaders.dtypes import Shape, row_major
from loaders.errors import BadCheckpoint
from loaders.limits import check_tensors
from loaders.tensors.logical_tensor import LogicalTensor, Window


def cut_all(tensors: Sequence[LogicalTensor], family: Family) -> Iterator[LogicalTensor]:
    """Yield tensors, with those of the experts for each stack that the family knows.

    Where a stack's shape does not tell inputs from outputs (the outputs of two parts may be as many as the inputs), the
    other stack of the same experts does.
    """
    told: dict[str, bool] = {}
    for tensor in tensors:
        for stack in family.stacks:
            match = stack.pattern.search(tensor.name)
            if match and (is_transposed := stack.transposed(tensor.shape)) is not None:
                told[match["experts"]] = is_transposed
    count = 0
    for tensor in tensors:
        for each in cut(tensor, family, told):
            count += 1
            check_tensors(count, "its experts, one by one")
            yield each


def cut(tensor: LogicalTensor, family: Family, told: Mapping[str, bool]) -> Iterator[LogicalTensor]:
    """Yield the tensors of a stack's experts, or the tensor itself if its name is no stack of the family's.

    `told` says of experts, by the beginning of their names, whether their stacks are transposed.

    Raises:
        BadCheckpoint: the stack does not have the shape that the family gives it.
    """
    for stack in family.stacks:
        match = stack.pattern.search(tensor.name)
        if not match:
            continue
        is_transposed = stack.transposed(tensor.shape)
        if is_transposed is None:
            is_transposed = told.get(match["experts"], stack.square_is_transposed)
        # A stack of which nothing tells inputs from outputs stays whole, of which `Sources.notes` speak.
        if is_transposed is not None:
            yield from _experts(tensor, replace(stack, is_transposed=is_transposed), match)
            return
    yield tensor


def _experts(tensor: LogicalTensor, stack: Stack, match: re.Match[str]) -> Iterator[LogicalTensor]:
    shape, parts = tensor.shape, stack.parts
    outputs = 2 if stack.is_transposed and len(shape) == 3 else 1
    if len(shape) != (2 if stack.is_bias else 3) or shape[outputs] % len(parts):
        wanted = "[experts, outputs]" if stack.is_bias else "[experts, inputs, outputs]"
        wanted = wanted if stack.is_transposed or stack.is_bias else "[experts, outputs, inputs]"
        raise BadCheckpoint(
            f"{tensor.name}: expected {wanted}, the outputs of {' and '.join(parts)}, found {list(shape)}"
        )
    outer = tensor.window or Window(0, row_major(shape))
    # Dimension `outputs` is 1 or 2 of a stack of matrices, so that 3 - outputs is the dimension of inputs.
    rows = shape[outputs] // len(parts)
    check_tensors(shape[0] * len(parts), f"{tensor.name} of shape {list(shape)}")
    # Not str.format, for which a name in the file could have braces of its own.
    experts, rest = match["experts"], stack.name.removeprefix(r"\g<experts>")
    for expert in range(shape[0]):
        for index, part in enumerate(parts):
            first, step = (index, len(parts)) if stack.is_interleaved else (index * rows, 1)
            offset = outer.offset + expert * outer.stride[0] + first * outer.stride[outputs]
            stride: Shape = (step * outer.stride[outputs],)
            size: Shape = (rows,)
            if not stack.is_bias:
                stride, size = (*stride, outer.stride[3 - outputs]), (*size, shape[3 - outputs])
            name = experts + rest.replace("{expert}", str(expert)).replace("{part}", part)
            yield replace(tensor, name=name, shape=size, window=Window(offset, stride), whole=tensor.whole or shape)
