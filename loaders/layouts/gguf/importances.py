"""The importances of a GGUF's tensors: what an importance matrix holds for each, and what is missing, by cause.

What is done about it is what llama-quantize does: a tensor without importances is quantized as without a matrix,
channels of an expert that no token went through count alike, and a tensor of another size ends the job. Types of about
two bits are refused without importances, which llama.cpp says would be garbage.

Source: llama.cpp, src/llama-quant.cpp: tensor_requires_imatrix, llama_model_quantize_impl.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from loaders.architectures.family import natural_key
from loaders.errors import BadSpec, setting
from loaders.imatrix.matrix import ImportanceMatrix, TensorImportance
from loaders.layouts.base import Placed
from loaders.quantization.schemes.ggml import WEIGHTED, Ggml
from loaders.specs import StoredTensor
from loaders.words import counted

NEEDING = (
    "IQ3_XXS",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ1_M",
    "IQ1_S",
)  # types that llama.cpp writes by importances alone
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
ENDS = (*EMBEDDINGS, "output.weight")  # of a model, which may go without whatever their type
FEW = 4  # names that a note lists


@dataclass(frozen=True, slots=True)
class Weighing:
    """What is stored of each tensor, with its importances where there are any, and notes on what is missing."""

    placed: tuple[Placed, ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Missing:
    """Names of tensors in a GGUF, by what is missing; each once, in their order."""

    tensors: dict[str, None] = field(default_factory=dict)
    sizes: dict[str, None] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)


def weighed(placed: Sequence[Placed], matrix: ImportanceMatrix | None, file_type: str | None) -> Weighing:
    """Give each tensor whose type goes by importances its own. `file_type` is the mix: in Q2_K_S, Q2_K needs them.

    Raises:
        BadSpec: a type needs importances, and there are none; a tensor has another size than in the matrix; or the
            matrix has none of the model's tensors.
    """
    missing, made, found, needing = _Missing(), list[Placed](), set[str](), dict[str, str]()
    for each in placed:
        scheme, tensor = each.encoding.scheme, each.stored.get("weight")
        if not isinstance(scheme, Ggml) or tensor is None or each.encoding.action != "quantize":
            made.append(each)
            continue
        importance = None if matrix is None else _importance(matrix, tensor, missing)
        if importance is not None:
            found.add(tensor.name)
        elif _needs(tensor.name, scheme.type, file_type):
            needing[tensor.name] = scheme.type
        if importance is not None and scheme.type in WEIGHTED:
            encoding = replace(each.encoding, scheme=replace(scheme, is_weighted=True), importance=importance)
            each = replace(each, encoding=encoding)
        made.append(each)
    if matrix is not None and not found and missing.tensors:
        raise BadSpec(
            f"{setting('imatrix')}: {matrix.file.entry.name} has none of this model's tensors: it has"
            f" {_named(matrix.sums)}, and {_named(missing.tensors)} are to be quantized; give the"
            " importance matrix of this model"
        )
    if needing:
        raise BadSpec(_needed(needing, matrix))
    return Weighing(tuple(made), () if matrix is None else tuple(_notes(matrix, found, missing)))


def _needs(name: str, kind: str, file_type: str | None) -> bool:
    return name not in ENDS and (kind in NEEDING or (kind == "Q2_K" and file_type == "Q2_K_S"))


def _needed(needing: dict[str, str], matrix: ImportanceMatrix | None) -> str:
    who = f"{_named(needing)} would be {', '.join(sorted({*needing.values()}))}"
    if matrix is None:
        return (
            f"{setting('imatrix')}: {who}, which llama.cpp makes by an importance matrix alone; give the file that"
            " llama-imatrix wrote, or another quantization"
        )
    return (
        f"{setting('imatrix')}: {who}, which llama.cpp makes by importances alone, and {matrix.file.entry.name} has"
        " none for them; give a whole one, or another quantization"
    )


def _importance(matrix: ImportanceMatrix, tensor: StoredTensor, missing: _Missing) -> TensorImportance | None:
    """Return the importances of a tensor, or of a part of one, such as an expert."""
    name, whole, part = tensor.name, tensor.whole or tensor.spec, tensor.spec
    if name not in matrix.sums:
        missing.tensors[name] = None
        return None
    columns, matrices = whole.shape[-1], whole.shape[-3] if len(whole.shape) > 2 else 1
    if name in EMBEDDINGS and matrix.sums[name].numbers != columns * matrices:
        missing.sizes[name] = None
        return None
    if unseen := len(matrix.unseen(name)):
        missing.experts[name] = unseen
    if tensor.whole is None:
        return matrix.of(name, columns, matrices)
    first = tensor.offset * matrices // whole.size
    return matrix.of(name, columns, matrices, first, part.shape[-3] if len(part.shape) > 2 else 1)


def _notes(matrix: ImportanceMatrix, found: set[str], missing: _Missing) -> list[str]:
    name, notes = matrix.file.entry.name, []
    if missing.tensors:
        notes.append(
            f"{name} has nothing for {_named(missing.tensors)}: quantized without importances, as llama-quantize does"
        )
    if missing.sizes:
        notes.append(f"{name}: {_named(missing.sizes)} has another size there: quantized without importances")
    if missing.experts:
        said = [f"{each} ({unseen} of {len(matrix.sums[each].counts)})" for each, unseen in missing.experts.items()]
        notes.append(
            f"{name}: no token went through {counted(sum(missing.experts.values()), 'expert')} of {_named(said)}: their"
            " channels count alike, as for llama-quantize"
        )
    others = matrix.sums.keys() - found - missing.sizes.keys()
    if others:
        notes.append(f"{name} has importances for {_named(others)}, which are not quantized here")
    return notes


def _named(names: Iterable[str]) -> str:
    """Return some names, and how many more there are."""
    names = sorted(names, key=natural_key)
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more} more" if more > 0 else "")
