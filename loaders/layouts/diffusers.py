"""The layout of diffusers: a pipeline's components in sub-folders, or one component by itself.

A component of diffusers' own classes has its weights in diffusion_pytorch_model.safetensors, or in shards with an index
of that name, and its quantization in its config.json, as diffusers' save_pretrained writes them (diffusers 0.42,
quantizers/quantization_config.py). Text encoders are transformers' models, in the layout of transformers.
model_index.json is copied byte for byte, and so is the config.json of a component that stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from loaders.architectures.diffusers import DiffusersClass, class_of, is_skipped
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec, setting
from loaders.layouts import hf
from loaders.layouts.base import Placed, module_of
from loaders.quantization.scheme import Scheme
from loaders.rules.defaults import LINEAR, OTHER_LINEAR
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, StoredTensor
from loaders.storage.json_files import json_bytes
from loaders.tensors.logical_tensor import LogicalTensor

LOADED = ("plain", "bitsandbytes")  # the engines of schemes that diffusers loads, of those that are written here
NOT_LOADED = {"ggml": "diffusers takes a GGUF as a transformer's single file alone, which is not written here yet"}
STEM = "diffusion_pytorch_model"


def parts_of(checkpoint: Checkpoint) -> Mapping[str, Checkpoint]:
    """Return the components of a pipeline by the prefix of their tensors' names; one by itself has none."""
    if not checkpoint.components:
        return {"": checkpoint}
    return {f"{part}/": each for part, each in checkpoint.components.items()}


