"""Slow, simple reference decoders and encoders, which share no code with the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from tests.making import Raw, values_of, weights

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
)  # fmt: skip


def decode_bnb4(tensors: Mapping[str, Raw], name: str) -> np.ndarray:
    """Decode a 4-bit weight of bitsandbytes to float32, by the tables that are stored with it."""
    [state_name] = [n for n in tensors if n.startswith(f"{name}.quant_state.bitsandbytes__")]
    state = json.loads(tensors[state_name].data.tobytes())
    codes = []
    for byte in tensors[name].data.view(np.uint8).reshape(-1):
        codes += [byte >> 4, byte & 15]
    numel = int(np.prod(state["shape"]))
    absmax = tensors[f"{name}.absmax"].data.reshape(-1)
    if "nested_offset" in state:
        nested = tensors[f"{name}.nested_absmax"].data
        table = tensors[f"{name}.nested_quant_map"].data
        absmax = np.array(
            [table[code] * nested[i // state["nested_blocksize"]] for i, code in enumerate(absmax)], np.float32
        ) + np.float32(state["nested_offset"])
    table = tensors[f"{name}.quant_map"].data
    values = [table[code] * absmax[i // state["blocksize"]] for i, code in enumerate(codes[:numel])]
    return np.array(values, np.float32).reshape(state["shape"])


def encode_nf4(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode NF4 as bitsandbytes does, one weight at a time: codes uint8 (ceil(n/2),), absmax float32 (groups,)."""
    flat = values.astype(np.float32).reshape(-1)
    bounds = (NF4[1:] + NF4[:-1]) / np.float32(2)
    codes, tops = [], []
    for start in range(0, flat.size, group):
        part = flat[start : start + group]
        top = np.abs(part).max()
        if part.size == group:
            scaled = part * (np.float32(1) / max(top, np.float32(1e-38)))
        else:
            top = max(top, np.float32(1e-38))
            scaled = part / top
        tops.append(top)
        codes += [int((bounds < v).sum()) for v in np.clip(scaled, -1, 1)]
    codes += [7] if len(codes) % 2 else []
    return np.array([a << 4 | b for a, b in zip(codes[::2], codes[1::2], strict=True)], np.uint8), np.array(tops)


def decode_int8(tensors: Mapping[str, Raw], module: str) -> np.ndarray:
    """Decode an LLM.int8 weight to float32."""
    scales = tensors[f"{module}.SCB"].data.reshape(-1, 1)
    return tensors[f"{module}.weight"].data.astype(np.float32) * scales * np.float32(1 / 127)


def decode_ternary(tensors: Mapping[str, Raw], name: str, linear_class: str) -> np.ndarray:
    """Decode a BitNet weight to float32."""
    packed, scale = tensors[name].data, values_of(tensors[f"{name}_scale"])[0]
    quarters = [((packed >> (2 * k)) & 3).astype(np.float32) - 1 for k in range(4)]
    factor = 1 / scale if linear_class == "bitlinear" else scale
    return np.concatenate(quarters) * np.float32(factor)


