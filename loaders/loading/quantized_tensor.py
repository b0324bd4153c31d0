"""Quantized tensors in memory: the parts that a scheme stored, and their decoding to weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.backends import kernels_of
from loaders.backends.arrays import as_torch
from loaders.backends.devices import device_name, torch_device
from loaders.backends.threads import ThreadedWork
from loaders.dtypes import DType, Shape, dtype_named, storage_of
from loaders.errors import BadSpec
from loaders.loading.resources import shared
from loaders.near_misses import near
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, Scheme
from loaders.specs import StoredSpec, TensorSpec, WeightSpec
from loaders.stats import ErrorSums
from loaders.tensors.logical_tensor import stored_name
from loaders.words import counted

if TYPE_CHECKING:
    import torch

# Weights decoded at once, 1 MiB of float32: they are still in the CPU's cache when they are rounded to the result.
INNER = 1 << 18


class HeldParts:
    """A `Stored` over finished parts in memory."""

    def __init__(self, parts: Mapping[str, np.ndarray]) -> None:
        self._parts = parts

    def read(self, role: str, start: int, stop: int) -> Block:
        return self._parts[role][start:stop]


# Equality is identity, as for torch's tensors: comparing numpy arrays gives no single truth value.
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class QuantizedTensor:
    """A quantized weight: `parts` are the arrays that `scheme` stores for it, by role, flat, in numpy's dtypes.

    `spec` has the shape and dtype of the weight that was encoded and that `dequantize` returns, on `device`. `names`
    are the engine's names of the parts, by role, where they differ from the usual ones. `tensors` gives the parts as
    torch tensors by those names, and `by_role` by their roles. `error` is how far the weight is from its source, if
    that was measured.
    """

    name: str
    scheme: Scheme
    spec: TensorSpec
    parts: Mapping[str, np.ndarray]
    device: str = "cpu"
    stored: Mapping[str, StoredSpec] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    error: ErrorSums | None = None

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def numel(self) -> int:
        """Return the number of weights."""
        return self.spec.numel

    def to(self, device: Any) -> QuantizedTensor:
        """Return the tensor for a device: "cuda", "cuda:1", "mps", "cpu", or torch's own object.

        `tensors`, `by_role` and `dequantize` then give tensors there. The encoded parts themselves are shared with this
        one, in the CPU's memory.

        Raises:
            BadSpec: there is no such device.
        """
        name = device_name(device) or "cpu"
        torch_device(name)
        return replace(self, device=name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parts as torch tensors on the device, by the names under which the engine stores them."""
        return {self._name(role): self._tensor(role) for role in self.parts}

    def by_role(self) -> dict[str, torch.Tensor]:
        """Return the parts as torch tensors on the device, by role: "weight", "weight.absmax", "weight_scale", ..."""
        return {role: self._tensor(role) for role in self.parts}

    def _name(self, role: str) -> str:
        return self.names.get(role) or stored_name(self.name, role)

    def _tensor(self, role: str) -> Any:
        part, stored = self.parts[role], self.stored[role]
        shape = (part.size,) if stored.is_bound else stored.shape
        made = as_torch(
            part.view(np.uint8),
            WeightSpec(name=self._name(role), dtype=stored.dtype, shape=shape, file="", offset=0, size=part.nbytes),
        )
        return made if self.device == "cpu" else made.to(torch_device(self.device)[1])

    def dequantize(self, dtype: Any = None) -> torch.Tensor:
        """Decode the weight to its own float dtype or another ("float32", torch.float16), with all shared threads.

        Raises:
            BadSpec: no such float dtype.
        """
        wanted = self.dtype if dtype is None else float_dtype(dtype)
        return self._decoded(0, self.spec.numel, wanted, self.shape)

    def dequantize_range(self, start: int, stop: int, dtype: Any = None) -> torch.Tensor:
        """Decode weights [start, stop) of the flattened tensor, shape (stop - start,), and no other groups.

        Raises:
            BadSpec: no such float dtype, or the range is not within the tensor.
        """
        if not 0 <= start <= stop <= self.spec.numel:
            raise BadSpec(f"{self.name}: [{start}, {stop}) is not within its {self.spec.numel} weights")
        wanted = self.dtype if dtype is None else float_dtype(dtype)
        return self._decoded(start, stop, wanted, (stop - start,))

    def _decoded(self, start: int, stop: int, dtype: DType, shape: Shape) -> torch.Tensor:
        work = ThreadedWork(kernels_of("cpu"), shared().crew, threading.Event())
        align = self.scheme.align(self.spec)
        first = start // align * align
        out = np.empty(stop - start, storage_of(dtype))
        stored = HeldParts(self.parts)
        inner = -(-INNER // align) * align

        def decode(begin: int, end: int) -> None:
            for at in range(first + begin, first + end, inner):
                last = min(at + inner, self.spec.numel, first + end)
                values = work.array("dequantized", last - at, np.float32)
                self.scheme.decode(self.spec, stored, at, last, values, work)
                low, high = max(at, start), min(last, stop)
                out[low - start : high - start] = casts.cast(values[low - at : high - at], "F32", dtype.name)

        end = min(-(-stop // align) * align, self.spec.numel)
        if stop > start:
            work.sweep(end - first, align, decode)
        made = as_torch(
            out.view(np.uint8), WeightSpec(name=self.name, dtype=dtype, shape=shape, file="", offset=0, size=out.nbytes)
        )
        placed: torch.Tensor = made if self.device == "cpu" else made.to(torch_device(self.device)[1])
        return placed

    def __reduce__(self) -> tuple[Any, ...]:
        # The mappings may be views that refuse to be changed, and these refuse to be pickled and copied, too.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _restored, ({n: dict(v) if isinstance(v, Mapping) else v for n, v in values.items()},)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        error = "" if self.error is None else f", relative error {self.error.relative_error:.3g}"
        place = "" if self.device == "cpu" else f", for {self.device}"
        return (
            f"QuantizedTensor({self.name}, {self.scheme.kind}, {shape} of {self.dtype.torch},"
            f" {self.nbytes:,} bytes{error}{place})"
        )


def _restored(values: dict[str, Any]) -> QuantizedTensor:
    return QuantizedTensor(**values)


class QuantizedWeights(dict[str, Any]):
    """Weights by name, as `quantize` gives them: a dict, shown in a line, that `save` takes.

    `config` is that of the model for which they were quantized, {} without one. `nbytes` are the bytes of all. `notes`
    are remarks, as in the statistics of a load.
    """

    def __init__(
        self, weights: Mapping[str, Any], config: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
    ) -> None:
        super().__init__(weights)
        self.config = dict(config or {})
        self.notes = tuple(notes)

    @property
    def nbytes(self) -> int:
        return sum(int(each.nbytes) for each in self.values())

    def copy(self) -> QuantizedWeights:
        return QuantizedWeights(self, self.config, self.notes)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedWeights, (dict(self), self.config, self.notes)

    def __repr__(self) -> str:
        quantized = [each for each in self.values() if isinstance(each, QuantizedTensor)]
        kinds = ", ".join(dict.fromkeys(each.scheme.kind for each in quantized))
        said = f", {len(quantized)} quantized ({kinds})" if quantized else ""
        return f"QuantizedWeights({counted(len(self), 'tensor')}{said}, {self.nbytes:,} bytes)"


def float_dtype(dtype: Any) -> DType:
    """Return a float dtype by its name in safetensors ("BF16") or torch ("bfloat16"), or by torch's object.

    Raises:
        BadSpec: it is not float32, float16 or bfloat16.
    """
    found = next((d for n in ("F32", "F16", "BF16") for d in (dtype_named(n),) if str(dtype) in _names(d)), None)
    if found is None:
        hint = near(str(dtype), ("float32", "float16", "bfloat16"))
        raise BadSpec(f"dtype: expected float32, float16 or bfloat16, found {dtype}{hint}")
    return found


def _names(dtype: DType) -> tuple[str, ...]:
    return dtype.name, dtype.torch, f"torch.{dtype.torch}"
