"""Loading a model cut over ranks by FSDP, with weights that stay quantized: QLoRA over several devices.

Block by block, rank 0 reads or quantizes a block's weights and sends them; then every rank cuts the block and keeps its
part. So no rank, not even the first, ever holds the model, but its shards and one block. Packed weights lie in tensors
of the model's float dtype (bitsandbytes: quant_storage), since FSDP puts weights of one dtype together; what they are
decoded with (absmax, scales, zeros, tables) is small and whole on every rank.

bitsandbytes 0.50 loses a weight's quant_state when FSDP replaces the parameter, and takes it from the module instead:
nn/modules.py, fix_4bit_weight_quant_state_from_module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadSpec
from loaders.models.adapters import begin_dora
from loaders.models.config import ModelLoadingConfig
from loaders.models.cutting import Prepare, Unit, cut, prepared_units
from loaders.models.hub_cache import place_of_model
from loaders.models.loading import (
    encoding_of,
    needs_transformers,
    schemes_of,
    set_generation,
    sources_of,
)
from loaders.models.opening import check_expanded
from loaders.models.quantized_modules import module_maker
from loaders.models.ranks import Named, Ranks, ranks_of
from loaders.models.saving import mark_quantized, refuse_to_save_cut
from loaders.models.skeleton import BUILDING, Skeleton, open_weights, set_parameter, skeleton_of
from loaders.models.weights import ModelWeights
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.hqq import Hqq
from loaders.specs import TensorSpec
from loaders.storage.hashes import text_digest
from loaders.tensors.block_expansion import BLOCK, expand_checkpoint, expand_sources, expansion_of
from loaders.tensors.encoding import Encoding

# The fields of ModelLoadingConfig that can be given.
SETTINGS = (
    "attention", "decode", "dtype", "ignore_unexpected", "llama_pro_blocks", "llama_pro_path", "use_cache", "workers",
)  # fmt: skip
PACKED: dict[type, str] = {Bnb4: "weight", Hqq: "W_q"}  # the role of a scheme's packed weights


@dataclass(frozen=True)
class _Source:
    """What is loaded: a checkpoint, the model that it fills, and the schemes of the parameters that stay quantized."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    schemes: Mapping[str, tuple[Scheme, bool]]
    dtype: torch.dtype


def load_sharded_model(
    path: str | Path,
    mesh_or_group: Any = None,
    quantize: Scheme | str | None = None,
    *,
    fsdp: int = 2,
    prepare: Prepare | None = None,
    **settings: Any,
) -> Any:
    """Load a causal language model cut over ranks. All ranks of a mesh or a process group call it alike.

    mesh_or_group: a DeviceMesh of one dimension, or a process group, by default that of all ranks; weights go to the
    mesh's kind of device, or with NCCL to the current CUDA device. quantize: nf4, fp4, hqq8, hqq4 or hqq2, or such a
    scheme, for plain weights; what a checkpoint holds in these formats stays so. fsdp: 2 cuts by `fully_shard`, 1 by
    `FullyShardedDataParallel` (use_orig_params=False). settings: the fields of ModelLoadingConfig in SETTINGS; with
    llama_pro_blocks or llama_pro_path the new blocks stay plain and alone are trained.

    prepare: takes the model and returns what is to be cut, usually with adapters:
    `lambda model: get_peft_model(model, LoraConfig(...))`. The model's weights are not there then, and may not be
    touched; rank 0's adapters are sent to all, and DoRA's magnitudes follow from the weights once these are there.

    Raises:
        BadSpec: there is no group, the ranks do not ask for the same, or what they ask for cannot be done.
        BadCheckpoint: as `load_model_and_tokenizer`.
        WeightmillError: some rank failed. Every error is raised on all ranks, mostly before any weight is read.
    """
    ranks = ranks_of(mesh_or_group)

    def request() -> tuple[ModelLoadingConfig, dict[str, object]]:
        said = {"path": str(path), "quantize": quantize, "fsdp": fsdp, "prepare": prepare is not None, **settings}
        return _config(quantize, fsdp, settings), said

    def opened() -> tuple[_Source, dict[str, object]]:
        source = _open(path, config)
        return source, {"path (what its headers say)": source.checkpoint.fingerprint}

    def prepared() -> tuple[tuple[Any, list[Unit]], dict[str, object]]:
        made, units = prepared_units(source.skeleton, prepare)
        return (made, units), {"prepare (what it made)": _outline(made)}

    config = ranks.agree(request)
    source = ranks.agree(opened)
    model, units = ranks.agree(prepared)
    with ExitStack() as stack:
        weights: Any = ranks.together(
            lambda: stack.enter_context(_opened_for(units, source, config)) if ranks.is_first else None
        )
        for unit in units:
            parts = list(ranks.send(partial(_read, weights, source, unit)))
            ranks.together(partial(_fill, model, source, unit, parts, ranks.device))
            parts.clear()
            for owner, last in unit.added:
                ranks.copied(getattr(owner, last))
            model = ranks.together(partial(_finish, model, source, unit, ranks, fsdp))
    return model


