"""Quantized modules of bitsandbytes and hqq, made from the parts that a scheme stores.

They use public interfaces only: bitsandbytes 0.50, nn/modules.py (Params4bit.from_prequantized, Int8Params); hqq 0.2.8,
core/quantize.py (HQQLinear.load_state_dict).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from loaders.errors import BadSpec
from loaders.models.skeleton import BUILDING, EmptyOnMeta
from loaders.models.weights import ModelWeights, torch_dtype
from loaders.quantization.scheme import Decoder, Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.bitsandbytes_int8 import SCALES, LlmInt8
from loaders.quantization.schemes.hqq import PACKING, Hqq
from loaders.specs import StoredSpec, TensorSpec, WeightSpec
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor

Stored = Mapping[str, torch.Tensor]
OUTLIERS = 6.0  # transformers' default llm_int8_threshold: inputs beyond it are computed in float16


def linear_4bit(scheme: Any, spec: TensorSpec, stored: Stored, bias: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """Make a Linear4bit of bitsandbytes."""
    bitsandbytes: Any = import_module("bitsandbytes")

    rows, columns = spec.shape
    sizes = {
        "quant_type": scheme.table,
        "compress_statistics": scheme.double_quant,
        "quant_storage": stored["weight"].dtype,
    }
    with EmptyOnMeta():
        made: Any = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=bias is not None, compute_dtype=dtype, device="meta", **sizes
        )
    made.bias = bias
    if device == "meta":
        # There is no quant_state on meta: bitsandbytes reads it from the bytes of its JSON, which are on rank 0.
        made.weight = bitsandbytes.nn.Params4bit(
            stored["weight"], requires_grad=False, blocksize=scheme.group_size, bnb_quantized=True, module=made, **sizes
        )
        return made  # type: ignore[no-any-return]
    statistics = {role.removeprefix("weight."): part.to(device) for role, part in stored.items() if role != "weight"}
    made.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        stored["weight"], quantized_stats=dict(statistics), requires_grad=False, device=device, module=made
    )
    if repacks_4bit(device):
        made.weight.quant_state.statistics = statistics
        made.register_state_dict_post_hook(_with_statistics)
    return made  # type: ignore[no-any-return]


def _with_statistics(made: Any, state: dict[str, Any], prefix: str, about: Any) -> None:
    """Put back what a weight was quantized with after its module has told its state.

    bitsandbytes 0.50 packs a weight anew at its first use on CPUs with AVX512-BF16. To tell its state, it unpacks it
    again, but its scales stay transposed and in bfloat16 (functional.py, _convert_weight_packed_for_cpu_inverse), in
    the state and in the module, which then computes something else.
    """
    # A weight that is cut over ranks has no quant_state; one that others have quantized again, no such statistics.
    now = getattr(made.weight, "quant_state", None)
    statistics = getattr(now, "statistics", None)
    if statistics is None or not hasattr(now, "original_qshape"):
        return
    functional: Any = import_module("bitsandbytes.functional")
    made.quant_state = functional.QuantState.from_dict(dict(statistics), made.weight.device)
    made.quant_state.statistics = statistics
    made.weight.quant_state = made.quant_state
    state.update({f"{prefix}weight.{name}": part for name, part in made.quant_state.as_dict(packed=True).items()})


def linear_8bit(scheme: Any, spec: TensorSpec, stored: Stored, bias: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """Make a Linear8bitLt of bitsandbytes."""
    bitsandbytes: Any = import_module("bitsandbytes")

    rows, columns = spec.shape
    with EmptyOnMeta():
        made: Any = bitsandbytes.nn.Linear8bitLt(
            columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIERS, device="meta"
        )
    codes, scales = stored["weight"].to(device), stored[SCALES].to(device)
    made.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    made.bias = bias
    return made  # type: ignore[no-any-return]


def hqq_linear(scheme: Any, spec: TensorSpec, stored: Stored, bias: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """Make an HQQLinear of hqq."""
    hqq: Any = import_module("hqq.core.quantize")
    made: Any = hqq.HQQLinear(None, None, compute_dtype=dtype, device=device, initialize=False)
    made.load_state_dict(
        {
            "W_q": nn.Parameter(stored["W_q"], requires_grad=False),
            "nbits": scheme.bits,
            "group_size": scheme.group_size,
            "shape": spec.shape,
            "scale": stored["scale"],
            "zero": stored["zero"],
            "axis": scheme.axis,
            "packing": PACKING[scheme.bits],
            "unpack_view_dtype": torch.int32 if scheme.bits == 3 else torch.uint8,
            "view_as_float": stored["W_q"].is_floating_point(),
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
            "bias": bias,
            "offload_meta": False,
            "stores_quant_config": True,
            "channel_wise": True,
            "optimize": True,
            "round_zero": scheme.rounds_zero,
        }
    )
    made.encoded_state_dict = False
    return made  # type: ignore[no-any-return]


ENGINES: dict[type, Callable[..., nn.Module]] = {Bnb4: linear_4bit, LlmInt8: linear_8bit, Hqq: hqq_linear}


def module_maker(scheme: Decoder) -> Callable[..., nn.Module]:
    """Return the function that makes an engine's module from the parts that the scheme stores.

    Raises:
        BadSpec: no engine has modules for the scheme in transformers' models.
    """
    for kind, make in ENGINES.items():
        if isinstance(scheme, kind):
            return make
    known = ", ".join(kind.kind for kind in ENGINES)  # type: ignore[attr-defined]
    raise BadSpec(
        f"quantize: no modules for {scheme.kind} are made here; known: {known}. Give its weights as floats with"
        " decode=True, or load an output of the job with transformers' from_pretrained"
    )


def runs_here(scheme: Decoder) -> bool:
    """Whether modules for the scheme can be made."""
    return isinstance(scheme, tuple(ENGINES))


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that an engine's module holds quantized.

    encoding: how it is encoded, if the checkpoint has it plain. dtype: of the module's products.
    """

    scheme: Scheme
    tensor: LogicalTensor
    encoding: Encoding | None
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """The bytes that are stored of it, which the module holds."""
        return sum(part.size for part in self._parts.values())

    @property
    def _parts(self) -> Mapping[str, StoredSpec | WeightSpec]:
        return dict(self.tensor.stored) if self.encoding is None else self.encoding.stored

    def module(self, weights: ModelWeights, bias: torch.Tensor | None, device: str) -> nn.Module:
        """Read or encode the weight, and make the engine's module of it."""
        stored = weights.stored(self.tensor) if self.encoding is None else weights.encoded(self.encoding)
        return self._made(stored, bias, device)

    def on_meta(self, bias: torch.Tensor | None) -> nn.Module:
        """Make the engine's module with meta tensors: shapes and dtypes without values."""
        stored = {
            role: torch.empty(part.shape, dtype=torch_dtype(part.dtype), device="meta")
            for role, part in self._parts.items()
        }
        return self._made(stored, bias, "meta")

    def _made(self, stored: Stored, bias: torch.Tensor | None, device: str) -> nn.Module:
        with BUILDING:
            return module_maker(self.scheme)(self.scheme, self.tensor.spec, stored, bias, self.dtype, device).eval()


def repacks_4bit(device: str) -> bool:
    """Whether bitsandbytes repacks 4-bit weights at their first use on a device: see `Bnb4.stops_cpu_kernel`."""
    functional: Any = import_module("bitsandbytes.functional")
    # Older versions lack both the check and the kernel.
    has_avx512bf16 = getattr(functional, "has_avx512bf16", None)
    return device == "cpu" and has_avx512bf16 is not None and bool(has_avx512bf16())


def unusable_4bit(tensors: Iterable[tuple[TensorSpec, Decoder, str]]) -> str | None:
    """Describe the first matrix that bitsandbytes cannot run in 4 bits on its device; None if there is none."""
    for spec, scheme, device in tensors:
        reason = scheme.stops_cpu_kernel(spec.shape) if isinstance(scheme, Bnb4) else None
        if reason is not None and repacks_4bit(device):
            return (
                f"{spec.name} {list(spec.shape)} cannot run in 4 bits on this CPU: {reason}, which bitsandbytes needs"
                " on a CPU with AVX512-BF16"
            )
    return None