def is_of_diffusers(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a pipeline of diffusers, or one of its components of diffusers' own classes."""
    return bool(checkpoint.components) or class_of(checkpoint.config) is not None


def check_scheme(scheme: Scheme, place: str) -> None:
    """Check that diffusers loads a scheme; `place` is the setting that asks for it.

    Raises:
        BadSpec: it does not.
    """
    if scheme.engine not in LOADED:
        why = NOT_LOADED.get(scheme.engine, f"diffusers does not load what is quantized for {scheme.engine}")
        raise BadSpec(
            f"{place}: {why}; it loads bitsandbytes (choose {setting('quantize')}=nf4, fp4, int8, or none), and torchao"
            " and quanto, which are not written here"
        )


class DiffusersLayout(hf.HfLayout):
    """The layout of diffusers; see `Layout`."""

    name: ClassVar[str] = "diffusers"
    containers: ClassVar[tuple[str, ...]] = ("safetensors",)

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        placed = list[Placed]()
        for prefix, part, mine in _by_part(checkpoint, decisions):
            placed += [_within(prefix, each) for each in hf.place(mine, part.config)]
        return tuple(placed)

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        if checkpoint.components or not checkpoint.config:
            return None
        return _config(checkpoint, decisions, compute_dtype)

    def configs(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, bytes]:
        """Return each config.json of a pipeline's components that is not the source's, by its path."""
        if not checkpoint.components:
            return {}
        made = {
            f"{prefix}config.json": (part.config, _config(part, mine, compute_dtype))
            for prefix, part, mine in _by_part(checkpoint, decisions)
            if part.config
        }
        return {name: json_bytes(config) for name, (source, config) in made.items() if config != source}

    def file_names(self, checkpoint: Checkpoint, firsts: Sequence[str]) -> list[str]:
        """Return the names of weight files, of which each holds a tensor of `firsts` and others of its component."""
        parts = parts_of(checkpoint)
        prefixes = [_prefix(checkpoint, name) for name in firsts]
        counts, made, numbers = Counter(prefixes), list[str](), dict.fromkeys(parts, 0)
        for prefix in prefixes:
            numbers[prefix] += 1
            count, stem = counts[prefix], STEM if class_of(parts[prefix].config) is not None else "model"
            shard = "" if count == 1 else f"-{numbers[prefix]:05d}-of-{count:05d}"
            made.append(f"{prefix}{stem}{shard}.safetensors")
        return made

    def indexes(
        self, checkpoint: Checkpoint, files: Sequence[OutputFile], sizes: Mapping[str, int]
    ) -> dict[str, dict[str, Any]]:
        """Return the index of each component that has several files, by its path; `sizes` are of tensors, by file."""
        made = {}
        for prefix, part in parts_of(checkpoint).items():
            mine = [file for file in files if file.name.startswith(prefix)]
            if len(mine) < 2:
                continue
            names = {
                slot.name.removeprefix(prefix): file.name.removeprefix(prefix) for file in mine for slot in file.slots
            }
            stem = STEM if class_of(part.config) is not None else "model"
            made[f"{prefix}{stem}.safetensors.index.json"] = {
                "metadata": {"total_size": sum(sizes[file.name] for file in mine)},
                "weight_map": dict(sorted(names.items())),
            }
        return made


def component_of(checkpoint: Checkpoint, name: str) -> str:
    """Return the component of a pipeline's tensor; the empty string for any other checkpoint's."""
    return name.partition("/")[0] if checkpoint.components else ""


def _prefix(checkpoint: Checkpoint, name: str) -> str:
    part = component_of(checkpoint, name)
    return f"{part}/" if part else ""


def _by_part(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> Iterator[tuple[str, Checkpoint, list[Decision]]]:
    """Yield each component with its prefix and the decisions about its tensors, which have their own names there."""
    parts = parts_of(checkpoint)
    mine: dict[str, list[Decision]] = {prefix: [] for prefix in parts}
    for decision in decisions:
        prefix = _prefix(checkpoint, decision.tensor.name)
        mine[prefix].append(_renamed(decision, prefix) if prefix else decision)
    for prefix, part in parts.items():
        yield prefix, part, mine[prefix]


def _renamed(decision: Decision, prefix: str) -> Decision:
    tensor = replace(decision.tensor, name=decision.tensor.name.removeprefix(prefix))
    encoding = None if decision.encoding is None else replace(decision.encoding, tensor=_like(decision, prefix))
    return replace(decision, tensor=tensor, encoding=encoding)


def _like(decision: Decision, prefix: str) -> LogicalTensor:
    """Return what is encoded, which may be the transpose of the tensor, under its own name."""
    assert decision.encoding is not None
    return replace(decision.encoding.tensor, name=decision.encoding.tensor.name.removeprefix(prefix))


def _within(prefix: str, placed: Placed) -> Placed:
    """Return a component's tensor as one of the pipeline."""
    if not prefix:
        return placed
    tensor = replace(placed.tensor, name=prefix + placed.tensor.name)
    stored: dict[str, StoredTensor] = {
        role: replace(each, name=prefix + each.name) for role, each in placed.stored.items()
    }
    return Placed(replace(placed.encoding, tensor=tensor), stored)


# --- config.json


def _config(part: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None) -> dict[str, Any]:
    """Return the config.json of a component: its source's, with what the engine must know of the quantization.

    Raises:
        BadSpec: the engine's skip list cannot express which modules are quantized.
    """
    name = class_of(part.config)
    if name is None:
        return hf.config_json(part.config, decisions, part.family, compute_dtype)
    # transformers' models have a dtype in their config.json, which a cast changes; those of diffusers have none.
    made = dict(part.config) if hf.is_copied(decisions) else hf.plain_config(part.config)
    if not any(decision.action == "quantize" for decision in decisions):
        return made
    is_sorted, skip = list(made) == sorted(made), _skip_list(DiffusersClass(name), decisions)
    made["quantization_config"] = hf.quantization_block({}, decisions, skip, compute_dtype)
    return dict(sorted(made.items())) if is_sorted else made


def _skip_list(known: DiffusersClass, decisions: Sequence[Decision]) -> list[str] | None:
    """Return the linear layers that stay as they are, but for those that the class keeps by itself; None if none do.

    Raises:
        BadSpec: diffusers would skip a quantized module, too.
    """
    roles = {*LINEAR, *OTHER_LINEAR} - {"sensitive"}
    if not known.is_known:  # what is named like a table may be a linear layer, and an entry for a table does no harm
        roles.add("embedding")
    kept = [d for d in decisions if d.action in ("keep", "cast") and d.tensor.role in roles]
    skip = sorted(module_of(d.tensor.name) for d in kept if _is_matrix(d.tensor))
    quantized = [module_of(d.tensor.name) for d in decisions if d.action == "quantize"]
    caught = [module for module in quantized if is_skipped(module, skip)]
    if caught:
        raise BadSpec(
            f"rules: {caught[0]} is quantized, but diffusers would skip it, since its name or path holds that of a kept"
            f" layer ({', '.join(name for name in skip if is_skipped(caught[0], [name]))}); keep both or neither"
        )
    return skip or None


def _is_matrix(tensor: LogicalTensor) -> bool:
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")
