"""bitsandbytes' 4-bit formats, NF4 and FP4, as transformers stores and loads them.

Groups of `group_size` weights (bitsandbytes: blocksize) run over the flattened tensor, across row ends. By role:
    weight                                    uint8 (ceil(n/2), 1)   two codes a byte, the first high
    weight.absmax                             float32 (groups,)      with double_quant: uint8 codes
    weight.quant_map                          float32 (16,)          the code's table
    weight.nested_absmax, .nested_quant_map   float32                only with double_quant
    weight.quant_state.bitsandbytes__nf4      uint8                  JSON: type, group size, dtype, shape, nested_*
Roles, keys and constants are those of bitsandbytes/functional.py, QuantState.as_dict. Bytes are those of bitsandbytes
0.50 on a CPU. With double_quant one number can differ in its last bits: nested_offset, the mean of all scales.
bitsandbytes sums it in an order that changes with its CPU and thread count; here the exact sum is rounded once. What
follows from it (nested_absmax, some codes of absmax) then differs as little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES, DType, Shape
from loaders.errors import BadCheckpoint, VerifyFailed, setting
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.bitsandbytes import dynamic_map, tables
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work
from loaders.specs import StoredSpec, TensorSpec

GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CPU_ROWS = 32  # the kernel of bitsandbytes for CPUs with AVX512-BF16 takes rows in multiples of so many
STORAGE_DTYPES = ("uint8", "float16", "bfloat16", "float32")
# A float32 whose value, printed as a double, takes as many characters as any: the plan reserves room for the offset.
LONGEST_FLOAT = "-1.1754943508222875e-38"
# Added to the error limit for the second rounding of the scales: generous, since `greatest_error` bounds each weight.
DOUBLE_QUANT_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class Bnb4:
    """NF4 or FP4. `storage` is the dtype as which the packed bytes are stored (bnb_4bit_quant_storage)."""

    kind: ClassVar[str] = "bnb4"
    engine: ClassVar[str] = "bitsandbytes"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    table: Literal["nf4", "fp4"]
    group_size: int = 64
    double_quant: bool = False
    storage: str = "uint8"

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: one weight of magnitude 1, and all others midway between the same codes."""
        ranked, others = np.sort(self._values.astype(np.float64)), self.group_size - 1
        middle, half = (ranked[1:] + ranked[:-1]) / 2, (ranked[1:] - ranked[:-1]) / 2
        worst = np.sqrt(others * half**2 / (1 + others * middle**2)).max()
        return float(worst) * 1.001 + (DOUBLE_QUANT_ERROR if self.double_quant else 0)

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """Half the widest gap between two codes, times the largest scale; and 2^-8 of that scale for a cast.

        With double quantization a scale is itself the nearest of bitsandbytes' dynamic codes, times the largest of 256
        scales. It is off by half the widest gap of those codes, or by what lies between -1 and the least of them, and
        by one of the 65536 steps in which bitsandbytes looks it up.
        """
        floor = 2.0**-24 if spec.dtype.name == "F16" else 2.0**-120  # what a cast loses of tiny weights
        first, last = start // self.group_size, -(-stop // self.group_size)
        scales, off = stored.read("weight.absmax", first, last), 0.0
        if self.double_quant:
            scales = self._decode_scales(spec, stored, scales, first, last)
            tops = stored.read("weight.nested_absmax", first // dynamic_map.GROUP, -(-last // dynamic_map.GROUP))
            codes = dynamic_map.dynamic_map().astype(np.float64)
            off = (max(float(np.diff(codes).max()) / 2, 1 + codes[0]) + 2**-15) * float(tops.max(initial=0))
        largest = float(np.abs(scales).max(initial=0)) * (1 + 2**-20) + off
        return largest * (_widest_gap(self.table) / 2 + 2**-8) + off + floor

    @property
    def _values(self) -> np.ndarray:
        """The values of the sixteen codes, float32."""
        return np.array(tables.VALUES[self.table], np.float32)

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.table}"

    @property
    def _storage(self) -> DType:
        return DTYPES["U8"] if self.storage == "uint8" else next(d for d in DTYPES.values() if d.torch == self.storage)

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; {self.table} takes {', '.join(WEIGHT_DTYPES)}"
        if spec.numel == 0:
            return "it is empty"
        if -(-spec.numel // 2) % self._storage.item_bytes:
            return f"its {-(-spec.numel // 2)} packed bytes do not divide into {self.storage}; use storage_dtype=uint8"
        return None

    def stops_cpu_kernel(self, shape: Shape) -> str | None:
        """Why bitsandbytes fails at a matrix's first use on a CPU with AVX512-BF16; None where it does not.

        On such a CPU it repacks a weight for a kernel of its own, which takes rows in multiples of CPU_ROWS and whole
        groups in a row (bitsandbytes 0.50, functional.py: _convert_weight_packed_for_cpu). GPUs have no such limit.
        """
        if shape[0] % CPU_ROWS:
            return f"its {shape[0]} rows are no multiple of {CPU_ROWS}"
        if shape[-1] % self.group_size:
            return f"its {shape[-1]} columns are no multiple of its group size, {self.group_size}"
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        groups = -(-spec.numel // self.group_size)
        packed = -(-spec.numel // 2) // self._storage.item_bytes
        quant_map = self._values.tobytes()
        roles = {
            "weight": StoredSpec(self._storage, (packed, 1)),
            "weight.absmax": StoredSpec(DTYPES["U8" if self.double_quant else "F32"], (groups,)),
            "weight.quant_map": StoredSpec(DTYPES["F32"], (16,), quant_map),
        }
        if self.double_quant:
            nested_map = dynamic_map.dynamic_map().tobytes()
            roles["weight.nested_absmax"] = StoredSpec(DTYPES["F32"], (-(-groups // dynamic_map.GROUP),))
            roles["weight.nested_quant_map"] = StoredSpec(DTYPES["F32"], (256,), nested_map)
            longest = self._state_json(spec, 0.0).replace("0.0}", LONGEST_FLOAT + "}")
            roles[self._state] = StoredSpec(DTYPES["U8"], (len(longest),), is_bound=True)
        else:
            state = self._state_json(spec, None).encode()
            roles[self._state] = StoredSpec(DTYPES["U8"], (len(state),), state)
        return roles

    def _state_json(self, spec: TensorSpec, offset: float | None) -> str:
        """Return the quant_state in bitsandbytes' key order and spacing; `offset` is that of double quantization."""
        state: dict[str, Any] = {
            "quant_type": self.table,
            "blocksize": self.group_size,
            "dtype": spec.dtype.torch,
            "shape": list(spec.shape),
        }
        if offset is not None:
            state |= {"nested_blocksize": dynamic_map.GROUP, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state)

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.bitsandbytes import fourbit, tables

        spec, group = view.spec, self.group_size
        whole = spec.numel // group * group

        def encode_range(start: int, stop: int) -> float:
            packed = work.array("packed", (stop - start) // 2, np.uint8)
            absmax = work.array("absmax", (stop - start) // group, np.float32)
            work.kernels.encode_fourbit(view.read(start, stop), spec.dtype.name, self.table, group, packed, absmax)
            sink.write("weight", start // 2, packed)
            if not self.double_quant:
                sink.write("weight.absmax", start // group, absmax)
            return float(absmax.sum(dtype=np.float64))

        total = math.fsum(work.sweep(whole, group, encode_range))
        last = np.empty(0, np.float32)
        if whole < spec.numel:
            tail = casts.to_float32(view.read(whole, spec.numel), spec.dtype.name)
            packed, top = fourbit.encode_tail(tail, tables.table(self.table))
            sink.write("weight", whole // 2, packed)
            last = np.array([top], np.float32)
            total += float(top)
            if not self.double_quant:
                sink.write("weight.absmax", whole // group, last)
        if self.double_quant:
            self._encode_scales(view, sink, work, total, last)

    def _encode_scales(self, view: View, sink: Sink, work: Work, total: float, last: np.ndarray) -> None:
        """Make the second pass of double quantization: find the scales again, and code them less their mean.

        Finding them again costs a read of the weights; keeping them from the first pass would take 4 bytes a group.
        """
        spec, group = view.spec, self.group_size
        groups = -(-spec.numel // group)
        if not math.isfinite(total):
            raise VerifyFailed(
                f"{spec.name}: it holds NaN or infinities, and double quantization would spread them to every weight;"
                f" use {setting('double_quant')}=false, or keep the tensor by a rule"
            )
        offset = np.float32(total / groups)

        def encode_range(start: int, stop: int) -> None:
            absmax = work.array("absmax", (stop - start) // group, np.float32)
            work.kernels.group_absmax(view.read(start, stop), spec.dtype.name, group, absmax)
            put(start // group, absmax)

        def put(first: int, absmax: np.ndarray) -> None:
            codes, tops = dynamic_map.encode(absmax - offset)
            sink.write("weight.absmax", first, codes)
            sink.write("weight.nested_absmax", first // dynamic_map.GROUP, tops)

        nested = group * dynamic_map.GROUP
        whole = spec.numel // nested * nested
        work.sweep(whole, nested, encode_range)
        rest = (spec.numel - whole) // group
        if rest or last.size:
            absmax = np.empty(rest, np.float32)
            if rest:
                block = view.read(whole, whole + rest * group)
                work.kernels.group_absmax(block, spec.dtype.name, group, absmax)
            put(whole // group, np.append(absmax, last))
        state = self._state_json(spec, float(offset)).encode()
        sink.write(self._state, 0, np.frombuffer(state, np.uint8))

    def range_align(self, spec: TensorSpec) -> int | None:
        return None if self.double_quant else self.group_size

    def align(self, spec: TensorSpec) -> int:
        return self.group_size * (dynamic_map.GROUP if self.double_quant else 1)

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.bitsandbytes import fourbit, tables

        codes, absmax = self._read(spec, stored, start, stop)
        group, whole = self.group_size, (stop - start) // self.group_size * self.group_size
        fourbit.decode(codes[: whole // 2], absmax[: whole // group], group, self.table == "fp4", out[:whole])
        if whole < stop - start:
            fourbit.decode_tail(codes[whole // 2 :], absmax[-1], tables.table(self.table), out[whole:])

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels import compare
        from loaders.quantization.kernels.bitsandbytes import fourbit, tables
        from loaders.quantization.kernels.cpu import kernel_input

        codes, absmax = self._read(spec, stored, start, stop)
        x, group = kernel_input(block, source), self.group_size
        whole = (stop - start) // group * group
        fourbit.compare(x[:whole], codes[: whole // 2], absmax[: whole // group], group, self.table == "fp4", sums)
        if whole < stop - start:
            tail = np.empty(stop - start - whole, np.float32)
            fourbit.decode_tail(codes[whole // 2 :], absmax[-1], tables.table(self.table), tail)
            compare.compare(x[whole:], tail, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        group, per_item = self.group_size, 2 * self._storage.item_bytes
        if self.double_quant or start % group or stop % group:
            return None
        codes = "weight", start // per_item, -(-stop // per_item)
        return codes, ("weight.absmax", start // group, stop // group)

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device import decode

        codes, absmax = parts
        return decode.fourbit(codes[: count // 2], decode.floats(absmax, "F32"), self.table, self.group_size)

    def _read(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of items [start, stop) and the scales of their groups."""
        group, per_item = self.group_size, 2 * self._storage.item_bytes
        first, last = start // group, -(-stop // group)
        absmax = stored.read("weight.absmax", first, last)
        if self.double_quant:
            absmax = self._decode_scales(spec, stored, absmax, first, last)
        codes = stored.read("weight", start // per_item, -(-stop // per_item)).view(np.uint8)
        return codes[: -(-(stop - start) // 2)], absmax

    def _decode_scales(self, spec: TensorSpec, stored: Stored, codes: np.ndarray, first: int, last: int) -> np.ndarray:
        """Decode the scales of groups [first, last) from their codes; `first` begins a group of 256 scales."""
        tops = stored.read("weight.nested_absmax", first // dynamic_map.GROUP, -(-last // dynamic_map.GROUP))
        longest = self.stored(spec)[self._state].shape[0]
        state = read_state(stored.read(self._state, 0, longest).tobytes(), spec.name)
        return dynamic_map.decode(codes, tops) + np.float32(state["nested_offset"])


@cache
def _widest_gap(table: str) -> float:
    """Return the widest gap between neighbouring values of a table's codes."""
    return float(np.diff(np.sort(np.array(tables.VALUES[table]))).max())


def read_state(raw: bytes, name: str) -> dict[str, Any]:
    """Parse the JSON of a quant_state tensor.

    Raises:
        BadCheckpoint: it is not what bitsandbytes writes.
    """
    try:
        state = json.loads(raw)
        known = state["quant_type"] in ("nf4", "fp4") and state["blocksize"] in GROUP_SIZES
        sane = all(type(n) is int and n >= 0 for n in state["shape"]) and isinstance(state["dtype"], str)
        nested = "nested_blocksize" not in state or (
            state["nested_blocksize"] == dynamic_map.GROUP and isinstance(state["nested_offset"], float)
        )
    except (ValueError, KeyError, TypeError):  # not JSON, or JSON of another shape: refused below
        known = sane = nested = False
    if not (known and sane and nested):
        raise BadCheckpoint(f"{name}: its quant_state is not one of bitsandbytes' 4-bit formats: {raw[:200]!r}")
    return dict(state)
