"""The factors of an adapter as windows of its tensors, for each kind of layer, with every shape checked.

peft stores A as (rank, inputs) and B as (outputs, rank). A linear layer's weight is (outputs, inputs), a convolution's
has further dimensions of inputs; Conv1D of GPT-2 and embeddings are the other way around. Of a stack of E experts, A is
(E * rank, inputs), expert by expert, and B (outputs, rank * E), whose columns count through the experts first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from loaders.checkpoints.adapter import INNER, Adapter
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import row_major
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.merged import Factor, Product

# Model types whose linear layers are transformers' Conv1D, which store (inputs, outputs). Only square weights need it.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
EXPERT = re.compile(r"^(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
DOWN = ("down_proj", "w2")


class Finder(Protocol):
    """What finds tensors of the base by names of the adapter's."""

    tensors: dict[str, LogicalTensor]

    def find(self, name: str) -> LogicalTensor | None: ...


def layer_product(
    checkpoint: Checkpoint, adapter: Adapter, module: str, weight: LogicalTensor, parts: Mapping[str, WeightSpec]
) -> tuple[Product, int]:
    """Return the product for a layer's weight, and its rank.

    Raises:
        BadCheckpoint: a factor is missing, or shapes or the rank do not fit.
    """
    a, b = _pair(module, parts)
    is_embedding = "lora_embedding_A" in parts
    rank = _rank(adapter, module, a, a.shape[0])
    outputs, inputs = b.shape[0], math.prod(a.shape[1:])
    is_narrow = math.prod(b.shape) == outputs * rank
    rows, columns = (weight.shape or (1,))[0], math.prod(weight.shape[1:])
    straight, turned = (rows, columns) == (outputs, inputs), (rows, columns) == (inputs, outputs)
    if is_embedding:
        straight = False
    elif straight and turned:
        straight = not _is_conv1d(checkpoint, weight, adapter.settings.fan_in_fan_out)
    if not is_narrow or not (straight or turned) or (len(weight.shape) > 2 and weight.shape[1:] != a.shape[1:]):
        raise BadCheckpoint(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} do not fit {weight.name} {list(weight.shape)}"
            + ("; grouped convolutions are not merged" if len(weight.shape) > 2 else "; is this the adapter's base?")
        )
    left = Factor(b, 0, (1, outputs, rank), (outputs * rank, rank, 1))
    right = Factor(a, 0, (1, rank, inputs), (rank * inputs, inputs, 1))
    if not straight:
        left, right = _turned(right), _turned(left)
    magnitude = _magnitude(adapter, module, parts, outputs)
    scaling = adapter.settings.scaling(module, rank)
    product = Product(left=left, right=right, scaling=scaling, magnitude=magnitude, is_by_column=not straight)
    return product, rank


def _pair(module: str, parts: Mapping[str, WeightSpec]) -> tuple[WeightSpec, WeightSpec]:
    """Return A and B."""
    names = EMBEDDING if EMBEDDING[0] in parts or EMBEDDING[1] in parts else LINEAR
    unknown = set(parts) - {*names, MAGNITUDE, "lora_B.bias"}
    missing = [name for name in names if name not in parts]
    if missing or unknown:
        found = ", ".join(spec.name for spec in parts.values())
        raise BadCheckpoint(f"{module}: expected {' and '.join(names)} in the adapter, found {found}; save it again")
    a, b = (parts[name] for name in names)
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise BadCheckpoint(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}: expected matrices; its shards were not gathered"
            " when it was saved"
        )
    return a, b


def _rank(adapter: Adapter, module: str, a: WeightSpec, rank: int) -> int:
    """Return the rank, which tensors and config agree on."""
    wanted = adapter.settings.rank_of(module)
    if rank != wanted:
        raise BadCheckpoint(
            f"{a.name} {list(a.shape)}: its rank is {rank}, and adapter_config.json says {wanted} (r, rank_pattern);"
            " one of the two is of another adapter"
        )
    return rank


def _turned(factor: Factor) -> Factor:
    """Return the transposes of a stack of matrices."""
    (e, r, c), (one, two, three) = factor.shape, factor.stride
    return Factor(factor.stored, factor.offset, (e, c, r), (one, three, two))


def _is_conv1d(checkpoint: Checkpoint, weight: LogicalTensor, fan_in_fan_out: bool) -> bool:
    """Whether a square weight is (inputs, outputs). The way in which it is read may have turned it already."""
    is_turned = weight.window is not None and weight.window.stride != row_major(weight.shape)
    return (fan_in_fan_out or checkpoint.config.get("model_type") in CONV1D) and not is_turned


def _magnitude(adapter: Adapter, module: str, parts: Mapping[str, WeightSpec], outputs: int) -> WeightSpec | None:
    spec = parts.get(MAGNITUDE)
    if (spec is not None) != adapter.settings.use_dora:
        says = "true" if adapter.settings.use_dora else "false"
        has = "a" if spec is not None else "no"
        raise BadCheckpoint(f"{module}: adapter_config.json says use_dora={says}, and there is {has} {MAGNITUDE}")
    if spec is not None and spec.numel() != outputs:
        raise BadCheckpoint(f"{spec.name} {list(spec.shape)}: expected {outputs} magnitudes, one for each output")
    return spec


