"""AutoRound's weights (quant_method auto-round), which it stores in the forms of other tools, as packing_format says.

    auto_round:auto_gptq, :gptq   GPTQ's words, zeros less one; without desc_act
    auto_round, :gptqmodel        GPTQ's words, zeros as they are; older versions say auto_round:exllamav2 or :triton
    auto_round:auto_awq, :awq     AWQ's words (gemm)
    auto_round:llm_compressor     compressed-tensors' NVFP4 and MXFP4; MXFP8: float8, a power of two for 32 weights
    auto_round:fp8_static         float8 with one scale, or one for each row

Older versions call it `backend`. extra_config has settings of single modules, by name or by a regular expression: 16
bits are plain. Checked against auto-round 0.2 to 0.16 (auto_round/export/export_to_autoround and auto_round_extension).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DType
from loaders.errors import BadCheckpoint
from loaders.limits import check_patterns
from loaders.patterns import Allowance, compiled
from loaders.quantization.read_only.deepseek_fp8 import Fp8Blocks
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.specs import TensorSpec, WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.awq_gptq import awq_weight, gptq_weight, group_size, packed_modules
from loaders.tensors.quantized_sources.base import decoded, expect, float_dtype, part, quantization_block, undecoded
from loaders.tensors.quantized_sources.fp8_scaled import scaled_weight

PLAIN_BITS = 16  # from here on extra_config says that a module is plain
# Versions before 0.5 name the kernel behind the form.
RAW_ZEROS = re.compile(r"auto_?round(?::(?:gptqmodel|exllamav2|triton\w*)(?::\w+)?)?$")
ROTATIONS = ("rotation_config", "spinquant_config", "hadamard_config")
MX_GROUP = 32


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: another form, rotated weights, settings that do not fit what is stored, or a weight that is not
            whole.
    """
    settings = quantization_block(checkpoint)
    by_name = {spec.name: spec for spec in checkpoint.weights}
    rotated = next((key for key in ROTATIONS if settings.get(key)), None)
    if rotated:
        raise BadCheckpoint(
            f"AutoRound's {rotated}: the weights are rotated, and the engine rotates activations as it runs; they are"
            " not turned back here; take the model as it was before it was quantized"
        )
    form, extra, dtype = _form(settings), _Extra(settings, by_name), float_dtype(checkpoint)
    if form == "floats":
        modules = _float_modules(by_name)
        extra.check(modules)
        return {f"{m}.weight": _floats(by_name, f"{m}.weight", extra.settings_of(m), dtype) for m in modules}
    if str(settings.get("data_type") or "int").split("_")[0] != "int":
        raise BadCheckpoint(f"AutoRound's data_type {settings['data_type']!r} is not decoded as {form}; int is")
    modules = packed_modules(by_name)
    extra.check(modules)
    return {f"{m}.weight": _packed(by_name, m, extra.settings_of(m), form, dtype) for m in modules}


def _form(settings: Mapping[str, Any]) -> str:
    """Return how weights are stored: "awq", "gptq" with zeros less one, "gptq_v2", or "floats".

    Raises:
        BadCheckpoint: it is a form that is not decoded.
    """
    said = settings.get("packing_format") or settings.get("backend") or "auto"
    if not isinstance(said, str):
        raise BadCheckpoint(f"AutoRound's packing_format: expected a word, found {said!r:.80}")
    if said in ("auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8"):
        return "floats"
    if RAW_ZEROS.match(said):
        return "gptq_v2"
    if "awq" in said:
        return "awq"
    if said == "auto" or "gptq" in said:
        return "gptq"
    raise BadCheckpoint(
        f"AutoRound's packing_format {said!r} is not decoded; auto_round, and auto_round: with auto_gptq, gptqmodel,"
        " auto_awq, llm_compressor or fp8_static are"
    )


def _packed(
    by_name: Mapping[str, WeightSpec], module: str, settings: Mapping[str, Any], form: str, dtype: DType
) -> LogicalTensor:
    if form != "awq":
        return gptq_weight(by_name, module, settings, int(form == "gptq"), dtype, wraps=False)
    if settings.get("bits", 4) != 4:
        raise BadCheckpoint(f"{module}: AWQ of {settings['bits']!r} bits is not decoded; 4 are")
    return awq_weight(by_name, module, group_size(settings, "group_size"), dtype)


