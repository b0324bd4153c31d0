"""The packed container: one file of tensors to be mapped into memory, its manifest, and files of experts by layer.

    model_weights.json          {"tensors": {NAME: {"offset", "size", "shape", "dtype", "bits"}}, ...}
    model_weights.bin           the tensors, each at a multiple of 64, zeros between
    packed_experts/layout.json  {"expert_size", "num_layers", "num_experts", "components": [...], "moe_layers"}
    packed_experts/layer_NN.bin the experts of a layer one after another, each with its components at the same offsets

`bits` is for U32 tensors, whose words hold quantized weights; without it they are 4 bits each. Reading trusts nothing:
every number is checked against the files' real sizes before any weight is read. No path is ever taken from the JSON.

Format: https://github.com/mdegans/moeflux, its weight loader and its export of weights and experts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.containers.base import Checksum, Places
from loaders.dtypes import DType, Shape, dtype_named
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import (
    CONFIG_LAYERS,
    JSON_INDEX,
    MOST_NUMBERS,
    PACKED_EXPERTS,
    check_name,
    check_shape,
    check_tensors,
    read_json_text,
    shown,
)  # fmt: skip
from loaders.specs import OutputFile, Slot, StoredTensor, WeightSpec
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles

MANIFEST, WEIGHTS = "model_weights.json", "model_weights.bin"
EXPERTS = "packed_experts"
EXPERT_LAYOUT = f"{EXPERTS}/layout.json"
ALIGNMENT = 64  # bytes: the engine maps the file and requires tensors to begin at multiples of it
ASSUMED_BITS = 4  # the engine's default where an entry states no bits
BITS = (2, 3, 4, 5, 6, 8)  # those of MLX's affine weights
PARTS = ("gate_proj", "up_proj", "down_proj")
LAYER_FILE = re.compile(r"layer_\d{2,}\.bin")
EXPERT_FILE = re.compile(rf"{EXPERTS}/layer_.*\.bin")
COMPONENT = re.compile(rf"(?:{'|'.join(PARTS)})\.(?:weight|scales|biases)")
NameExpert = Callable[[int, int, str], str]  # layer, expert, component -> the tensor's name


def expert_file(layer: int) -> str:
    """Return the file that holds the experts of a layer."""
    return f"{EXPERTS}/layer_{layer:02d}.bin"


def plain_name(layer: int, expert: int, component: str) -> str:
    """Return the name that most models give to a component of an expert."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{component}"


@dataclass(frozen=True)
class Packed:
    """The contents of a folder. `bits` are the widths of U32 tensors by name, where the JSON states them.

    A component of an expert may leave its width to be worked out from the shapes.
    """

    by_name: Mapping[str, WeightSpec]
    files: tuple[str, ...]
    bits: Mapping[str, int]
    manifest: Mapping[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> WeightSpec:
        return self.by_name[name]


def is_packed(names: Collection[str], *, alone: bool) -> bool:
    """Whether files of these names are a packed checkpoint.

    A manifest without its weights counts as one, to be refused by name, if the folder has no other weights (`alone`).
    """
    return MANIFEST in names and (WEIGHTS in names or alone)


def folder_of(file: Address, find: Callable[[Address, str], bool]) -> Address | None:
    """Return the folder of the packed checkpoint to which a file belongs, by its name and the files around it.

    `find` says whether a folder has a file.
    """
    folder = file.parent
    if file.name == MANIFEST or (file.name == WEIGHTS and find(folder, MANIFEST)):
        return folder
    is_expert = folder.name == EXPERTS and (file.name == "layout.json" or LAYER_FILE.fullmatch(file.name))
    return folder.parent if is_expert and find(folder.parent, MANIFEST) else None


# --- reading


def read(files: PinnedFiles, name_expert: NameExpert = plain_name) -> Packed:
    """Read all tensors of a folder, in the order of their bytes.

    Raises:
        BadCheckpoint: a span leaves its file, is on another, does not fit its shape, ...
    """
    manifest = _json(files, MANIFEST)
    size = _size(files, WEIGHTS, f"the weights of {MANIFEST}")
    found = _tensors(manifest, size)
    bits = {spec.name: count for spec, count in found if count is not None}
    specs, names = [spec for spec, _ in found], [WEIGHTS]
    if files.find(EXPERT_LAYOUT) is not None:
        experts = _ExpertFiles(_json(files, EXPERT_LAYOUT))
        for layer in experts.layers:
            experts.check_size(layer, _size(files, expert_file(layer), f"a layer of {EXPERT_LAYOUT}"))
            names.append(expert_file(layer))
            for name, spec, count in experts.specs(layer, name_expert):
                specs.append(spec)
                bits |= {} if count is None else {name: count}
    elif any(EXPERT_FILE.fullmatch(entry.name) for entry in files.store.list()):
        raise BadCheckpoint(f"{EXPERT_LAYOUT}: missing, though there are layers beside it; fetch the checkpoint again")
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs):
        twice = Counter(spec.name for spec in specs).most_common(1)[0][0]
        raise BadCheckpoint(f"{twice!r} is in {WEIGHTS} and in {EXPERTS}/; one of them is stale")
    return Packed(by_name, tuple(names), bits, manifest)


