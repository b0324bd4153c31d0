"""Whether what a checkpoint says of its quantization fits what is stored: nothing is passed over in silence.

A description over plain weights, a packed weight or a scale that nothing decodes, and lists that were made for another
model are errors. What engines read differently, while the tensors leave no doubt, is a note for the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.name_patterns import Named
from loaders.checkpoints.quantized_by import Declaration, looks_packed
from loaders.dtypes import WEIGHT_DTYPES
from loaders.errors import BadCheckpoint, setting
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import counted

# The lists of modules that stay plain, by the tools' keys.
EXCLUDED = (
    "modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "exclude_modules", "skip_modules",
)  # fmt: skip
DECIDED_BY_TENSORS = ("mlx", "hqq", "gguf")  # whose engines look at each module's tensors, not at a list
GENERIC_LISTS = ("bitsandbytes",)  # whose tools write the same list for every model, whatever modules it has
HEADS = re.compile(
    r"(?:^|[.*?)])(?:\w*lm_head|(?:lm_head\.)?decoder|head|score|embed_out|output(?:_layer|_projection)?|proj_out|vocab_projector"
    r"|pred_layer\.proj)[.*$]*$"
)
# Endings of scales and other companions of packed weights.
SCALES = (
    ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".g_idx", ".quant_map", ".scale_weight",
)  # fmt: skip


STALE_CURE = "if plain is right, remove it from there; if not, fetch the checkpoint again"


def stale(checkpoint: Checkpoint) -> str | None:
    """Say that a description of a quantization contradicts the tensors, all of which are plain; None if it does not."""
    said, names = checkpoint.declaration, {spec.name for spec in checkpoint.weights}
    if said is None or not said.settings or any(looks_packed(spec, names) for spec in checkpoint.weights):
        return None
    first = next((spec for spec in checkpoint.weights if len(spec.shape) == 2), checkpoint.weights[0])
    return (
        f"{checkpoint.address}/{said.place} says that the weights are quantized ({said.method}), but all are stored"
        f" plain, such as {first.name} {first.dtype} {list(first.shape)}"
    )


def check_not_stale(checkpoint: Checkpoint) -> None:
    """Check that something is packed where a method says that weights are.

    Raises:
        BadCheckpoint: every tensor is plain.
    """
    found = stale(checkpoint)
    if found is not None:
        raise BadCheckpoint(f"{found}; {STALE_CURE}")


def consistency_notes(
    checkpoint: Checkpoint, said: Declaration, quantized: Mapping[str, LogicalTensor]
) -> tuple[str, ...]:
    """Check that a description fits what is stored, and return notes about what fits only in part.

    Raises:
        BadCheckpoint: a packed weight or a scale is left over, an excluded module is quantized, or the list of excluded
            modules names none of this checkpoint's.
    """
    parts = {spec.name for tensor in quantized.values() for _, spec in tensor.stored}
    left = [spec for spec in checkpoint.weights if spec.name not in parts]
    _check_left_over(said, left, {spec.name for spec in checkpoint.weights})
    if said.method in DECIDED_BY_TENSORS:
        return ()
    excluded = Named(_excluded(said), said.place)
    modules = [name.removesuffix(".weight") for name in quantized]
    plain = [spec.name.removesuffix(".weight") for spec in left]
    notes = [
        *_excluded_but_quantized(checkpoint, said, excluded, modules),
        *_unused(said, excluded, [*modules, *plain]),
        *_plain_among_quantized(said, excluded, modules, left),
    ]
    return tuple(notes)


def _check_left_over(said: Declaration, left: list[WeightSpec], names: set[str]) -> None:
    found = [spec for spec in left if looks_packed(spec, names) or _is_scale(spec, names)]
    if found:
        raise BadCheckpoint(
            f"{found[0].name}: {found[0].dtype} {list(found[0].shape)} looks like a packed weight or its scale, but"
            f" is no part of what {said.method} stores ({said.place});"
            f" {counted(len(found), 'such tensor is', 'such tensors are')} not decoded: correct the description,"
            f" or fetch the checkpoint again; {setting('quantize')}=none copies it as it is stored"
        )


def _is_scale(spec: WeightSpec, names: set[str]) -> bool:
    module, _, end = spec.name.rpartition(".")
    if spec.name.endswith(SCALES):
        return True
    has_weight = f"{module}.weight" in names or f"{module}.qweight" in names
    return has_weight and (end == "scales" or (end == "scale" and spec.dtype.name in ("F8_E8M0", "U8")))


def _excluded(said: Declaration) -> Iterator[str]:
    for key in EXCLUDED:
        entries = said.settings.get(key) or ()
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            raise BadCheckpoint(f"{said.place}: expected {key} to be a list of names, found {entries!r:.80}")
        yield from entries


def _excluded_but_quantized(
    checkpoint: Checkpoint, said: Declaration, excluded: Named, modules: list[str]
) -> Iterator[str]:
    """Yield a note about heads that are excluded and quantized all the same: tools exclude them by default.

    Raises:
        BadCheckpoint: another module is.
    """
    for module in modules if excluded.entries else ():
        if module not in excluded:
            continue
        if checkpoint.family.traits(f"{module}.weight", (1, 1)).role != "head":
            raise BadCheckpoint(
                f"{module}: {said.place} says that it is not quantized, but it is stored quantized; take it off the"
                " list,"
                " or fetch the checkpoint again"
            )
        yield f"{module} is stored quantized, though {said.place} excludes it: it is decoded like the others"


def _unused(said: Declaration, excluded: Named, names: list[str]) -> Iterator[str]:
    """Yield a note about entries that name nothing.

    Raises:
        BadCheckpoint: none names anything, but for heads, which are not stored where they are tied.
    """
    entries = [entry for entry in excluded.entries if not HEADS.search(entry)]
    if not entries or said.method in GENERIC_LISTS:
        return
    unused = set(excluded.unused(names)) & set(entries)
    if unused == set(entries):
        raise BadCheckpoint(
            f"{said.place}: its list of modules that are not quantized names none of this checkpoint, {entries[0]!r}"
            f" first ({len(entries)} entries; tensors are named like {names[len(names) // 2]!r}), so that it was made"
            " for"
            " another one; correct it, or remove it"
        )
    if unused:
        first = next(entry for entry in entries if entry in unused)
        yield (
            f"{said.place} excludes {counted(len(unused), 'module that is', 'modules that are')} not there,"
            f" {first!r} first"
        )


def _plain_among_quantized(
    said: Declaration, excluded: Named, modules: list[str], left: list[WeightSpec]
) -> Iterator[str]:
    """Yield a note about matrices that are plain, although the same layer is quantized in other blocks."""
    kinds = {re.sub(r"\d+", "#", module) for module in modules}
    found = [
        spec.name
        for spec in left
        if len(spec.shape) == 2 and spec.dtype.name in WEIGHT_DTYPES and spec.name.endswith(".weight")
        and re.sub(r"\d+", "#", spec.name.removesuffix(".weight")) in kinds
    ]  # fmt: skip
    if said.settings.get("dynamic") or said.settings.get("extra_config"):  # which say so module by module
        return
    mine = [name for name in found if not excluded.could_mean(name.removesuffix(".weight"))]
    if mine:
        yield (
            f"{counted(len(mine), 'matrix is', 'matrices are')} stored plain, {mine[0]} first, though {said.place} does"
            " not exclude what is plain, and others like it are quantized: what is plain is taken as it is; an engine"
            " that believes the description does not load this source"
        )
