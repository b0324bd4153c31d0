"""The layout of packed checkpoints: MLX's names and codes in model_weights.bin, experts by layer in packed_experts/.

The engine, moeflux, reads words of 32 bits whose affine groups of 64 are compiled in, their scales and biases in
bfloat16, and other weights in bfloat16 or float32. Names lose a `language_model.` in front, and towers for images are
left out. Plain copies keep their dtypes. Config and tokenizer lie beside the manifest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loaders.architectures.family import text_config
from loaders.architectures.mlx import MlxModel, model_of, packed_expert
from loaders.architectures.mlx_config import fault, translate_config
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.derived_config import PACKED_GROUP
from loaders.containers import packed
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec, setting
from loaders.layouts.base import Assembly, Joined, Naming, Placed
from loaders.layouts.hf import QUANTIZATION_KEYS, plain_config
from loaders.layouts.mlx import SUFFIXES, quantization
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, Slot, StoredSpec, StoredTensor
from loaders.tensors.quantized_sources.mlx import stored_scheme
from loaders.words import counted

READ = ("U32", "BF16", "F32")  # the dtypes that the engine reads
TOWER = re.compile(r"(?:^|\.)(?:vision_tower|vision_model|visual|multi_modal_projector)\.")
PREFIX = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
WIDE = "linear_attn.A_log"  # the one weight that the engine reads as float32
NARROWED = ("F16", "F64")  # dtypes that the engine does not read; such weights become bfloat16 beside quantized ones


class PackedLayout:
    """The layout of packed checkpoints; see `Layout` and `Assembling`."""

    name: ClassVar[str] = "packed"
    containers: ClassVar[tuple[str, ...]] = ("packed",)
    file: ClassVar[str | None] = None

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        for decision in decisions:
            _check_scheme(decision)
        bits = _bits(checkpoint, decisions)
        placed = [_placed(d, is_quantized=bool(bits)) for d in decisions if d.scheme is not None and not _is_tower(d)]
        experts = _PlacedExperts.of(checkpoint, placed, bits)
        return tuple(placed) if experts is None else tuple(experts.placed(each) for each in placed)

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        return None

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        said = []
        towers = [d.tensor.name for d in decisions if d.scheme is not None and _is_tower(d)]
        if towers:
            said.append(
                f"packed holds no towers for images: {counted(len(towers), 'tensor is', 'tensors are')} left out,"
                f" {towers[0]} first"
            )
        is_plain = not any(_is_words(d) for d in decisions)
        if is_plain:
            said.append(
                "nothing is quantized: a packed checkpoint of plain weights is for storage and conversion; its engine"
                f" computes with MLX's words ({setting('quantize')}=mlx_int4)"
            )
        odd = sorted({d.tensor.dtype.name for d in decisions if is_plain and d.scheme == Plain()} - set(READ))
        if odd:
            said.append(f"its engine reads {', '.join(READ)}, not {', '.join(odd)}, which stay here as they are")
        others = sorted({d.scheme.bits for d in decisions if isinstance(d.scheme, MlxAffine)} - {4, 8})
        if others:
            said.append(
                f"{', '.join(map(str, others))} bits: the manifest says so, but its engine is known to read 4 and 8"
            )
        return tuple(said)

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        model = model_of(checkpoint.config)
        if not checkpoint.config:
            return None
        if model is not None and fault(model, checkpoint.config) is None:
            is_tied = not any(d.tensor.role == "head" and d.action != "drop" for d in decisions)
            made = translate_config(model, checkpoint.config, is_tied=is_tied)
        else:
            made = dict(checkpoint.config)
        if any(d.tensor.decode is None and _is_words(d) for d in decisions if d.action != "quantize"):
            return made  # quantized words are copied, and so the source's block that describes them stays
        made = {key: value for key, value in plain_config(made).items() if key not in QUANTIZATION_KEYS}
        quantized = [d for d in decisions if d.action == "quantize"]
        if quantized:
            made["quantization"] = made["quantization_config"] = quantization(quantized, model or MlxModel())
        casts = {d.scheme.dtype for d in decisions if d.action == "cast" and isinstance(d.scheme, Plain)}
        if not quantized and len(casts) == 1 and (dtype := next(iter(casts))) is not None:
            made["torch_dtype" if "torch_dtype" in made and "dtype" not in made else "dtype"] = DTYPES[dtype].torch
        return made

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        return None

    def aux(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return checkpoint.aux

    def assemble(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], files: Sequence[OutputFile], naming: Naming
    ) -> Assembly:
        if naming.split:
            raise BadSpec(f"{setting('split')}: only gguf can be one file or several; a packed checkpoint has one .bin")
        bits = _bits(checkpoint, decisions)
        made_files, slots, at = list[OutputFile](), list[Slot](), 0
        for file in files:
            if file.name.startswith(packed.EXPERTS):
                made_files.append(file)
                continue
            made_files.append(replace(file, within=(packed.WEIGHTS, at)))
            slots += [replace(slot, offset=at + slot.offset) for slot in file.slots]
            at += file.size
        config = self.config(checkpoint, decisions, None) or {}
        made = {packed.MANIFEST: packed.json_bytes(packed.manifest(naming.model, config, slots, bits))}
        experts = _PlacedExperts.of(checkpoint, self.place(checkpoint, decisions), bits)
        if experts is not None:
            num_layers = text_config(config, "num_hidden_layers")
            layers = max(num_layers if isinstance(num_layers, int) else 0, experts.layout.layers[-1] + 1)
            made[packed.EXPERT_LAYOUT] = packed.json_bytes(experts.layout.document(layers))
        if not slots:
            made[packed.WEIGHTS] = b""
        return Assembly(tuple(made_files), made, Joined(packed.WEIGHTS, b"") if slots else None)


def _check_scheme(decision: Decision) -> None:
    """Raise BadSpec if the engine does not compute with this scheme."""
    scheme, name = decision.scheme, decision.tensor.name
    if scheme is None or isinstance(scheme, Plain):
        return
    if not isinstance(scheme, MlxAffine):
        raise BadSpec(
            f"{setting('layout')}: packed holds MLX's affine codes or plain weights, not {scheme.kind} ({name}); use"
            f" {setting('quantize')}=mlx_int4, mlx_int8 or none, or another output"
        )
    if scheme.group_size != PACKED_GROUP:
        raise BadSpec(
            f"{setting('layout')}: packed's engine has groups of {PACKED_GROUP} compiled in, {name} would have groups"
            " of"
            f" {scheme.group_size}; use {setting('group_size')}={PACKED_GROUP}"
        )


def _is_tower(decision: Decision) -> bool:
    return TOWER.search(decision.tensor.name) is not None


def _is_words(decision: Decision) -> bool:
    """Whether the tensor is stored as quantized words, made by this job or copied."""
    tensor = decision.tensor
    is_copy = tensor.decode is None and tensor.dtype.name == "U32" and tensor.name.endswith(".weight")
    return isinstance(decision.scheme, MlxAffine) or (decision.scheme == Plain() and is_copy)


def _bits(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> dict[str, int]:
    """Return the bits of every tensor that is stored as words, by its name in the output.

    Raises:
        BadSpec: copied words are not those of affine groups of 64.
    """
    found, by_name = {}, {d.tensor.name: d.tensor for d in decisions if d.scheme is not None}
    for decision in decisions:
        name = decision.tensor.name
        if isinstance(decision.scheme, MlxAffine):
            found[_own_name(name)] = decision.scheme.bits
        elif _is_words(decision):
            scales = by_name.get(name.removesuffix("weight") + "scales")
            scheme = None if scales is None else stored_scheme(checkpoint, decision.tensor, scales)
            if not isinstance(scheme, MlxAffine) or scheme.group_size != PACKED_GROUP:
                raise BadSpec(
                    f"{setting('layout')}: {name} is U32 but not of MLX's affine groups of {PACKED_GROUP}, which"
                    " packed's"
                    f" engine has compiled in; give a quant of its own, or {setting('dtype')}=bfloat16"
                )
            found[_own_name(name)] = scheme.bits
    return found


def _own_name(name: str) -> str:
    """Return a tensor's name in the output, without the prefix of a language model."""
    found = PREFIX.sub("", name)
    return name if found == name else found if found.startswith("lm_head") else f"model.{found}"


