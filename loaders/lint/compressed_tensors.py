"""Checks of what vLLM and transformers read as compressed-tensors: targets and ignore against what is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loaders.layouts.compressed_tensors import LINEAR_ROLES, fails_for_experts, name_of
from loaders.lint.base import Finding, Subject, doubt, fault, module, some
from loaders.quantization.float4 import Nvfp4
from loaders.quantization.fp8_block import Fp8Block
from loaders.quantization.kernels.float8 import BLOCK
from loaders.quantization.packed_int import PackedInt
from loaders.recipes import Recipe

MARLIN_ROWS = 64  # what vLLM's Marlin kernel takes at once


def check(subject: Subject) -> Iterator[Finding]:
    """What vLLM or transformers would stumble over."""
    block: Mapping[str, Any] = subject.config["quantization_config"]
    ignore, targets = block.get("ignore") or [], _targets(block)
    if not all(isinstance(name, str) for names in (ignore, targets) for name in names):
        yield fault("every engine", "ignore or targets are no lists of names", "fails", "write lists")
        return
    yield from _plain(subject, ignore, targets)
    yield from _experts(subject)
    yield from _fused(subject)
    yield from _kernels(subject)


def _targets(block: Mapping[str, Any]) -> list[Any]:
    groups = block.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return [target for group in found if isinstance(group, Mapping) for target in group.get("targets") or ()]


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    """As compressed-tensors and vLLM match a module's name: exactly, or by a regular expression from its start."""
    for pattern in patterns:
        if not pattern.startswith("re:"):
            if pattern == name:
                return True
            continue
        try:
            if re.match(pattern.removeprefix("re:"), name):
                return True
        except re.error:
            continue
    return False


def _plain(subject: Subject, ignore: Sequence[str], targets: Sequence[str]) -> Iterator[Finding]:
    def is_wanted(name: str) -> bool:
        return ("Linear" in targets or _is_named(name, targets)) and not _is_named(name, ignore)

    matrices = [r for r in subject.sources.recipes if r.role in LINEAR_ROLES and len(r.shape) == 2]
    bare = [module(r) for r in matrices if r.name.endswith(".weight") and r.decode is None and is_wanted(module(r))]
    if bare:
        yield fault(
            "vLLM, transformers",
            f"{len(bare)} linear layers are stored plain and are not in ignore: {some(bare)}",
            "makes quantized modules of them and finds no codes",
            "name them in ignore",
        )
    caught = [module(r) for r in matrices if r.decode is not None and not is_wanted(module(r))]
    if caught:
        yield fault(
            "vLLM, transformers",
            f"{len(caught)} quantized layers are in ignore, or in no group's targets: {some(caught)}",
            "makes plain modules of them and does not find their weights",
            "take them out of ignore, and name them in the targets of their group",
        )
    if "Linear" in targets and len(set(targets)) > 1:
        yield doubt(
            "vLLM",
            'targets name "Linear" beside other targets',
            'takes every fused layer (qkv, gate_up) for "Linear", whatever the others say',
            "name all layers in the targets",
        )


def _experts(subject: Subject) -> Iterator[Finding]:
    experts = [r for r in subject.sources.recipes if r.role == "expert" and r.decode is not None]
    wrong = [module(r) for r in experts if isinstance(r.decode, Nvfp4)]
    if wrong:
        yield doubt(
            "transformers 5.23",
            f"{len(wrong)} experts are NVFP4: {some(wrong)}",
            "loads them without a word and computes wrong numbers (it forgets their global scale)",
            "run it in vLLM",
        )
    failing = [r for r in experts if fails_for_experts(r.decode)]
    if failing:
        yield doubt(
            "transformers 5.23",
            f"{len(failing)} experts are {name_of(failing[0].decode)}: {some([module(r) for r in failing])}",
            "fails to load them (CONVERSION)",
            "run it in vLLM",
        )


def _fused(subject: Subject) -> Iterator[Finding]:
    groups: dict[str, list[Recipe]] = {}
    for recipe in subject.sources.recipes:
        if recipe.group is not None:
            groups.setdefault(recipe.group, []).append(recipe)
    unlike = [name for name, found in groups.items() if len({recipe.decode for recipe in found}) > 1]
    if unlike:
        yield fault(
            "vLLM",
            f"{len(unlike)} fused groups have several schemes: {some(unlike)}",
            "fuses their layers and refuses that; transformers loads them apart",
            "give the layers of a group one scheme",
        )
    ragged = [
        name
        for name, found in groups.items()
        if any(isinstance(recipe.decode, Fp8Block) and recipe.shape[0] % BLOCK for recipe in found[:-1])
    ]
    if ragged:
        yield doubt(
            "vLLM",
            f"{len(ragged)} fused groups of FP8_BLOCK have rows that are no multiple of {BLOCK}: {some(ragged)}",
            "refuses blocks that cross the parts of a fused layer; transformers loads them",
            "keep them, or use FP8_DYNAMIC",
        )


def _kernels(subject: Subject) -> Iterator[Finding]:
    odd = [
        module(r)
        for r in subject.sources.recipes
        if isinstance(r.decode, PackedInt) and r.shape[0] % MARLIN_ROWS and r.role != "expert"
    ]
    if odd:
        yield doubt(
            "vLLM",
            f"{len(odd)} layers have rows that are no multiple of {MARLIN_ROWS}: {some(odd)}",
            "cannot use its Marlin kernel for them: it takes a slower one, or refuses",
            "keep them by a rule if it refuses",
        )
