"""`save`: tensors and quantized tensors in memory as a folder that an engine loads, published whole or not at all."""

from __future__ import annotations

import os
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import CONTAINERS
from loaders.dtypes import row_major
from loaders.errors import BadSpec
from loaders.layouts import BY_ENGINE, LAYOUTS, WHOLE_STACKS, Forming, Layout, Placed
from loaders.layouts.hf import config_json
from loaders.layouts.hqq import HqqLayout
from loaders.loading.encode import WantedTensor, make
from loaders.loading.in_memory import HeldTensor, MemoryLoader, check_known_to_mlx, model_config
from loaders.loading.quantized_tensor import QuantizedTensor, QuantizedWeights
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule
from loaders.specs import OutputFile, StoredSpec, StoredTensor
from loaders.storage import destination_at, open_store
from loaders.storage.address import Address
from loaders.storage.base import Destination
from loaders.storage.hashes import BLOCK
from loaders.storage.json_files import json_bytes
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import tensors_of

QUANTIZED = Rule(action="quantize", why="it is quantized")
KEPT = Rule(action="keep", why="it is not quantized")


def save(weights: Mapping[str, Any], path: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None) -> None:
    """Write tensors and `QuantizedTensor`s by name, such as `quantize` gives, to a new folder.

    It is what a job writes by default: bitsandbytes, BitNet and compressed-tensors as transformers (and vLLM) load
    them, MLX as mlx-lm does, in model.safetensors; HQQ as hqq does, in qmodel.pt (transformers 5 loads no HQQ). Beside
    it is config.json: the model's `config` with the quantization that the engine must know of. The config is that of
    config.json, or transformers' object for it; None is the one that was given to `quantize`. Without any, config.json
    has the quantization alone, which no engine loads as a model, and MLX is refused. Tokenizers and other files are the
    caller's. Of tied tensors one is written.

    The tensors are written as they lie in memory, one after another; the folder appears when all of it is on the disk.
    What the engine will not do with it, such as experts that hqq does not find, is a `UserWarning`.

    Raises:
        BadSpec: the path exists, these are no tensors by name, or a tensor cannot be saved so: GGUF's types, those of
            two engines in one folder, what the engine could not load.
        StorageError: it cannot be written.
    """
    address = _new_folder(path)
    layout = _layout_of(weights)
    if config is None and isinstance(weights, QuantizedWeights):
        config = weights.config
    model = model_config(config)
    if layout.name == "mlx":
        check_known_to_mlx(model)
    saved = Saved(weights, layout, model)
    for said in saved.warnings:
        warnings.warn(said, stacklevel=2)
    destination = destination_at(address, uuid.uuid4().hex[:12])
    destination.prepare(overwrite=False)
    try:
        with destination.claim():
            saved.write(destination)
            destination.publish(overwrite=False)
    finally:
        destination.forget()


def _new_folder(path: str | os.PathLike[str]) -> Address:
    address = Address.of(path)
    if not address.is_local:
        raise BadSpec(f"path: {address}: expected a folder of this machine; a job writes to {address.scheme}://")
    if open_store(address := Address(os.path.abspath(address.path))).is_taken():
        raise BadSpec(f"path: expected a new folder, found {address}; choose another, or remove it")
    return address


def _layout_of(weights: Mapping[str, Any]) -> Layout:
    """Return the layout in which the quantized tensors are saved, that of transformers without any.

    Raises:
        BadSpec: they are of several engines, or of one whose files are not made so; both are named.
    """
    if not isinstance(weights, Mapping):
        raise BadSpec(
            f"weights: expected tensors by name, found {type(weights).__name__};"
            " save({'model.layers.0.mlp.up_proj.weight': tensor}, ...) saves one"
        )
    if not weights:
        raise BadSpec("weights: expected some, found an empty mapping")
    first = {each.scheme.engine: name for name, each in weights.items() if isinstance(each, QuantizedTensor)}
    if len(first) > 1:
        said = ", ".join(f"{name} for {engine}" for engine, name in first.items())
        raise BadSpec(f"weights: expected tensors of one engine, found {said}; save them apart")
    [(engine, name)] = first.items() or [("plain", "")]
    found = LAYOUTS[BY_ENGINE[engine]]
    if found.name == "gguf":
        raise BadSpec(
            f"{name}: a tensor of llama.cpp's types is saved in a GGUF, whose names and settings are made of a whole"
            " checkpoint; a job writes it: weightmill.run(model=..., quant='gguf_...')"
        )
    return found