def decode_hqq(tensors: Mapping[str, Raw], module: str) -> np.ndarray:
    """Decode a weight of HQQ to float32, by the metadata that are stored with it."""
    facts = {fact: tensors[f"{module}.{fact}"].data.item() for fact in ("nbits", "group_size", "axis")}
    rows, columns = (int(n) for n in tensors[f"{module}.shape"].data)
    bits, size, packed = facts["nbits"], facts["group_size"], tensors[f"{module}.W_q"].data.astype(np.int64)
    parts = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    codes = np.concatenate([packed >> bits * (parts - 1 - part) & (2**bits - 1) for part in range(parts)])
    codes = codes[: rows * columns // size if facts["axis"] == 1 else size].astype(np.float32)
    scale, zero = tensors[f"{module}.scale"], tensors[f"{module}.zero"]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values_of(weights(values, scale.dtype))

    return rounded(rounded(codes - values_of(zero)) * values_of(scale)).reshape(rows, columns)


def decode_compressed_tensors(tensors: Mapping[str, Raw], module: str) -> np.ndarray:
    """Decode a weight of compressed-tensors to float32; the stored tensors tell the format."""
    parts = {name.removeprefix(module + "."): raw for name, raw in tensors.items() if name.startswith(module + ".")}
    scale = parts["weight_scale"]
    if "weight_shape" in parts:
        rows, columns = parts["weight_shape"].data.tolist()
        words = parts["weight_packed"].data.view(np.uint32)
        bits = words.shape[1] * 32 // columns
        per_word = 32 // bits
        codes = np.array([[int(w) >> bits * i & 2**bits - 1 for w in row for i in range(per_word)] for row in words])
        zeros = np.full((rows, scale.data.shape[1]), 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            packed = parts["weight_zero_point"].data.view(np.uint32)
            zeros = np.array([[int(w) >> 4 * (r % 8) & 15 for w in packed[r // 8]] for r in range(rows)])
        group = columns // zeros.shape[1]
        return (codes - zeros.repeat(group, 1)).astype(np.float32) * values_of(scale).repeat(group, 1)
    if "weight_packed" in parts:
        packed = parts["weight_packed"].data
        codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)[codes]
        if "weight_global_scale" in parts:
            return values * (e4m3(scale.data) / parts["weight_global_scale"].data).repeat(16, 1)
        return values * (np.float32(2) ** (scale.data.astype(np.float32) - 127)).repeat(32, 1)
    weight, factors = parts["weight"], values_of(scale)
    values = e4m3(weight.data) if weight.dtype == "F8_E4M3" else weight.data.view(np.int8).astype(np.float32)
    if factors.shape != (values.shape[0], 1):
        factors = factors.repeat(128, 0).repeat(128, 1)[: values.shape[0], : values.shape[1]]
    return values * factors


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Return the values of E4M3 codes as float32."""
    table = [(-1) ** (c >> 7) * (2.0 ** ((c >> 3 & 15) - 7) * (1 + (c & 7) / 8) if c >> 3 & 15 else (c & 7) / 512)
             for c in range(256)]  # fmt: skip
    table[0x7F] = table[0xFF] = np.nan
    return np.array(table, np.float32)[codes]


def decode_mlx(tensors: Mapping[str, Raw], module: str, bits: int) -> np.ndarray:
    """Decode an affine weight of MLX to float32. A row's words are one long number, of which a code is `bits` bits."""
    words, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "weight_scales", "weight_biases"))
    columns = words.data.shape[1] * 32 // bits
    group = columns // scales.data.shape[1]
    rows = []
    for row in words.data:
        number = int.from_bytes(row.tobytes(), "little")
        rows.append([(number >> (bits * column)) & ((1 << bits) - 1) for column in range(columns)])
    wide = [np.repeat(values_of(part), group, axis=1) for part in (scales, biases)]
    return np.array(rows, np.float32) * wide[0] + wide[1]


def decode_mlx_float(tensors: Mapping[str, Raw], module: str, bits: int, mode: str) -> np.ndarray:
    """Decode an mxfp4, mxfp8 or nvfp4 weight of MLX to float32."""
    codes = tensors[f"{module}.weight"].data.view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
        values = np.array([small_float(code, exponent_bits=2, mantissa_bits=1) for code in range(16)])
    else:
        values = np.array([small_float(code, exponent_bits=4, mantissa_bits=3) for code in range(256)])
    scales = tensors[f"{module}.weight_scales"].data
    if mode == "nvfp4":
        factors = np.array([small_float(code, exponent_bits=4, mantissa_bits=3) for code in range(256)])[scales]
    else:
        factors = 2.0 ** (scales.astype(np.float64) - 127)
    return (values[codes] * np.repeat(factors, codes.shape[1] // scales.shape[1], axis=1)).astype(np.float32)


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Return the value of a float of a sign, an exponent with the usual bias, and a mantissa; no NaN or infinities."""
    mantissa, rest = code % 2**mantissa_bits, code >> mantissa_bits
    exponent, sign = rest % 2**exponent_bits, -1 if rest >> exponent_bits else 1
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    return sign * fraction * 2.0 ** (max(exponent, 1) - bias)


def relative_error(source: np.ndarray, decoded: np.ndarray) -> float:
    x, y = source.astype(np.float64), decoded.astype(np.float64)
    return float(np.sqrt(((x - y) ** 2).sum() / (x**2).sum()))