def _config(quantize: Scheme | str | None, fsdp: int, settings: Mapping[str, Any]) -> ModelLoadingConfig:
    config = ModelLoadingConfig(quantize=quantize, **settings)
    problems = []
    if fsdp not in (1, 2) or isinstance(fsdp, bool):
        problems.append(f"fsdp: expected 1 (FullyShardedDataParallel) or 2 (fully_shard), found {fsdp!r}")
    problems += [
        f"{name}: it is not for a model that is cut over ranks, whose devices and shares follow from mesh_or_group;"
        f" leave it out. Taken are {', '.join(SETTINGS)}"
        for name in settings
        if name not in SETTINGS
    ]
    if config.scheme is not None:
        problems += _not_held(config.scheme, "quantize")
    if problems:
        raise BadSpec(problems)
    return config


def _not_held(scheme: Any, where: str) -> list[str]:
    """Say why a scheme's weights cannot be cut; empty if they can."""
    if isinstance(scheme, Bnb4) or (isinstance(scheme, Hqq) and scheme.bits != 3):
        return []
    said = f"hqq with {scheme.bits} bits" if isinstance(scheme, Hqq) else scheme.kind
    return [
        f"{where}: weights of {said} cannot be cut by FSDP, which keeps neither their dtype nor what belongs to a"
        " parameter; known: nf4, fp4, hqq8, hqq4, hqq2"
    ]


def _open(path: str | Path, config: ModelLoadingConfig) -> _Source:
    """Open a checkpoint's headers and build the model, without weights."""
    checkpoint, new = _expansion(open_checkpoint(place_of_model(path), key="path"), config)
    sources = sources_of(checkpoint, config)
    if needs_transformers(sources, config):
        raise BadSpec(
            f"path: {checkpoint.address} is quantized by {checkpoint.quantized_by}, whose weights FSDP cannot cut;"
            " decode=True loads them as floats"
        )
    if config.llama_pro_blocks:
        sources = expand_sources(checkpoint, sources, config.llama_pro_blocks)
        checkpoint = expand_checkpoint(checkpoint, config.llama_pro_blocks)
    skeleton = skeleton_of(
        checkpoint, sources, dtype=config.dtype, attention=config.attention, ignore_unexpected=config.ignore_unexpected
    )
    set_generation(skeleton.model, checkpoint)
    skeleton.model.name_or_path = str(path)  # which adapters name as their base
    schemes = schemes_of(checkpoint, sources, skeleton, config)
    if new:
        schemes = {name: scheme for name, scheme in schemes.items() if _block_of(name) not in new}
        for name, parameter in skeleton.model.named_parameters():
            parameter.requires_grad_(_block_of(name) in new)
    _check_schemes(skeleton, schemes)
    marks = {name: scheme for name, (scheme, _) in schemes.items()}
    mark_quantized(skeleton.model, checkpoint, marks, None, trains_blocks=bool(new))
    if schemes:
        refuse_to_save_cut(skeleton.model)
    dtype = next(skeleton.model.get_parameter(name).dtype for name in (*schemes, *skeleton.parameters))
    return _Source(checkpoint, skeleton, schemes, dtype)


def _expansion(base: Checkpoint, config: ModelLoadingConfig) -> tuple[Checkpoint, frozenset[int]]:
    """Return the checkpoint that is read, and the numbers that new blocks have in the expanded model."""
    checkpoint, count = base, config.llama_pro_blocks
    if config.llama_pro_path is not None:
        checkpoint = open_checkpoint(place_of_model(config.llama_pro_path), key="llama_pro_path")
        check_expanded(base, checkpoint)
        count = checkpoint.config["num_hidden_layers"] - base.config["num_hidden_layers"]
    origins = expansion_of(base, count).origins if count else ()
    return checkpoint, frozenset(number for number, (_, is_new) in enumerate(origins) if is_new)


def _block_of(name: str) -> int | None:
    match = BLOCK.match(name)
    return None if match is None else int(match["number"])


