"""MXFP4 of a checkpoint as ggml's blocks: the same codes and scales in another order, so that nothing is rounded.

A checkpoint has codes and scales apart, two neighbouring codes in a byte. A block of ggml has the scale's byte, and
then sixteen bytes: the first half of the block's codes in their low halves, the second half in their high ones.
"""

from __future__ import annotations

import numpy as np

from loaders.dtypes import DTYPES
from loaders.quantization.read_only.mxfp4_nvfp4 import DeepSeekFp4, GptOssMxfp4
from loaders.quantization.scheme import Sink, Stored, Work
from loaders.tensors.formed import FormedTensor
from loaders.tensors.logical_tensor import LogicalTensor, Window

MXFP4 = DTYPES["MXFP4"]
GROUP, HALF = 32, 8
# The roles of codes and of scales, by what decodes them
ROLES: dict[type, tuple[str, str]] = {GptOssMxfp4: ("blocks", "scales"), DeepSeekFp4: ("weight", "scale")}


def holds_mxfp4(tensor: LogicalTensor) -> bool:
    """Whether a tensor is a matrix of whole rows of MXFP4."""
    if type(tensor.decode) not in ROLES or tensor.merge is not None or isinstance(tensor, FormedTensor):
        return False
    if len(tensor.shape) != 2 or tensor.window is None:
        return len(tensor.shape) == 2
    columns, window = tensor.decoded_spec.shape[-1], tensor.window
    return (
        tensor.shape[1] == columns
        and window.stride[1] == 1
        and not (window.offset % columns or window.stride[0] % columns)
    )


def repack(tensor: LogicalTensor, stored: Stored, sink: Sink, work: Work) -> None:
    """Write a tensor that `holds_mxfp4` as ggml's blocks."""
    assert tensor.decode is not None
    codes_role, scales_role = ROLES[type(tensor.decode)]
    rows, columns = tensor.shape
    window = tensor.window or Window(0, (columns, 1))
    groups, origin, step = columns // GROUP, window.offset // columns, max(1, window.stride[0] // columns)

    def repack_range(start: int, stop: int) -> None:
        first, last = start // columns, -(-stop // columns)
        lowest, highest = origin + first * step, origin + (last - 1) * step + 1
        scales = stored.read(scales_role, lowest * groups, highest * groups).view(np.uint8)
        codes = stored.read(codes_role, lowest * columns // 2, highest * columns // 2).view(np.uint8)
        pairs = codes.reshape(-1, groups, GROUP // 2)[::step]
        out = np.empty((last - first, groups, MXFP4.size((GROUP,))), np.uint8)
        out[..., 0] = scales.reshape(-1, groups)[::step]
        low, high = pairs & 15, pairs >> 4
        out[..., 1::2] = low[..., :HALF] | low[..., HALF:] << 4
        out[..., 2::2] = high[..., :HALF] | high[..., HALF:] << 4
        whole = out.reshape(-1, out.shape[-1])
        wanted = whole[(start - first * columns) // GROUP : (stop - first * columns) // GROUP]
        sink.write("weight", MXFP4.size((start,)), wanted.reshape(-1))

    work.sweep(rows * columns, GROUP, repack_range)