def _placed(decision: Decision, *, is_quantized: bool) -> Placed:
    """Place a tensor under its name in the one file; experts are moved out of it later.

    Beside quantized words, plain weights become bfloat16, or float32 where the engine reads that.
    """
    tensor, encoding = decision.tensor, decision.encoding
    assert encoding is not None
    scheme = encoding.scheme
    if encoding.action == "quantize" and tensor.dtype.name != "BF16":
        encoding = replace(encoding, cast=DTYPES["BF16"])
    if is_quantized and isinstance(scheme, Plain):
        dtype = scheme.dtype or tensor.dtype.name
        wanted = "F32" if tensor.name.endswith(WIDE) else "BF16"
        if dtype in NARROWED or (dtype == "BF16" and wanted == "F32"):
            encoding = replace(encoding, scheme=Plain(wanted), action="cast")
    name = _own_name(tensor.name)
    stored = {role: StoredTensor(_part(name, role), part) for role, part in encoding.stored.items()}
    return Placed(encoding, stored)


def _part(name: str, role: str) -> str:
    return name if role == "weight" else name.removesuffix("weight") + SUFFIXES[role]


@dataclass(frozen=True)
class _PlacedExperts:
    """The experts that go into packed_experts/, and their places there."""

    layout: packed.ExpertLayout
    config: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, placed: Sequence[Placed], bits: Mapping[str, int]) -> _PlacedExperts | None:
        """Return the experts' layout, or None where experts stay in the one file.

        They stay if there are none, or if a layer's are in several blocks, of which different units may write the
        parts.

        Raises:
            BadSpec: the experts are not all alike.
        """
        found: dict[tuple[int, int], dict[str, tuple[StoredSpec, int | None]]] = {}
        blocks: dict[int, set[str]] = {}
        for each in placed:
            for tensor in each.stored.values():
                expert = packed_expert(checkpoint.config, tensor.name)
                if expert is not None:
                    layer, index, component = expert
                    found.setdefault((layer, index), {})[component] = (tensor.spec, bits.get(tensor.name))
                    blocks.setdefault(layer, set()).add(each.tensor.block)
        if not found or any(len(names) > 1 for names in blocks.values()):
            return None
        return cls(_expert_layout(found), checkpoint.config)

    def placed(self, each: Placed) -> Placed:
        """Return the tensor with its places in packed_experts/, if it is an expert's."""
        return replace(each, stored={role: self._moved(tensor) for role, tensor in each.stored.items()})

    def _moved(self, tensor: StoredTensor) -> StoredTensor:
        expert = packed_expert(self.config, tensor.name)
        if expert is None:
            return tensor
        layer, index, component = expert
        offset = next(slot.offset for slot, _ in self.layout.components if slot.name == component)
        return replace(tensor, place=(packed.expert_file(layer), index * self.layout.size + offset))