def _check_schemes(skeleton: Skeleton, schemes: Mapping[str, tuple[Scheme, bool]]) -> None:
    """Raise BadSpec unless all weights that stay quantized can be cut, and their engine is here."""
    for engine in sorted({scheme.engine for scheme, _ in schemes.values()}):
        if find_spec(engine) is None:
            raise BadSpec(f"quantize: modules of {engine} need it: pip install {engine}")
    problems = []
    for name, (scheme, _) in schemes.items():
        where = f"path: {name}"
        unfit = _not_held(scheme, where)
        if unfit:
            raise BadSpec([*unfit, "decode=True loads it as floats"])
        [logical], dtype = skeleton.parameters[name], skeleton.model.get_parameter(name).dtype
        if _unit_bytes(scheme, logical.spec) % dtype.itemsize:
            problems.append(
                f"{where} {list(logical.shape)}: its packed weights are no whole number of {dtype}, in which FSDP has"
                " them; leave quantize out, or make an output by a job with a rule that keeps this tensor"
            )
    if problems:
        raise BadSpec(problems)


def _unit_bytes(scheme: Scheme, spec: TensorSpec) -> int:
    """Return the bytes that lie one after another in a scheme's packed weights, and are seen as floats."""
    stored = scheme.stored(spec)[PACKED[type(scheme)]]
    return stored.size if isinstance(scheme, Bnb4) else stored.shape[-1] * stored.dtype.item_bytes


# --- the weights


def _opened_for(units: Sequence[Unit], source: _Source, config: ModelLoadingConfig) -> ModelWeights:
    weights = open_weights(source.checkpoint, source.skeleton, workers=config.workers, use_cache=config.use_cache)
    wanted = {name: _encoding(weights, source, name) for unit in units for name in _in_order(unit, source)}
    weights.expect(wanted)
    return weights


def _in_order(unit: Unit, source: _Source) -> list[str]:
    """Return the parameters of a unit that have weights of their own: the plain ones, then the quantized ones."""
    return sorted((name for name in unit.filled if name not in source.skeleton.tied), key=source.schemes.__contains__)


def _encoding(weights: ModelWeights, source: _Source, name: str) -> Encoding | None:
    scheme, is_new = source.schemes.get(name, (None, False))
    return (
        encoding_of(weights.checkpoint, source.skeleton.parameters[name][0], scheme)
        if is_new and scheme is not None
        else None
    )


def _read(weights: ModelWeights, source: _Source, unit: Unit) -> Iterator[Named]:
    """Read or quantize the weights of a unit, on rank 0."""
    for name in _in_order(unit, source):
        owner, last = unit.filled[name]
        there = getattr(owner, last)
        if name not in source.schemes:
            tensor = torch.empty(there.shape, dtype=there.dtype)
            weights.fill(name, tensor)
            yield name, "", tensor
            continue
        scheme, _ = source.schemes[name]
        encoding = _encoding(weights, source, name)
        [logical] = source.skeleton.parameters[name]
        for role, part in (weights.stored(logical) if encoding is None else weights.encoded(encoding)).items():
            yield name, role, _as_floats(scheme, part, there.dtype) if role == PACKED[type(scheme)] else part


def _as_floats(scheme: Scheme, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View packed weights as a float dtype, in which the engines take them."""
    if isinstance(scheme, Bnb4):
        return packed.reshape(-1).view(torch.uint8).view(dtype).reshape(-1, 1)
    return packed.view(dtype)


def _fill(model: nn.Module, source: _Source, unit: Unit, parts: Sequence[Named], device: torch.device) -> None:
    """Put a unit's weights into its modules, and all of it on the device."""
    quantized: dict[str, dict[str, torch.Tensor]] = {}
    for name, role, part in parts:
        if role:
            quantized.setdefault(name, {})[role] = part
        else:
            set_parameter(*unit.filled[name], part)
    for name, original in source.skeleton.tied.items():
        if name in unit.filled:
            set_parameter(*unit.filled[name], getattr(*unit.filled[original]))
    for name, stored in quantized.items():
        linear: Any = unit.filled[name][0]
        scheme, [logical] = source.schemes[name][0], source.skeleton.parameters[name]
        with BUILDING:
            made: Any = module_maker(scheme)(
                scheme, logical.spec, stored, linear.bias, linear.weight.dtype, str(device)
            )
        # Outside of training bitsandbytes packs weights anew, in place, for CPUs with AVX512-BF16, and notes it in the
        # quant_state. The next forward would read the shards, which stay as they were, as if they were packed anew.
        made.support_avx512bf16_for_cpu = False
        path = next(path for path, each in model.named_modules() if each is linear)
        model.set_submodule(path, made.eval())
    for owner, last in unit.added:
        set_parameter(owner, last, getattr(owner, last).detach().to(device).contiguous())


def _finish(model: Any, source: _Source, unit: Unit, ranks: Ranks, fsdp: int) -> Any:
    """Cut a unit whose weights are there."""
    begin_dora(unit.modules, source.dtype)
    return cut(model, unit.module, ranks, fsdp)


def _outline(model: nn.Module) -> str:
    """Return a digest of a model's parameters."""
    return text_digest(
        repr([(name, each.shape, each.dtype, each.requires_grad) for name, each in model.named_parameters()])
    )
