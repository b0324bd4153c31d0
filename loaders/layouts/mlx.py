"""The layout of mlx-lm: MODULE.weight, .scales, .biases, experts stacked, a `quantization` block in config.json.

It is what mlx_lm 0.32 writes (utils.py: quantize_model, save_model, save_config). mlx-lm's loader reads every
model*.safetensors of the folder, and takes a module as quantized if it has scales. The settings of a module are those
under its path in the block, or else what the shapes tell (in older versions, the block's own).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from loaders.architectures.family import load_dtype, text_config
from loaders.architectures.family_files import others_known
from loaders.architectures.layers import LAYERS, MOST
from loaders.architectures.mlx import MlxModel, convert_dtype, mlx_name, model_of, stack_of
from loaders.architectures.mlx_config import fault, head_fault, num_experts, translate_config
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec, setting
from loaders.layouts.base import Placed
from loaders.layouts.hf import plain_config
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.mlx_affine import BIASES, SCALES, MlxAffine
from loaders.quantization.schemes.mlx_float import MlxFloat
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule, dropping
from loaders.specs import OutputFile, StoredSpec, StoredTensor
from loaders.tensors.formed import Forms
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import model_type_said

SUFFIXES = {"weight": "weight", SCALES: "scales", BIASES: "biases"}


class MlxLayout:
    """The layout of mlx-lm; see `Layout`."""

    name: ClassVar[str] = "mlx"
    containers: ClassVar[tuple[str, ...]] = ("safetensors",)
    file: ClassVar[str | None] = None

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        return {"format": "mlx"}

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        return ()

    def formed(self, checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> Sequence[LogicalTensor]:
        forms = Forms(_known_model(checkpoint).forms, checkpoint.config)
        return [piece for tensor in tensors for piece in forms.of(tensor)]

    def left_out(self, checkpoint: Checkpoint) -> tuple[Rule, ...]:
        model = _known_model(checkpoint)
        return dropping((*model.drop, *_shared(checkpoint, model)))

    def no_next_tokens(self, checkpoint: Checkpoint) -> str | None:
        return "mlx-lm has no layers for multi-token prediction"

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        model = _known_model(checkpoint)
        has_head = any(d.tensor.role == "head" and d.action != "drop" for d in decisions)
        problem = head_fault(model, str(checkpoint.config["model_type"]), has_head=has_head)
        if problem:
            raise BadSpec(f"{setting('checkpoint')}: {problem}")
        cast_to, placed = convert_dtype(checkpoint.config), []
        if checkpoint.container == "gguf":  # whose blocks have no dtype: the model's is what mlx-lm would have read
            cast_to = load_dtype(checkpoint.config)
        for decision in decisions:
            tensor, encoding = decision.tensor, decision.encoding
            if encoding is None:
                continue
            _check_scheme(tensor.name, encoding.scheme)
            if encoding.action == "quantize" and cast_to != tensor.dtype:
                encoding = replace(encoding, cast=cast_to)
            own = mlx_name(model, tensor.name)
            stack = stack_of(model, own)
            name, index = stack or (own, 0)
            count = (num_experts(model, checkpoint.config) or 0) if stack else None
            stored = {role: stored_part(name, role, part, index, count) for role, part in encoding.stored.items()}
            placed.append(Placed(encoding, stored))
        _check_stacks(placed, model, checkpoint)
        return tuple(placed)

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        model = _known_model(checkpoint)
        is_tied = not any(d.tensor.role == "head" and d.action != "drop" for d in decisions)
        made = translate_config(model, plain_config(checkpoint.config), is_tied=is_tied)
        quantized = [d for d in decisions if d.action == "quantize"]
        if quantized:
            made["quantization"] = made["quantization_config"] = quantization(quantized, model)
        else:
            _name_dtype(made, decisions)
        return dict(sorted(made.items()))

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        weight_map = {slot.name: file.name for file in files for slot in file.slots}
        about = {"total_size": total_bytes, "total_parameters": parameters}
        return {"metadata": about, "weight_map": dict(sorted(weight_map.items()))}


def _known_model(checkpoint: Checkpoint) -> MlxModel:
    model = model_of(checkpoint.config)
    if model is None:
        found = model_type_said(checkpoint.config)
        raise BadSpec(
            f"{setting('checkpoint')}: {found} is not one whose MLX names are known here;"
            f" {others_known('mlx', checkpoint.config)}"
        )
    problem = fault(model, checkpoint.config)
    if problem:
        raise BadSpec(f"{setting('checkpoint')}: {problem}")
    return model


def _shared(checkpoint: Checkpoint, model: MlxModel) -> list[tuple[str, str]]:
    """Return a row for the keys and values of the last layers, where mlx-lm takes those of earlier layers."""
    count, shared = (text_config(checkpoint.config, key) for key in ("num_hidden_layers", model.shared_keys))
    if not model.shared_keys or type(count) is not int or type(shared) is not int or not 0 < shared <= count <= MOST:
        return []
    layers = "|".join(map(str, range(count - shared, count)))
    name = rf"{LAYERS}(?:{layers})\.self_attn\.(?:[kv]_proj|k_norm)\."
    return [(name, "mlx-lm takes keys and values of an earlier layer there")]


def _check_scheme(name: str, scheme: Scheme) -> None:
    if scheme.engine not in ("mlx", "plain"):
        raise BadSpec(
            f"{setting('layout')}: mlx holds MLX's schemes, not {scheme.engine}'s ({name}); use"
            f" {setting('quantize')}=mlx_int4 or"
            f" another mlx_*, or {setting('layout')}=auto"
        )


# --- names


def stored_part(weight: str, role: str, part: StoredSpec, index: int = 0, count: int | None = None) -> StoredTensor:
    """Return a part of a weight under mlx-lm's name; with `count`, it is expert `index` in a stack of so many."""
    name = weight.removesuffix("weight") + SUFFIXES[role] if role != "weight" else weight
    if count is None:
        return StoredTensor(name, part)
    return StoredTensor(name, part, whole=StoredSpec(part.dtype, (count, *part.shape)), offset=index * part.size)