def _expert_layout(
    found: Mapping[tuple[int, int], Mapping[str, tuple[StoredSpec, int | None]]],
) -> packed.ExpertLayout:
    """Return where each component lies in an expert, in the engine's order, without padding.

    Raises:
        BadSpec: some layers or experts lack what others have, or store it in another way.
    """
    layers = sorted({layer for layer, _ in found})
    kinds = Counter(tuple(sorted(components.items(), key=lambda each: each[0])) for components in found.values())
    counts = {layer: sorted(index for other, index in found if other == layer) for layer in layers}
    wanted = counts[layers[0]]
    odd = next((layer for layer in layers if counts[layer] != list(range(len(wanted)))), None)
    if odd is not None:
        raise BadSpec(
            f"{setting('layout')}: packed_experts/ wants the same experts, from 0, in every layer; layer {odd} would"
            " have"
            f" {len(counts[odd])}, layer {layers[0]} {len(wanted)}; keep or drop all"
        )
    usual, _ = kinds.most_common(1)[0]
    components = dict(usual)
    other = next(((key, each) for key, each in found.items() if dict(each) != components), None)
    names = {name.partition(".")[0] for name in components}
    if other is not None or names != set(packed.PARTS):
        (layer, index), has = other or (next(iter(found)), components)
        raise BadSpec(
            f"{setting('layout')}: packed_experts/ wants {', '.join(packed.PARTS)} of one shape, dtype and scheme in"
            " all"
            f" experts of all layers; expert {index} of layer {layer} has"
            f" {', '.join(f'{n} {s.dtype} {list(s.shape)}' for n, (s, _) in sorted(has.items()))}; let the rules treat"
            " all experts alike"
        )
    order = [f"{part}.{suffix}" for part in packed.PARTS for suffix in SUFFIXES.values()]
    slots, at = [], 0
    for name in (name for name in order if name in components):
        spec, count = components[name]
        slots.append((Slot(name=name, dtype=spec.dtype, shape=spec.shape, offset=at), count))
        at += spec.size
    return packed.ExpertLayout(at, len(wanted), tuple(slots), tuple(layers))
