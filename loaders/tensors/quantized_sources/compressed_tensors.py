"""compressed-tensors' weights: config.json's groups say which scheme each has, and its tensors say the rest.

The formats that this project writes are read, and weights of eight bits with one scale for the whole tensor (FP8).
Other tensors of a module's quantization, such as input_scale, go along with its weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES, DType, Shape
from loaders.errors import BadCheckpoint
from loaders.limits import check_patterns
from loaders.patterns import Allowance, Pattern, compiled
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.quantization.schemes.compressed_tensors_fp8_block import Fp8Block
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from loaders.quantization.schemes.compressed_tensors_rowwise import RowScaled
from loaders.specs import TensorSpec, WeightSpec
from loaders.strategies import small_reader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources.base import decoded, part, quantization_block

CODES = ("F8_E4M3", "I8")  # the dtypes of codes that are stored as `weight`


def find(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Find the quantized weights, by name.

    Raises:
        BadCheckpoint: a part is missing, or the format is not read here.
    """
    by_name = {spec.name: spec for spec in checkpoint.weights}
    block = quantization_block(checkpoint)
    if (block.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise BadCheckpoint("config.json: weights compressed by their zeros (sparsity_config) are not decoded here")
    groups, modules = _Groups(block), sorted(_modules(by_name))
    groups.check(modules)
    found, seen = {}, set[Any]()
    for module in modules:
        tensor = _tensor(checkpoint, by_name, module, groups.weights_of(module))
        _check_shape(checkpoint, by_name, module, tensor, seen)
        companions = tuple((name.removeprefix(f"{module}."), by_name[name]) for name in _companions(by_name, module))
        found[tensor.name] = LogicalTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stored=tensor.stored + companions,
            window=None,
            decode=tensor.decode,
        )
    return found


def _check_shape(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], module: str, tensor: LogicalTensor, seen: set[Any]
) -> None:
    """Check a packed weight's shape against the stored weight_shape, once for each kind of matrix (`seen`).

    Half the bits in groups of twice the length would fit the sizes of codes and scales as well.

    Raises:
        BadCheckpoint: the settings give another shape.
    """
    packed = by_name.get(f"{module}.weight_packed")
    kind = (tensor.decode, tensor.shape)
    if packed is None or kind in seen or f"{module}.weight_shape" not in by_name:
        return
    seen.add(kind)
    columns = int(_stored_shape(checkpoint, by_name, packed)[1])
    if columns not in (0, tensor.shape[1]):  # a file of which only the header was fetched holds zeros
        raise BadCheckpoint(
            f"{module}: config.json's settings (bits, group_size) give rows of {tensor.shape[1]}, but its weight_shape"
            f" says {columns}; correct the settings, or fetch the checkpoint again"
        )


def _modules(by_name: Mapping[str, WeightSpec]) -> set[str]:
    """Return the modules that have a quantized weight or a part of one."""
    ends = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_global_scale", ".weight_shape")
    found = {name.rsplit(".", 1)[0] for name in by_name if name.endswith(ends)}
    plain = (name for name, spec in by_name.items() if name.endswith(".weight") and spec.dtype.name in CODES)
    return found | {name.removesuffix(".weight") for name in plain}


def _companions(by_name: Mapping[str, WeightSpec], module: str) -> Iterator[str]:
    for kind in ("input", "output"):
        for what in ("scale", "zero_point", "global_scale"):
            if f"{module}.{kind}_{what}" in by_name:
                yield f"{module}.{kind}_{what}"


class _Groups:
    """The groups of config.json, in the order in which compressed-tensors matches them: name, pattern, class."""

    def __init__(self, block: Mapping[str, Any]) -> None:
        groups = block.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise BadCheckpoint("config.json: quantization_config has no config_groups; fetch it again")
        self._exact: dict[str, Mapping[str, Any]] = {}
        self._patterns: list[tuple[Pattern, Mapping[str, Any]]] = []
        self._allowance = Allowance()
        self._classes: list[Mapping[str, Any]] = []
        for name, group in groups.items():
            if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
                raise BadCheckpoint(f"config.json: {name} of config_groups has no list of targets; fetch it again")
            for target in group["targets"]:
                self._add(str(target), group)
                check_patterns(len(self._patterns), "config.json's targets")

    def _add(self, target: str, group: Mapping[str, Any]) -> None:
        if target.startswith("re:"):
            pattern = compiled(target.removeprefix("re:"), "config.json's targets", self._allowance)
            self._patterns.append((pattern, group))
        elif "." not in target and target[:1].isupper():
            self._classes.append(group)
        else:
            self._exact[target] = group

    def check(self, modules: Collection[str]) -> None:
        """Check that every group that names modules has some of those that are stored quantized.

        Raises:
            BadCheckpoint: one has none.
        """
        used = [group for pattern, group in self._patterns if any(map(pattern.match, modules))]
        used += [group for name, group in self._exact.items() if name in modules]
        named = [*((pattern.pattern, group) for pattern, group in self._patterns), *self._exact.items()]
        for target, group in named:
            if not any(group is each for each in (*used, *self._classes)):
                raise BadCheckpoint(
                    f"config.json's quantization_config has a group for {target!r}, but no module of that name is"
                    " stored"
                    " quantized, so that it was made for another checkpoint; correct the targets"
                )

    def weights_of(self, module: str) -> Mapping[str, Any]:
        """Return the settings of a module's weights, and under "activations" whether the group quantizes those too.

        Raises:
            BadCheckpoint: no group has the module.
        """
        matching = (group for pattern, group in self._patterns if pattern.match(module))
        group = self._exact.get(module) or next(matching, None) or next(iter(self._classes), None)
        if group is None or not isinstance(group.get("weights"), Mapping):
            raise BadCheckpoint(
                f"{module}: it is stored quantized, but no group of config.json's quantization_config has it"
            )
        return {**group["weights"], "activations": group.get("input_activations") is not None}