# --- experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Where a tensor lies in a parameter of stacked experts: the whole stack, or the rows of one expert.

    `expert` None is the whole stack. Rows count the outputs of one expert from `first` on by `step`.
    """

    experts: int
    rank: int
    scaling: float
    outputs: int
    inputs: int
    expert: int | None = None
    first: int = 0
    step: int = 1
    is_transposed: bool = False


def parameters_of(
    checkpoint: Checkpoint, finder: Finder, adapter: Adapter, module: str, parts: Mapping[str, WeightSpec]
) -> Iterator[tuple[LogicalTensor, Experts]]:
    """Yield the tensors of the experts' parameter that a module's factors belong to, and their place in it.

    A module of experts has two parameters, gate_up_proj and down_proj. peft tells their factors apart by how deep it
    wrapped them; shapes do so here, since one has twice the other's inner size.

    Raises:
        BadCheckpoint, BadSpec: the factors fit neither, or contradict the config.
    """
    name = module.replace(INNER, "")
    stacks = [(p, finder.find(f"{name}.{p}")) for p in ("gate_up_proj", "down_proj")]
    singles = _singles(finder, name)
    if not singles and not any(stack for _, stack in stacks):
        return
    a, b = _pair(module, parts)
    if MAGNITUDE in parts or "lora_B.bias" in parts:
        raise BadSpec(f"{setting('adapter')}: {module}: DoRA and lora_bias of stacked experts are not merged")
    outputs, inputs = b.shape[0], a.shape[1]
    for parameter, stack in stacks:
        if stack is not None and len(stack.shape) == 3:
            is_transposed = stack.shape[1:] == (inputs, outputs)
            if is_transposed and inputs == outputs:
                is_transposed = any(s.is_transposed for s in checkpoint.family.stacks)
            if is_transposed or stack.shape[1:] == (outputs, inputs):
                place = _experts(adapter, name, parameter, a, b, stack.shape[0])
                yield stack, replace(place, is_transposed=is_transposed)
                return
    for is_down in (False, True):
        mine = {key: tensor for key, tensor in singles.items() if (key[1] in DOWN) == is_down}
        count = 1 + max((expert for expert, _ in mine), default=-1)
        many = 1 if is_down else 2
        if mine and all(r.shape[0] * many == outputs and r.shape[1:] == (inputs,) for r in mine.values()):
            place = _experts(adapter, name, "down_proj" if is_down else "gate_up_proj", a, b, count)
            for (expert, part), tensor in mine.items():
                index = int(part in ("up_proj", "w3"))
                is_mixed = tensor.whole is not None and any(s.is_interleaved for s in checkpoint.family.stacks)
                first, step = (index, many) if is_mixed else (index * tensor.shape[0], 1)
                yield tensor, replace(place, expert=expert, first=first, step=step)
            return
    raise BadCheckpoint(
        f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} fit neither gate_up_proj nor down_proj of {name}; is"
        " this the adapter's base? Adapters of peft before 0.18 may have inputs and outputs the other way around"
    )


def _singles(finder: Finder, module: str) -> dict[tuple[int, str], LogicalTensor]:
    """Return the matrices of single experts below a module, by expert and part."""
    probes = (finder.find(f"{module}.0.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj", "w1", "w2"))
    probe = next((tensor for tensor in probes if tensor is not None), None)
    if probe is None:
        return {}
    prefix = probe.name.rpartition(".0.")[0] + "."
    found = {}
    for name, tensor in finder.tensors.items():
        if name.startswith(prefix) and (match := EXPERT.match(name.removeprefix(prefix))):
            found[int(match["expert"]), match["part"]] = tensor
    return found


def _experts(adapter: Adapter, module: str, parameter: str, a: WeightSpec, b: WeightSpec, experts: int) -> Experts:
    """Return what is the same for all experts: their number, the rank, the scaling, the sizes."""
    rows, columns = a.shape[0], math.prod(b.shape[1:])
    if len(a.shape) != 2 or rows != columns or rows % experts:
        raise BadCheckpoint(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}: expected the rank times {experts} experts as the"
            " rows of one and the columns of the other"
        )
    name = f"{module}.{parameter}"
    rank = _rank(adapter, name, a, rows // experts)
    scaling = adapter.settings.scaling(name, rank)
    return Experts(experts=experts, rank=rank, scaling=scaling, outputs=b.shape[0], inputs=a.shape[1])


def expert_product(place: Experts, tensor: LogicalTensor, parts: Mapping[str, WeightSpec]) -> tuple[Product, int]:
    """Return the product for a stack of experts, or for the tensor of one of them, and its rank."""
    (a, b), e, rank = (parts[name] for name in LINEAR), place.experts, place.rank
    # Column k * E + e of B belongs to column k of expert e.
    left = Factor(b, 0, (e, place.outputs, rank), (1, rank * e, e))
    right = Factor(a, 0, (e, rank, place.inputs), (rank * place.inputs, place.inputs, 1))
    if place.expert is not None:
        rows = tensor.shape[0]
        left = Factor(b, place.expert + place.first * rank * e, (1, rows, rank), (1, place.step * rank * e, e))
        right = Factor(a, place.expert * rank * place.inputs, (1, rank, place.inputs), right.stride)
    elif place.is_transposed:
        left, right = _turned(right), _turned(left)
    return Product(left=left, right=right, scaling=place.scaling), rank