class DescribedTensor(HeldTensor):
    """A quantized tensor in a checkpoint of tensors in memory: known by what it was, read as it is decoded."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, row_major(tensor.shape)
        self._quantized = tensor

    @property
    def size(self) -> int:
        return self._quantized.spec.size

    @property
    def key(self) -> tuple[Any, ...]:
        return (id(self._quantized),)

    def read(self, start: int, stop: int) -> np.ndarray:
        import torch

        item = self.dtype.item_bytes
        found = self._quantized.to("cpu").dequantize_range(start // item, stop // item)
        return np.asarray(found.view(torch.uint8).numpy())


def _held(name: str, tensor: Any) -> HeldTensor:
    return DescribedTensor(tensor) if isinstance(tensor, QuantizedTensor) else HeldTensor(name, tensor)


@dataclass(frozen=True, slots=True)
class Part:
    """What a tensor of the file is made of: a role of a placed tensor, at a byte of it."""

    placed: Placed
    role: str
    offset: int


class Saved:
    """Weights as a layout places them in one file."""

    def __init__(self, weights: Mapping[str, Any], layout: Layout, config: Mapping[str, Any]) -> None:
        self._weights = weights
        self._layout = layout
        self._memory = MemoryLoader(weights, _held)
        self._checkpoint: Checkpoint = self._memory.checkpoint(config)
        engines = {each.scheme.engine for each in weights.values() if isinstance(each, QuantizedTensor)}
        sources = tensors_of(self._checkpoint, decode=False, split=not engines <= {*WHOLE_STACKS}, check=False)
        tensors: Sequence[LogicalTensor] = sources.tensors
        dropping: Sequence[Rule] = ()
        if isinstance(layout, Forming):
            tensors = layout.formed(self._checkpoint, tensors)
            dropping = layout.left_out(self._checkpoint)
        self._decisions = [self._decision(tensor, dropping) for tensor in tensors]
        self._placed = layout.place(self._checkpoint, self._decisions)
        self.warnings = layout.warnings(self._decisions)  # what the engine will not do
        self._parts: dict[str, list[Part]] = {}
        stored = [self._stored(placed, role) for placed in self._placed for role in placed.stored]
        # hqq's file is described as a whole, other layouts' are described one by one.
        about: Any = (
            layout.modules(self._checkpoint, self._placed)
            if isinstance(layout, HqqLayout)
            else layout.about(self._checkpoint, self._placed)
        )
        self._container = CONTAINERS[layout.containers[0]]
        self._file: OutputFile = self._container.lay_out(layout.file or self._container.single, stored, about)

    def _given(self, tensor: LogicalTensor) -> Any:
        """Return the tensor that a logical one is made of."""
        spec = tensor.stored[0][1]
        return self._weights[spec.own_name or spec.name]

    def _decision(self, tensor: LogicalTensor, dropping: Sequence[Rule]) -> Decision:
        dropped = next((rule for rule in dropping if rule.matches(tensor)), None)
        if dropped is not None:
            return Decision(tensor, dropped, None)
        given = self._given(tensor)
        if not isinstance(given, QuantizedTensor):
            return Decision(tensor, KEPT, Encoding(tensor=tensor, action="keep", scheme=Plain()))
        if tensor.shape != given.shape or tensor.name != tensor.stored[0][1].name:
            raise BadSpec(
                f"{given.name}: {self._layout.name} holds it in another form, as {tensor.name} {list(tensor.shape)},"
                " which is not made of codes; a job writes it: weightmill.run(...)"
            )
        return Decision(tensor, QUANTIZED, Encoding(tensor=tensor, action="quantize", scheme=given.scheme))

    def _stored(self, placed: Placed, role: str) -> StoredTensor:
        """Return a stored tensor of the file, as long as it is, and remember what it is made of."""
        stored, given = placed.stored[role], self._given(placed.tensor)
        self._parts.setdefault(stored.name, []).append(Part(placed, role, stored.offset))
        if not isinstance(given, QuantizedTensor):
            return stored
        if given.stored[role] != stored.spec:
            raise BadSpec(
                f"{given.name}: expected {stored.name} to be {stored.spec.dtype} {list(stored.spec.shape)} for this"
                f" config, found {given.stored[role].dtype} {list(given.stored[role].shape)}; quantize it with the same"
                " config"
            )
        if stored.spec.is_bound:  # its length is known by now
            return replace(stored, spec=StoredSpec(stored.spec.dtype, (given.parts[role].size,)))
        return stored

    def write(self, destination: Destination) -> None:
        """Write all files; config.json, without which nobody takes the folder for a model, is the last."""
        file, layout = self._file, self._layout
        destination.join(f"files/{file.name}", self._chunks(), file.size)
        parameters = sum(decision.tensor.spec.numel for decision in self._decisions)
        index = layout.index([file], file.tensor_bytes, parameters)
        if index is not None:
            destination.stage(f"{file.name}.index.json", json_bytes(index))
        config = layout.config(self._checkpoint, self._decisions, None)
        quantizes = any(decision.action == "quantize" for decision in self._decisions)
        if config is None and quantizes and not isinstance(layout, HqqLayout):  # whose qmodel.pt says it
            config = config_json({}, self._decisions, self._checkpoint.family, None)
        if config is not None:
            destination.stage("config.json", json_bytes(config))

    def _chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the weight file: those of its container, and between them the tensors."""
        places = self._container.place(self._file, {})
        starts = {start: name for name, (start, size) in places.items() if size}

        def checksum(offset: int, size: int) -> int:
            crc = 0
            for block in self._blocks(starts[offset]) if size else ():
                crc = zlib.crc32(block, crc)
            return crc

        frame = dict(self._container.frame(self._file, places, checksum))
        for offset in sorted({*frame, *starts}):
            yield from (frame[offset],) if offset in frame else self._blocks(starts[offset])

    def _blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor of the file."""
        for part in sorted(self._parts[name], key=lambda part: part.offset):
            raw = self._bytes(part)
            for at in range(0, raw.size, BLOCK):
                yield raw[at : at + BLOCK].tobytes()

    def _bytes(self, part: Part) -> np.ndarray:
        given = self._given(part.placed.tensor)
        if isinstance(given, QuantizedTensor):
            return np.ascontiguousarray(given.parts[part.role]).reshape(-1).view(np.uint8)
        tensor = part.placed.tensor
        wanted = WantedTensor(tensor=tensor, dtype=tensor.dtype, encoding=part.placed.encoding)
        made = make(self._checkpoint.source, [wanted], self._memory, "cpu", measured=False)
        return made.parts[tensor.name][part.role].reshape(-1).view(np.uint8)
