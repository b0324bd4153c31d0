"""MLX's weights, affine or small floats, under published names, with stacked experts cut into single ones.

config.json's `quantization` has the settings of all modules, and those of single modules by path. Plain weights are
found too if mlx-lm has changed them, so that an unquantized MLX checkpoint is read like any other: stacked experts,
norms and convolutions. Where mlx-lm cut a tensor, its pieces stay under their own names, which only MLX takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from loaders.architectures.family import load_dtype
from loaders.architectures.family_files import known_types
from loaders.architectures.mlx import (
    MlxModel,
    expert_names,
    is_piece,
    is_stack,
    mlx_name,
    model_of,
    published_name,
    stack_of,
)
from loaders.architectures.mlx_config import settings_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.quantization.schemes.mlx_affine import BIASES, BITS, GROUP_SIZES, SCALES, MlxAffine
from loaders.quantization.schemes.mlx_float import SETTINGS, MlxFloat
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.formed import FormedTensor, undone
from loaders.tensors.logical_tensor import LogicalTensor, plain_tensor
from loaders.tensors.quantized_sources.base import part
from loaders.words import model_type_said

Scheme = MlxAffine | MlxFloat


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights and the stacked ones, by transformers' names.

    Raises:
        BadCheckpoint: a weight is not whole, its settings are unknown, or a stack's experts have no known names.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    modules = [name.removesuffix(".scales") for name in by_name if name.endswith(".scales")]
    found = [tensor for module in modules for tensor in _quantized(checkpoint, by_name, module)]
    model = model_of(checkpoint.config)
    if model is None:
        return {tensor.name: tensor for tensor in found}
    parts = {spec.name for tensor in found for _, spec in tensor.stored}
    for spec in (spec for spec in checkpoint.weights if spec.name not in parts):
        if is_stack(model, spec.name):
            cut = _cut(checkpoint, spec.name, [("weight", spec)])
            found += [plain_tensor(name, slice_) for name, [(_, slice_)] in cut]
        else:
            found.append(plain_tensor(spec.name, spec))
    return {made.name: made for tensor in found for made in [_published(checkpoint, model, tensor)]}


def _published(checkpoint: Checkpoint, model: MlxModel, tensor: LogicalTensor) -> LogicalTensor:
    """Return a tensor under its published name, with the elements and values that it was published with."""
    if is_piece(model, tensor.name):
        role = "linear" if len(tensor.shape) == 3 else ""
        return replace(tensor, name=published_name(model, tensor.name), role=role)
    made = replace(tensor, name=published_name(model, tensor.name))
    formed = undone(model.forms, checkpoint.config, made)
    return replace(formed, origin=formed.name) if isinstance(formed, FormedTensor) else formed


def check_whole(checkpoint: Checkpoint, tensors: Iterable[LogicalTensor]) -> None:
    """Check that no tensor is a piece of a published one: none but MLX has a use for it.

    Raises:
        BadSpec: one is.
    """
    model = model_of(checkpoint.config)
    if checkpoint.quantized_by != "mlx" or model is None:
        return
    pieces = [tensor.name for tensor in tensors if is_piece(model, tensor.name)]
    if pieces:
        raise BadSpec(
            f"{setting('checkpoint')}: mlx-lm has cut tensors of this {checkpoint.config.get('model_type')} into pieces"
            f" ({len(pieces)}, {pieces[0]} first), which are not joined here, so that only MLX's presets read it; take"
            " the model as its makers published it"
        )


def check_towers(checkpoint: Checkpoint, tensors: Iterable[LogicalTensor]) -> None:
    """Check that the tower that config.json describes is there as published, which transformers' class has.

    mlx-lm leaves towers out; other tools keep them, under names and with axes of their own.

    Raises:
        BadSpec: it is not.
    """
    model = model_of(checkpoint.config)
    if checkpoint.quantized_by != "mlx" or model is None or "vision_config" not in checkpoint.config:
        return
    # Where names of the language model are mlx-lm's own, those of a tower are, too.
    if model.names or not any("vision" in tensor.name for tensor in tensors):
        raise BadSpec(
            f"{setting('checkpoint')}: this MLX checkpoint of a {checkpoint.config.get('model_type')} has no tower for"
            " images, or not under the published names, and transformers' class would fill it with random numbers;"
            " take the model as its makers published it, or write it for MLX or llama.cpp"
        )


def check_own_settings(checkpoint: Checkpoint) -> None:
    """Check that the settings of single modules name modules, and that these are stored as they say.

    Raises:
        BadCheckpoint: they are not.
    """
    names = {spec.name for spec in checkpoint.weights}
    for module, own in (settings_of(checkpoint.config) or {}).items():
        if not isinstance(own, Mapping) and own is not False:
            continue
        if isinstance(own, Mapping) and not {"bits", "group_size"} & own.keys():
            continue  # not a module's settings
        is_quantized = f"{module}.scales" in names
        if own is False and not is_quantized:
            continue
        if not is_quantized or own is False:
            is_there = is_quantized or f"{module}.weight" in names
            found = "it is stored quantized" if is_quantized else "it is stored plain" if is_there else "there is none"
            said = "is not quantized" if own is False else "is quantized by settings of its own"
            raise BadCheckpoint(
                f"config.json's quantization says that {module} {said}, but {found}; correct that entry, or fetch the"
                " checkpoint again"
            )


def _quantized(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], module: str) -> Iterator[LogicalTensor]:
    """Yield the tensor of a quantized module, or those of the experts that are stacked in it."""
    name = module + ".weight"
    packed, scales = part(by_name, name, name), by_name[module + ".scales"]
    scheme = _scheme(checkpoint.config, module, packed, scales)
    stored = [("weight", packed), (SCALES, scales)]
    if isinstance(scheme, MlxAffine):
        stored.append((BIASES, part(by_name, name, module + ".biases")))
    plain = load_dtype(checkpoint.config) or DTYPES["BF16"]
    dtype = scales.dtype if isinstance(scheme, MlxAffine) else plain
    for own_name, roles in _cut(checkpoint, name, stored):
        *rows, words = roles[0][1].shape
        spec = TensorSpec(own_name, dtype, (*rows, words * 32 // scheme.bits))
        wanted = scheme.stored(spec)
        for role, found in roles:
            if (found.dtype, found.shape) != (wanted[role].dtype, wanted[role].shape):
                raise BadCheckpoint(
                    f"{found.name}: expected {wanted[role].dtype} {list(wanted[role].shape)} for {scheme.bits} bits in"
                    f" groups of {scheme.group_size}, found {found.dtype} {list(found.shape)}; config.json's"
                    f" quantization must say how {module} is quantized"
                )
        yield LogicalTensor(
            name=own_name, dtype=spec.dtype, shape=spec.shape, stored=tuple(roles), window=None, decode=scheme
        )


def _scheme(config: Mapping[str, Any], module: str, packed: WeightSpec, scales: WeightSpec) -> Scheme:
    """Return a module's scheme: by its own settings, by the block's if the shapes agree, or by the shapes.

    The shapes decide where exactly one scheme fits them, as mlx-lm's loader does for modules without settings.
    """
    block = settings_of(config) or {}
    own = block.get(module)
    if isinstance(own, Mapping):
        return _named(module, own.get("mode", "affine"), own.get("bits"), own.get("group_size"))
    base = _named(module, block.get("mode", "affine"), block.get("bits"), block.get("group_size"))
    if _fits(base, packed, scales):
        return base
    known: list[Scheme] = [MlxAffine(bits, group) for bits in BITS for group in GROUP_SIZES]
    known += [MlxFloat(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
    fitting = [scheme for scheme in known if _fits(scheme, packed, scales)]
    return fitting[0] if len(fitting) == 1 else base


def stored_scheme(checkpoint: Checkpoint, weight: LogicalTensor, scales: LogicalTensor) -> Scheme:
    """Return the scheme of a weight that is copied as it is stored; an expert's settings are under its stack's name.

    Raises:
        BadCheckpoint: the settings are unknown.
    """
    model, block = model_of(checkpoint.config), settings_of(checkpoint.config) or {}
    stack = None if model is None else stack_of(model, mlx_name(model, weight.name))
    names = [name.removesuffix(".weight") for name in (weight.name, *(stack[:1] if stack else ()))]
    module = next((name for name in names if name in block), names[0])
    return _scheme(checkpoint.config, module, weight.stored[0][1], scales.stored[0][1])


def cut_stored(checkpoint: Checkpoint, spec: WeightSpec) -> list[tuple[str, WeightSpec]]:
    """Cut a stored part of a stack into those of its experts, by transformers' names; any other tensor stays whole."""
    model, (base, _, suffix) = model_of(checkpoint.config), spec.name.rpartition(".")
    count = spec.shape[0] if len(spec.shape) == 3 else 0
    if model is None or not count:
        return [(spec.name, spec)]
    names = expert_names(model, f"{base}.weight", count) or ()
    cut = [(name.removesuffix("weight") + suffix, _slice(spec, index)) for index, name in enumerate(names)]
    return cut or [(spec.name, spec)]