def read_specs(files: PinnedFiles, file: str) -> tuple[WeightSpec, ...]:
    """Read the tensors of one file. Raises BadCheckpoint as `read` does."""
    return tuple(spec for spec in read(files).by_name.values() if spec.file == file)


def _size(files: PinnedFiles, file: str, what: str) -> int:
    """Return a file's size in bytes; `what` says in the message what was expected if it is missing."""
    entry = files.find(file)
    if entry is None:
        raise BadCheckpoint(f"{file}: missing; expected {what}; fetch the checkpoint again")
    return entry.size


def _json(files: PinnedFiles, file: str) -> dict[str, Any]:
    _size(files, file, "a JSON file")
    raw = files.read_all(file, JSON_INDEX)
    try:
        found = read_json_text(raw, twice=False)
    except ValueError as error:
        raise BadCheckpoint(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def _tensors(manifest: Mapping[str, Any], file_size: int) -> list[tuple[WeightSpec, int | None]]:
    """Check the manifest's tensors; return them with their bits, None for dtypes that are not packed words."""
    entries = manifest.get("tensors")
    if not isinstance(entries, dict):
        raise BadCheckpoint(f"{MANIFEST}: expected tensors, an object of entries by name; fetch it again")
    count = manifest.get("num_tensors", len(entries))
    if count != len(entries):
        raise BadCheckpoint(f"{MANIFEST}: it says num_tensors {shown(count)} and lists {len(entries)}; fetch it again")
    check_tensors(len(entries), MANIFEST)
    found = []
    for name, entry in entries.items():
        try:
            check_name(name)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{MANIFEST}: {error}") from None
        dtype, shape, offset, size = _entry(f"{MANIFEST}: {name!r}", entry)
        if offset % ALIGNMENT:
            raise BadCheckpoint(f"{MANIFEST}: {name!r} begins at byte {offset}, which is no multiple of {ALIGNMENT}")
        bits = None
        if dtype.name == "U32":
            bits = _bits(f"{MANIFEST}: {name!r}", entry.get("bits", ASSUMED_BITS))
        found.append((WeightSpec(name=name, dtype=dtype, shape=shape, file=WEIGHTS, offset=offset, size=size), bits))
    found.sort(key=lambda each: (each[0].offset, each[0].size))
    _check_spans([spec for spec, _ in found], file_size, f"{MANIFEST}:", f"the file's {file_size}")
    return found


def _check_spans(specs: Iterable[WeightSpec], size: int, where: str, what: str) -> None:
    """Check that tensors, sorted by offset, stay within `size` bytes and do not overlap."""
    end, before = 0, ""
    for spec in specs:
        if spec.offset + spec.size > size:
            raise BadCheckpoint(
                f"{where} {spec.name!r} spans bytes [{spec.offset}, {spec.offset + spec.size}) of {what}; truncated?"
                " fetch it again"
            )
        if spec.offset < end:
            raise BadCheckpoint(f"{where} {spec.name!r} begins at byte {spec.offset}, within {before!r}")
        end, before = max(end, spec.offset + spec.size), spec.name


def _entry(where: str, entry: Any) -> tuple[DType, Shape, int, int]:
    """Check one entry of a JSON file; return its dtype, shape, offset and size."""
    try:
        dtype, shape, offset, size = dtype_named(entry["dtype"]), entry["shape"], entry["offset"], entry["size"]
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{where}: {error}") from None
    except (TypeError, KeyError, AttributeError, IndexError):
        raise BadCheckpoint(f"{where} lacks offset, size, shape or dtype: {shown(entry)}") from None
    if dtype.block > 1:
        raise BadCheckpoint(f"{where} is {dtype}, which is no dtype of this container")
    if not all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in (offset, size)):
        raise BadCheckpoint(f"{where}: offset {shown(offset)} and size {shown(size)} must be whole numbers from 0")
    try:
        checked = check_shape(shape)
        wanted = dtype.size(checked)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{where}: {error}") from None
    if size != wanted:
        raise BadCheckpoint(f"{where}: {dtype} {shown(shape)} takes {wanted} bytes, it says {size}")
    return dtype, checked, offset, size