class _Extra:
    """extra_config: settings of modules by name, and by regular expressions that are searched for in names."""

    def __init__(self, settings: Mapping[str, Any], by_name: Mapping[str, WeightSpec]) -> None:
        self._settings, self._by_name = settings, by_name
        entries = settings.get("extra_config") or {}
        if not isinstance(entries, Mapping) or not all(isinstance(own, Mapping) for own in entries.values()):
            raise BadCheckpoint(f"AutoRound's extra_config: expected modules with settings, found {entries!r:.80}")
        self._entries: Mapping[str, Mapping[str, Any]] = entries
        patterns = [(key, own) for key, own in entries.items() if own and re.search(r"[*^$|()\[\]?+\\]", key)]
        check_patterns(len(patterns), "AutoRound's extra_config")
        allowance = Allowance()
        self._patterns = [(compiled(key, "AutoRound's extra_config", allowance), own) for key, own in patterns]
        stored = {name.rpartition(".")[0] for name in by_name}
        tails = Counter(map(_tail, entries))
        self._by_tail: Mapping[str, Mapping[str, Any]] = {
            _tail(key): own for key, own in entries.items() if tails[_tail(key)] == 1 and key not in stored
        }

    def settings_of(self, module: str) -> Mapping[str, Any]:
        """Return the settings of a quantized module."""
        return {**self._settings, **self._own(module)}

    def _own(self, module: str) -> Mapping[str, Any]:
        """Return what extra_config says of a module, which may have another prefix inside the class that was loaded."""
        if module in self._entries:
            return self._entries[module]
        matching = next((own for pattern, own in self._patterns if pattern.search(module)), None)
        return self._by_tail.get(_tail(module), {}) if matching is None else matching

    def check(self, quantized: list[str]) -> None:
        """Check that modules are stored as the settings say, and that these were made for this model.

        Raises:
            BadCheckpoint: they are not.
        """
        for module in quantized:
            if _is_plain(self._own(module)):
                raise BadCheckpoint(
                    f"{module}: AutoRound's extra_config says that it is plain, but it is stored quantized; correct"
                    " extra_config, or fetch the checkpoint again"
                )
        packed = set(quantized)
        for key, own in self._entries.items():
            if own and not _is_plain(own) and key not in packed and f"{key}.weight" in self._by_name:
                raise BadCheckpoint(
                    f"{key}: AutoRound's extra_config says how it is quantized, but it is stored plain; correct"
                    " extra_config, or fetch the checkpoint again"
                )
        _check_blocks(self._settings, quantized)


def _tail(module: str) -> str:
    """Return a name from its first block on: layers.0.mlp.up_proj; the whole of it where it is in none."""
    parts = module.split(".")
    first = next((at for at, part in enumerate(parts) if at and part.isdigit()), 1)
    return ".".join(parts[first - 1 :])


def _is_plain(own: Mapping[str, Any]) -> bool:
    bits = own.get("bits")
    return type(bits) is int and bits >= PLAIN_BITS


def _check_blocks(settings: Mapping[str, Any], quantized: list[str]) -> None:
    """Check that block_name_to_quantize names blocks of this model; what precedes a block's last name may differ.

    Raises:
        BadCheckpoint: it names none.
    """
    said = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names")
    listed = said.split(",") if isinstance(said, str) else said if isinstance(said, list) else []
    flat = [name for each in listed for name in (each if isinstance(each, list) else [each])]
    names = [name.strip() for name in flat if isinstance(name, str)]
    parts = {piece for module in quantized for piece in module.split(".")}
    if names and quantized and not any(re.sub(r"(\.\d+)+$", "", n).rsplit(".", 1)[-1] in parts for n in names):
        raise BadCheckpoint(
            f"AutoRound's block_name_to_quantize names {names[0]!r}, where nothing is stored quantized (but"
            f" {quantized[0]} is), so that it was made for another checkpoint; correct or remove it"
        )


# --- float codes


def _float_modules(by_name: Mapping[str, WeightSpec]) -> list[str]:
    ends = (".weight_packed", ".weight_scale", ".weight_global_scale")
    scaled = [name.removesuffix(end) for name in by_name for end in ends if name.endswith(end)]
    coded = [name.removesuffix(".weight") for name, spec in by_name.items() if _is_float8(spec)]
    return list(dict.fromkeys([*scaled, *coded]))


def _is_float8(spec: WeightSpec) -> bool:
    return spec.dtype.name == "F8_E4M3" and spec.name.endswith(".weight")


def _floats(by_name: Mapping[str, WeightSpec], name: str, settings: Mapping[str, Any], dtype: DType) -> LogicalTensor:
    scale = part(by_name, name, name + "_scale")
    packed = by_name.get(name + "_packed")
    if packed is not None:
        if len(packed.shape) != 2 or str(settings.get("data_type", "")).startswith("mx_int"):
            raise BadCheckpoint(
                f"{packed.name}: {settings.get('data_type')!r} {list(packed.shape)} is not decoded; matrices of NVFP4"
                " and MXFP4 are"
            )
        spec = TensorSpec(name, dtype, (packed.shape[0], packed.shape[1] * 2))
        nvfp4 = scale.dtype.name == "F8_E4M3" or name + "_global_scale" in by_name
        found = decoded(by_name, spec, CompressedNvfp4() if nvfp4 else CompressedMxfp4())
        beside = name.removesuffix("weight") + "input_global_scale"
        stored = (*found.stored, ("input_global_scale", by_name[beside])) if beside in by_name else found.stored
        return LogicalTensor(
            name=name, dtype=dtype, shape=spec.shape, stored=stored, window=None, decode=found.decode
        )  # fmt: skip
    weight = part(by_name, name, name)
    if scale.dtype.name != "U8":
        return scaled_weight(by_name, weight, scale, dtype)
    if weight.dtype.name != "F8_E4M3" or len(weight.shape) != 2 or weight.shape[1] % MX_GROUP:
        raise BadCheckpoint(
            f"{name}: expected F8_E4M3 [R, C], C a multiple of {MX_GROUP}, for the powers of two in {scale.name}, found"
            f" {weight.dtype} {list(weight.shape)}"
        )
    rows, columns = weight.shape
    expect(scale, ("U8",), (rows, columns // MX_GROUP), f"for {name} {[rows, columns]}")
    parts = {"weight": weight, "weight_scale_inv": scale}
    return undecoded(TensorSpec(name, dtype, weight.shape), Fp8Blocks((1, MX_GROUP), "U8"), parts, by_name)