def _check_stacks(placed: Sequence[Placed], model: MlxModel, checkpoint: Checkpoint) -> None:
    """Raise BadSpec if a stack lacks experts, or its experts are stored in different ways."""
    count = num_experts(model, checkpoint.config)
    stacks: dict[str, list[tuple[int, Placed]]] = {}
    for each in placed:
        stack = stack_of(model, mlx_name(model, each.tensor.name))
        if stack is not None:
            stacks.setdefault(stack[0], []).append((stack[1], each))
    for name, found in stacks.items():
        # The count is the config's, and may be any number: it is compared before a list of so many is made.
        if len(found) != (count or 0) or sorted(index for index, _ in found) != list(range(len(found))):
            if count is None:
                key = model.experts.count if model.experts else ""
                raise BadSpec(
                    f"{setting('checkpoint')}: config.json: expected {key}, the number of experts, found none"
                )
            raise BadSpec(
                f"{name}: mlx-lm stacks {count} experts, of which {len(found)} are to be written; keep or drop all"
            )
        shapes = {tuple((role, t.spec) for role, t in sorted(each.stored.items())) for _, each in found}
        if len({each.encoding.scheme for _, each in found}) > 1 or len(shapes) > 1:
            raise BadSpec(
                f"{name}: mlx-lm stacks a layer's {count} experts into one tensor, but the rules give them different"
                " schemes, or their shapes or dtypes differ; let the rules treat all experts of a matrix alike"
            )


def _module(decision: Decision, model: MlxModel) -> str:
    own = mlx_name(model, decision.tensor.name)
    stack = stack_of(model, own)
    return (stack[0] if stack else own).removesuffix(".weight")


# --- config.json


def quantization(quantized: Sequence[Decision], model: MlxModel) -> dict[str, Any]:
    """Return the block: the settings of the target's scheme or the most frequent, and of modules that have others."""
    own = [d.scheme for d in quantized if d.rule.scheme is None]
    base = own[0] if own else Counter(d.scheme for d in quantized).most_common(1)[0][0]
    block: dict[str, Any] = _settings(base, with_mode=True)
    for decision in quantized:
        if decision.scheme != base:
            block[_module(decision, model)] = _settings(decision.scheme, with_mode=False)
    return block


def _settings(scheme: Scheme | None, *, with_mode: bool) -> dict[str, Any]:
    """Return a scheme's settings as mlx-lm writes them. Those of a module have no mode if they are affine."""
    assert isinstance(scheme, MlxAffine | MlxFloat), scheme
    settings: dict[str, Any] = {"group_size": scheme.group_size, "bits": scheme.bits}
    return settings | ({"mode": scheme.mode} if with_mode or scheme.mode != "affine" else {})


def _name_dtype(made: dict[str, Any], decisions: Sequence[Decision]) -> None:
    """State in config.json the dtype to which all weights were cast, if they were."""
    casts = {d.scheme.dtype for d in decisions if d.action == "cast" and isinstance(d.scheme, Plain)}
    if len(casts) == 1 and (dtype := next(iter(casts))) is not None:
        made["torch_dtype" if "torch_dtype" in made and "dtype" not in made else "dtype"] = DTYPES[dtype].torch