def _bits(where: str, bits: Any) -> int:
    if type(bits) is not int or bits not in BITS:
        raise BadCheckpoint(f"{where}: bits is {shown(bits)}, known are {', '.join(map(str, BITS))}")
    return bits


class _ExpertFiles:
    """The contents of layout.json, checked except for the sizes of the layers' files (see `check_size`)."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._size, self._count = (self._number(document, key, 1) for key in ("expert_size", "num_experts"))
        num_layers = self._number(document, "num_layers", 0)
        layers = document.get("moe_layers", list(range(min(num_layers, CONFIG_LAYERS))))
        is_list = isinstance(layers, list) and all(type(n) is int and 0 <= n < num_layers for n in layers)
        if not is_list or len(set(layers)) < len(layers):
            raise BadCheckpoint(
                f"{EXPERT_LAYOUT}: moe_layers {shown(layers)} must be different whole numbers below num_layers"
            )
        self.layers: list[int] = sorted(layers)
        self._components = self._read(document.get("components"))
        if self._count > PACKED_EXPERTS:
            raise BadCheckpoint(f"{EXPERT_LAYOUT}: num_experts is {self._count}, at most {PACKED_EXPERTS} are read")
        check_tensors(len(self.layers) * self._count * len(self._components), EXPERT_LAYOUT)

    def _number(self, document: Mapping[str, Any], key: str, least: int) -> int:
        number = document.get(key)
        if type(number) is not int or number < least:
            raise BadCheckpoint(f"{EXPERT_LAYOUT}: {key} is {shown(number)}; expected a whole number from {least}")
        return number

    def _read(self, components: Any) -> list[tuple[WeightSpec, int | None]]:
        if not isinstance(components, list) or not components:
            raise BadCheckpoint(f"{EXPERT_LAYOUT}: expected components, a list of what an expert holds")
        found = []
        for entry in components:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not COMPONENT.fullmatch(name):
                raise BadCheckpoint(
                    f"{EXPERT_LAYOUT}: a component is called {shown(name)}; known are {', '.join(PARTS)} with .weight,"
                    " .scales and .biases"
                )
            dtype, shape, offset, size = _entry(f"{EXPERT_LAYOUT}: {name!r}", entry)
            bits = _bits(f"{EXPERT_LAYOUT}: {name!r}", entry["bits"]) if "bits" in entry else None
            found.append((WeightSpec(name=name, dtype=dtype, shape=shape, file="", offset=offset, size=size), bits))
        if len({spec.name for spec, _ in found}) < len(found):
            raise BadCheckpoint(f"{EXPERT_LAYOUT}: a component appears twice")
        found.sort(key=lambda each: (each[0].offset, each[0].size))
        specs = [spec for spec, _ in found]
        _check_spans(specs, self._size, f"{EXPERT_LAYOUT}:", f"an expert's {self._size}")
        return found

    def check_size(self, layer: int, size: int) -> None:
        if size != self._count * self._size:
            raise BadCheckpoint(
                f"{expert_file(layer)}: {size} bytes; {EXPERT_LAYOUT} says {self._count} experts of {self._size};"
                " truncated? fetch it again"
            )

    def specs(self, layer: int, name_expert: NameExpert) -> Iterable[tuple[str, WeightSpec, int | None]]:
        file = expert_file(layer)
        for expert in range(self._count):
            for spec, bits in self._components:
                name, at = name_expert(layer, expert, spec.name), expert * self._size + spec.offset
                yield (
                    name,
                    WeightSpec(name=name, dtype=spec.dtype, shape=spec.shape, file=file, offset=at, size=spec.size),
                    bits,
                )


# --- writing


def lay_out(file: str, tensors: Iterable[StoredTensor], about: Any = None) -> OutputFile:
    """Give every tensor its place: by name, each aligned; or at the place that it asks for.

    Raises:
        BadSpec: the container has no such dtype.
    """
    slots, end = [], 0
    for tensor in sorted(tensors, key=lambda each: (each.place or ("", 0), each.name)):
        spec = tensor.spec
        if spec.dtype.block > 1 or spec.is_bound or tensor.whole is not None:
            raise BadSpec(f"{setting('container')}: {tensor.name} would be {spec.dtype}, which packed cannot hold")
        at = end if tensor.place is None else tensor.place[1]
        assert at >= end, (tensor.name, at, end)
        slots.append(Slot(name=tensor.name, dtype=spec.dtype, shape=spec.shape, offset=at))
        end = at + spec.size if tensor.place is not None else -(-(at + spec.size) // ALIGNMENT) * ALIGNMENT
    return OutputFile(name=file, header_bytes=0, data_bytes=end, slots=tuple(slots), container="packed", about=about)


def place(file: OutputFile, lengths: Mapping[str, int]) -> Places:
    """Return the places of the tensors, which are those that were planned."""
    return {slot.name: (slot.offset, slot.size) for slot in file.slots}


def frame(file: OutputFile, places: Places, checksum: Checksum) -> list[tuple[int, bytes]]:
    """Return the zeros between the tensors."""
    gaps, end = [], 0
    for at, size in sorted(places.values()):
        gaps += [(end, bytes(at - end))] if at > end else []
        end = at + size
    return [*gaps, (end, bytes(file.data_bytes - end))]


def manifest(model: str, config: Any, slots: Iterable[Slot], bits: Mapping[str, int]) -> dict[str, Any]:
    """Return the document of model_weights.json for tensors at their places in the file."""
    entries = {slot.name: _described(slot, slot.offset, bits.get(slot.name)) for slot in slots}
    return {"model": model, "num_tensors": len(entries), "tensors": dict(sorted(entries.items())), "config": config}


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a document as it is written."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _described(slot: Slot, offset: int, bits: int | None) -> dict[str, Any]:
    entry = {"offset": offset, "size": slot.size, "shape": list(slot.shape), "dtype": slot.dtype.name}
    return entry if bits is None else {**entry, "bits": bits}


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The layout of packed_experts/: an expert's size, and its components with their places and bits."""

    size: int
    num_experts: int
    components: tuple[tuple[Slot, int | None], ...]
    layers: tuple[int, ...]

    def document(self, num_layers: int) -> dict[str, Any]:
        """Return the document of layout.json. Bits are stated only where they differ from ASSUMED_BITS."""
        components = [
            {
                "name": slot.name,
                **_described(slot, slot.offset, None if bits == ASSUMED_BITS else bits),
            }
            for slot, bits in self.components
        ]
        return {
            "expert_size": self.size,
            "num_layers": num_layers,
            "num_experts": self.num_experts,
            "components": components,
            "moe_layers": list(self.layers),
        }