def _fits(scheme: Scheme, packed: WeightSpec, scales: WeightSpec) -> bool:
    columns = packed.shape[-1] * 32 // scheme.bits if packed.shape else 0
    is_affine = scales.dtype.name != "U8"
    same_kind = is_affine == isinstance(scheme, MlxAffine)
    return same_kind and bool(scales.shape) and scales.shape[-1] * scheme.group_size == columns


def _named(module: str, mode: Any, bits: Any, group: Any) -> Scheme:
    if mode == "affine" and bits in BITS and group in GROUP_SIZES:
        return MlxAffine(bits, group)
    if mode in SETTINGS and SETTINGS[mode] == (bits, group):
        return MlxFloat(mode)
    raise BadCheckpoint(
        f"{module}: quantization says mode {mode!r}, bits {bits!r}, group_size {group!r}; known are affine with"
        f" {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}, and {', '.join(SETTINGS)}"
    )


def _cut(
    checkpoint: Checkpoint, name: str, stored: list[tuple[str, WeightSpec]]
) -> Iterator[tuple[str, list[tuple[str, WeightSpec]]]]:
    """Yield a weight's parts under its name; those of a stack expert by expert.

    Raises:
        BadCheckpoint: the stack's experts have no names that are known here.
    """
    if not name.endswith(".bias") and all(len(spec.shape) == 2 for _, spec in stored):
        yield name, stored
        return
    count, model = (stored[0][1].shape or (0,))[0], model_of(checkpoint.config)
    names = expert_names(model, name, count) if model is not None else None
    if names is None and model is not None and is_piece(model, name):
        yield name, stored
        return
    dimensions = 2 if name.endswith(".bias") else 3
    is_even = all(len(spec.shape) == dimensions and spec.shape[0] == count for _, spec in stored)
    if names is None or not is_even:
        raise BadCheckpoint(
            f"{name}: {[list(spec.shape) for _, spec in stored]} is no stack of experts of a model_type known here"
            f" ({model_type_said(checkpoint.config)}; known: {', '.join(known_types('mlx'))})"
        )
    for index, own in enumerate(names):
        yield own, [(role, _slice(spec, index)) for role, spec in stored]


def _slice(spec: WeightSpec, index: int) -> WeightSpec:
    """Return entry `index` of a stored tensor's first dimension, as a span of its bytes under the same name."""
    size = spec.size // spec.shape[0]
    return replace(spec, shape=spec.shape[1:], offset=spec.offset + index * size, size=size)
