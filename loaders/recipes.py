"""Recipes: how a logical tensor comes from stored ones. The source half of a plan, the same for every target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.errors import BadCheckpoint
from loaders.families import natural_key
from loaders.quantization.bnb4 import Bnb4, read_state
from loaders.quantization.scheme import Scheme
from loaders.quantization.ternary import Ternary
from loaders.specs import DType, Shape, TensorSpec, WeightSpec, dtype_named, row_major
from loaders.strategies import loader

COMPARE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Which elements of a stored tensor make the logical one: a first element and a stride for each dimension.

    Row-major, rows, every second row, transposed: all are windows.
    """

    offset: int
    stride: Shape

    @staticmethod
    def whole(spec: WeightSpec) -> Window:
        return Window(0, spec.stride if spec.stride is not None else row_major(spec.shape))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A logical tensor and its origin.

    `stored` maps roles to stored tensors: plain weights have one, called "weight"; a quantized one has those of the
    scheme in `decode`. `role`, `block` and `group` are what the family says of it.
    """

    name: str
    dtype: DType
    shape: Shape
    stored: tuple[tuple[str, WeightSpec], ...]
    window: Window | None
    decode: Scheme | None
    role: str
    block: str
    group: str | None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def source_bytes(self) -> int:
        """Bytes that leave storage for this tensor."""
        return sum(spec.size for _, spec in self.stored)


@dataclass(frozen=True, slots=True)
class Sources:
    """A checkpoint's recipes, and what was decided on the way to them."""

    recipes: tuple[Recipe, ...]
    tied: tuple[tuple[str, str], ...]  # (kept, dropped): the engine ties them again when it loads
    notes: tuple[str, ...]


def recipes_of(checkpoint: Checkpoint, *, decode: bool) -> Sources:
    """The logical tensors of a checkpoint, in natural order of their blocks and names.

    With `decode`, tensors that a known scheme quantized become one recipe that decodes them; without, every stored
    tensor is its own, as it is.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts.
    """
    family = checkpoint.family
    by_name = {spec.name: spec for spec in checkpoint.weights}
    tied, notes = _tied(checkpoint, by_name)
    gone = {dropped for _, dropped in tied}
    quantized = quantized_tensors(checkpoint) if decode else {}
    parts = {spec.name for found in quantized.values() for _, spec in found.stored}
    recipes = []
    for name, found in quantized.items():
        traits = family.traits(name, found.shape)
        recipes.append(replace(found, role=traits.role, block=traits.block, group=traits.group))
    for spec in checkpoint.weights:
        if spec.name not in gone and spec.name not in parts:
            traits = family.traits(spec.name, spec.shape)
            recipes.append(
                Recipe(
                    spec.name, spec.dtype, spec.shape, (("weight", spec),), Window.whole(spec), None,
                    traits.role, traits.block, traits.group,
                )
            )  # fmt: skip
    recipes.sort(key=lambda recipe: (natural_key(recipe.block), natural_key(recipe.name)))
    return Sources(tuple(recipes), tied, notes)


def _tied(
    checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Which tensors the engine ties to others, so that they are not written, and what is odd about the rest.

    As transformers does: a tied pair that is stored twice stays tied only if both hold the same bytes.
    """
    tied, notes = [], []
    for kept, dropped in checkpoint.family.tied_pairs(checkpoint.config):
        if kept in by_name and dropped in by_name:
            if _same_bytes(checkpoint.root, by_name[kept], by_name[dropped]):
                tied.append((kept, dropped))
            else:
                notes.append(f"config.json ties {dropped} to {kept}, but their weights differ: both are kept, untied")
    known = {dropped for _, dropped in tied}
    shared = [spec for spec in checkpoint.weights if spec.alias is not None and spec.name not in known]
    pairs = {frozenset(pair) for pair in tied}
    for spec in shared:
        if frozenset((spec.name, spec.alias)) not in pairs:
            notes.append(
                f"{spec.name} shares its bytes with {spec.alias}; config.json does not tie them: both are written"
            )
    return tuple(tied), tuple(notes)


def _same_bytes(root: Path, one: WeightSpec, other: WeightSpec) -> bool:
    if (one.dtype, one.shape, one.stride, one.size) != (other.dtype, other.shape, other.stride, other.size):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with loader("read").open(root, (one, other)) as reader:
        return all(
            np.array_equal(reader.read(one, at, at + n, slot=0), reader.read(other, at, at + n, slot=1))
            for at in range(0, one.size, COMPARE_BYTES)
            for n in (min(COMPARE_BYTES, one.size - at),)
        )


# --- tensors that were quantized before


def quantized_tensors(checkpoint: Checkpoint) -> dict[str, Recipe]:
    """Weights stored by a scheme that can decode them, by name; roles, blocks and groups are still to be filled in."""
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    by_name = {spec.name: spec for spec in checkpoint.weights}
    found = {}
    for name in by_name:
        state = re.match(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$", name)
        if state:
            found[state[1]] = _bnb4_recipe(checkpoint, by_name, state[1], state[2])
        elif method == "bitnet" and name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            found[weight] = _ternary_recipe(checkpoint, by_name, weight)
    return found


def _bnb4_recipe(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], name: str, table: str) -> Recipe:
    spec = by_name[f"{name}.quant_state.bitsandbytes__{table}"]
    with loader("read").open(checkpoint.root, (spec,)) as reader:
        state = read_state(reader.read(spec, 0, spec.size).tobytes(), name)
    packed = _part(by_name, name, name)
    storage = "uint8" if packed.dtype.name == "U8" else packed.dtype.torch
    scheme = Bnb4(state["quant_type"], state["blocksize"], "nested_offset" in state, storage)
    dtype, shape = dtype_named(state["dtype"]), tuple(state["shape"])
    return _decoded(by_name, TensorSpec(name, dtype, shape), scheme)


def _ternary_recipe(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], name: str) -> Recipe:
    packed = _part(by_name, name, name)
    if len(packed.shape) != 2:
        raise BadCheckpoint(f"{name}: expected packed ternary rows, found shape {list(packed.shape)}")
    linear_class = checkpoint.config["quantization_config"].get("linear_class", "bitlinear")
    shape = (packed.shape[0] * 4, packed.shape[1])
    return _decoded(by_name, TensorSpec(name, by_name[name + "_scale"].dtype, shape), Ternary(linear_class))


def _decoded(by_name: Mapping[str, WeightSpec], spec: TensorSpec, scheme: Scheme) -> Recipe:
    stored = []
    for role, wanted in scheme.stored(spec).items():
        part = _part(by_name, spec.name, stored_name(spec.name, role))
        is_fitting = part.size <= wanted.size if wanted.is_bound else part.size == wanted.size
        if part.dtype != wanted.dtype or not is_fitting:
            raise BadCheckpoint(
                f"{part.name}: expected {wanted.dtype} {list(wanted.shape)} for {spec.dtype} {list(spec.shape)},"
                f" found {part.dtype} {list(part.shape)}"
            )
        stored.append((role, part))
    return Recipe(spec.name, spec.dtype, spec.shape, tuple(stored), None, scheme, "", "", None)


def _part(by_name: Mapping[str, WeightSpec], weight: str, name: str) -> WeightSpec:
    if name not in by_name:
        raise BadCheckpoint(f"{weight}: it is quantized, but {name} is missing; fetch the checkpoint again")
    return by_name[name]


def stored_name(weight: str, role: str) -> str:
    """The name of a stored part: roles begin with "weight" and stand in its place. See `Scheme.stored`."""
    return weight.removesuffix("weight") + role if weight.endswith("weight") else weight + role.removeprefix("weight")