def _tensor(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], module: str, weights: Mapping[str, Any]
) -> LogicalTensor:
    name = f"{module}.weight"
    if f"{module}.weight_g_idx" in by_name:
        raise BadCheckpoint(f"{module}: its groups are not of neighbours (weight_g_idx), which is not decoded here")
    scale = part(by_name, name, f"{module}.weight_scale")
    packed = by_name.get(f"{module}.weight_packed") or part(by_name, name, name)
    if len(packed.shape) != 2:
        raise BadCheckpoint(f"{packed.name}: expected a matrix of codes, found shape {list(packed.shape)}")
    scheme, shape = _scheme(checkpoint, by_name, packed, scale, weights)
    if scheme is None:
        said = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "group_size", "symmetric")}
        raise BadCheckpoint(f"{module}: its scheme is not decoded here: {said}")
    return decoded(by_name, TensorSpec(name, _dtype(checkpoint, scheme, scale), shape), scheme)


def _scheme(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], packed: WeightSpec, scale: WeightSpec,
    weights: Mapping[str, Any],
) -> tuple[Scheme | None, Shape]:  # fmt: skip
    """Return the scheme of a module's settings, None if it is not decoded here, and the weight's shape."""
    bits, number, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    rows, columns = packed.shape
    if packed.name.endswith(".weight"):
        type_: Any = number
        known = bits == 8 and number in ("float", "int") and weights.get("symmetric", True)
        if known and strategy in ("channel", "tensor"):
            return RowScaled(type_, whole=strategy == "tensor"), packed.shape
        is_block = known and number == "float" and strategy == "block"
        return (Fp8Block() if is_block and weights.get("block_structure") == [128, 128] else None), packed.shape
    if number == "float" and bits == 4:
        if strategy == "tensor_group" and weights.get("group_size") == 16:
            return CompressedNvfp4(), (rows, columns * 2)
        is_mx = strategy == "group" and weights.get("group_size") == 32
        return (CompressedMxfp4(weights["activations"]) if is_mx else None), (rows, columns * 2)
    symmetric = bool(weights.get("symmetric", True))
    if number != "int" or bits not in (4, 8) or (bits == 8 and not symmetric):
        return None, packed.shape
    if strategy == "channel":
        columns = _stored_columns(checkpoint, by_name, packed)
        return PackedInt(bits, columns, symmetric), (rows, columns)
    group = weights.get("group_size")
    if strategy != "group" or type(group) is not int or group < 1 or len(scale.shape) != 2:
        return None, packed.shape
    return PackedInt(bits, group, symmetric), (rows, scale.shape[1] * group)


def _stored_columns(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], packed: WeightSpec) -> int:
    """Read the number of columns from weight_shape, since the last word of a row may hold unused codes."""
    shape = _stored_shape(checkpoint, by_name, packed)
    if shape[0] != packed.shape[0] or shape[1] < 1:
        name = packed.name.removesuffix("packed") + "shape"
        raise BadCheckpoint(f"{name}: expected the two sizes of {packed.name}'s weight, found {shape.tolist()}")
    return int(shape[1])


def _stored_shape(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], packed: WeightSpec) -> np.ndarray:
    """Read a packed weight's weight_shape; zeros if that does not hold two sizes."""
    spec = part(by_name, packed.name, packed.name.removesuffix("packed") + "shape")
    with small_reader(checkpoint.source, (spec,)) as reader:
        raw = reader.read(spec, 0, min(spec.size, 16)).tobytes()
    return np.frombuffer(raw, "<i8") if spec.dtype.name == "I64" and spec.size == 16 else np.zeros(2, "<i8")


def _dtype(checkpoint: Checkpoint, scheme: Scheme, scale: WeightSpec) -> DType:
    """Return the dtype that the weights had: that of their scales, or for four-bit floats the config's."""
    if isinstance(scheme, CompressedNvfp4 | CompressedMxfp4):
        return load_dtype(checkpoint.config) or DTYPES["BF16"]
    if scale.dtype.name not in ("BF16", "F16", "F32"):
        raise BadCheckpoint(f"{scale.name}: expected scales of BF16, F16 or F32, found {scale.dtype}")
    return scale.dtype
