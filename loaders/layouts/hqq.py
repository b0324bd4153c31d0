"""The layout of the hqq package: config.json as the source has it, and all weights in qmodel.pt.

qmodel.pt is what torch.save makes of {module: {key: value}}. A quantized module has W_q, scale and zero, and plain
values beside them; a plain module has its parameters. Every module has an entry, also one that is tied to another, of
the same bytes.

Source: hqq/models/base.py (serialize_weights, from_quantized) and hqq/core/quantize.py (HQQLinear.state_dict).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers.pytorch_pickle import Ref
from loaders.containers.pytorch_pieces import cut
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec, setting
from loaders.layouts.base import Assembly, Joined, Naming, Placed
from loaders.layouts.hf import plain_config
from loaders.quantization.schemes.hqq import PACKING, Hqq
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, StoredTensor, TensorSpec
from loaders.tensors.logical_tensor import stored_name

EXPERTS = (
    "hqq finds experts that lie one by one beside transformers 4 only: transformers 5 fuses them, and hqq neither saves"
    " nor loads fused ones"
)
QMODEL = "qmodel.pt"
ROLES = ("W_q", "scale", "zero")  # the roles of `Hqq` that are tensors in qmodel.pt; all others are plain values


class HqqLayout:
    """The layout of the hqq package; see `Layout` and `Assembling`."""

    name: ClassVar[str] = "hqq"
    containers: ClassVar[tuple[str, ...]] = ("pytorch",)
    file: ClassVar[str | None] = QMODEL

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        return tuple(self._placed(checkpoint, decisions))

    def _placed(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> Iterator[Placed]:
        wanted = load_dtype(checkpoint.config)
        for decision in decisions:
            tensor, encoding = decision.tensor, decision.encoding
            if encoding is None:
                continue
            scheme = encoding.scheme
            if encoding.action == "quantize" and not isinstance(scheme, Hqq):
                raise BadSpec(
                    f"{setting('layout')}: hqq holds what hqq quantizes, not {scheme.kind}; use"
                    f" {setting('layout')}=auto"
                )
            if encoding.action == "quantize" and wanted != tensor.dtype:
                encoding = replace(encoding, cast=wanted)
            stored = {
                role: StoredTensor(stored_name(tensor.name, role), part)
                for role, part in encoding.stored.items()
                if role in ROLES or not isinstance(scheme, Hqq)
            }
            yield Placed(encoding, stored)

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        return None  # a unit's file becomes a piece of the one whose pickle `assemble` makes

    def modules(self, checkpoint: Checkpoint, placed: Iterable[Placed]) -> Any:
        """Return the modules in the order of their names, each with its keys and values in hqq's order: what is `about`
        a file of all tensors.
        """
        modules: dict[str, dict[str, Any]] = {}
        for each in placed:
            module, _, key = each.tensor.name.rpartition(".")
            if not module:
                raise BadSpec(
                    f"{setting('layout')}: {each.tensor.name} is a parameter of the whole model, and hqq keeps those of"
                    " modules alone; use another layout, or drop it by a rule"
                )
            values = modules.setdefault(module, {})
            if isinstance(scheme := each.encoding.scheme, Hqq):
                bias = values.pop("bias", None)
                values |= _module(
                    scheme, each.encoding.spec, {role: tensor.name for role, tensor in each.stored.items()}
                )
                if bias is not None:
                    _set_bias(values, bias)
            elif key == "bias" and "W_q" in values:
                _set_bias(values, Ref(each.stored["weight"].name))
            else:
                values[key] = Ref(each.stored["weight"].name)
        for kept, tied in checkpoint.family.tied_pairs(checkpoint.config):
            module, _, key = kept.rpartition(".")
            other, _, other_key = tied.rpartition(".")
            if isinstance(modules.get(module, {}).get(key), Ref) and other not in modules:
                modules[other] = {other_key: modules[module][key]}
        return tuple((module, tuple(values.items())) for module, values in modules.items())

    def aux(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return checkpoint.aux

    def assemble(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], files: Sequence[OutputFile], naming: Naming
    ) -> Assembly:
        if naming.split:
            raise BadSpec(f"{setting('split')}: only gguf can be one file or several; hqq reads one qmodel.pt")
        about = self.modules(checkpoint, self._placed(checkpoint, decisions))
        head, pieces, tail = cut(QMODEL, [file.slots for file in files], about)
        return Assembly(pieces, {}, Joined(QMODEL, head, tail))

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        if any(decision.tensor.role == "expert" for decision in decisions):
            return (EXPERTS,)
        return ()

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        return plain_config(checkpoint.config) or None

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        return None


def _module(scheme: Hqq, spec: TensorSpec, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of a quantized module without a bias."""
    return {
        "W_q": Ref(names["W_q"], is_parameter=True),
        "nbits": scheme.bits,
        "group_size": scheme.group_size,
        "shape": spec.shape,
        "scale": Ref(names["scale"]),
        "zero": Ref(names["zero"]),
        "axis": scheme.axis,
        "packing": PACKING[scheme.bits],
        "unpack_view_dtype": DTYPES["I32" if scheme.bits == 3 else "U8"],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": scheme.dtype_of(spec),
        "offload_meta": False,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": scheme.rounds_zero,
    }


def _set_bias(values: dict[str, Any], bias: Ref) -> None:
    """Put a bias where hqq's state_dict has it: after compute_dtype, before the keys of LATER."""
    later = {key: values.pop(key) for key in list(values) if key in LATER}
    values |= {"bias": bias, **later}


LATER = ("offload_meta", "stores_quant_config", "channel_wise", "optimize", "round_zero")
