"""A checkpoint: a folder with weight files, an optional index, and auxiliary files (config, tokenizer, code).

Opening a checkpoint reads headers only (and tensors that two files hold), and checks everything that headers tell: all
indexed files and tensors exist, no tensor exists twice, no path leaves the folder. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loaders.architectures.family import Family, family_of
from loaders.architectures.mlx import keeps_published_tensors, model_of
from loaders.checkpoints import pipeline
from loaders.checkpoints.aux_files import INDEX_SUFFIX, aux_notes, check_links, find_aux, is_weights
from loaders.checkpoints.config_types import check_config
from loaders.checkpoints.derived_config import gguf_config, packed_checkpoint, read_config
from loaders.checkpoints.quantized_by import METHOD_FILES, Declaration, declaration
from loaders.checkpoints.tensor_names import adapter_notes, is_adapter, single, unwrapped
from loaders.checkpoints.weight_files import adapter_alone, choose, some
from loaders.containers import CONTAINERS, pytorch, safetensors
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import JSON_CONFIG, MOST_FILES, MOST_FOLDERS, shown
from loaders.specs import WeightSpec
from loaders.storage import open_source, open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles, Store
from loaders.storage.hashes import text_digest
from loaders.storage.json_files import read_json
from loaders.storage.lone_file import LoneFile
from loaders.storage.within import Within

READS_FOLDERS = "the engine reads files of a folder"
# Files whose headers are read at once. A header is a few small reads, so on a network or an object store the time is
# all latency, which threads overlap; on a local disk more threads gain nothing.
HEADER_THREADS = 8
Headers = Mapping[str, tuple[WeightSpec, ...]]  # tensors in the order of their bytes, by file
NO_HEADERS: Headers = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: its files, the headers of its tensors, its config. No weights are in memory.

    `files` are the weight files, `aux` the names of the auxiliary ones; `notes` are sentences for the user about files
    that were found but not read. `components` are the checkpoints in the sub-folders of a pipeline of diffusers, by
    folder, in the order of its model_index.json, which is its `config`; see `pipeline`.
    """

    source: PinnedFiles
    container: str
    files: tuple[Entry, ...]
    weights: tuple[WeightSpec, ...]
    config: Mapping[str, Any]
    aux: tuple[str, ...]
    notes: tuple[str, ...] = ()
    components: Mapping[str, Checkpoint] = field(default_factory=dict)
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        # A frozen dataclass has no other way to set it.
        object.__setattr__(self, "family", family_of(self.config))

    @property
    def address(self) -> Address:
        """The address of the checkpoint's folder, or of what stands for one in another store."""
        return self.source.address

    def folder(self, why: str) -> Path:
        """Return the local folder, for engines that read folders themselves; of a lone file, one of links to it.

        Raises:
            BadSpec: the checkpoint is not on this machine; `why` begins the message and says who needs a folder.
        """
        if isinstance(self.source.store, LoneFile) and self.source.store.is_local:
            return Path(self._alone.name)
        return self.source.path("", why)

    @cached_property
    def _alone(self) -> tempfile.TemporaryDirectory[str]:
        assert isinstance(self.source.store, LoneFile)
        return self.source.store.alone()

    @cached_property
    def declaration(self) -> Declaration | None:
        """What says that the weights are quantized; None for plain weights.

        Raises:
            BadCheckpoint: a file that should describe it holds no JSON object.
        """
        if self.components:
            return next((each.declaration for each in self.components.values() if each.declaration is not None), None)
        found = declaration(self.container, self.config, self.weights, self.aux, self._described)
        model = model_of(self.config)
        if found is None and self.container == "safetensors" and (model is None or not keeps_published_tensors(model)):
            # mlx-lm gives weights names and values of its own even where it does not quantize them.
            first = self.files[0].name
            if safetensors.read_metadata(self.source, first).get("format") == "mlx":
                return Declaration("mlx", f"the metadata of {first}")
        return found

    def _described(self, name: str) -> dict[str, Any]:
        """Read a file that describes a quantization."""
        found = read_json(self.source, name, JSON_CONFIG)
        check_config(found, name)
        return found

    @property
    def quantized_by(self) -> str | None:
        """The method that the weights were quantized by; None for plain weights."""
        return None if self.declaration is None else self.declaration.method

    @property
    def fingerprint(self) -> str:
        """A digest, 32 hex digits, of what the headers say about the weights; the same wherever the folder is moved."""
        sizes = [(tag.name, tag.size) for tag in self.files]
        specs = [(w.name, w.dtype.name, w.shape, w.file, w.offset, w.size, w.stride) for w in self.weights]
        return text_digest(json.dumps([sizes, specs]))

    @property
    def made_of(self) -> tuple[Entry, ...]:
        """The files that an output is made of: weights, their indexes, and auxiliary files."""
        pinned = self.source.entries
        indexes = (name for name in pinned if name.endswith(INDEX_SUFFIX) and is_weights(name))
        names = dict.fromkeys([*(entry.name for entry in self.files), *self.aux, *indexes])
        return tuple(self.source.entry(name) for name in names)

    def check_unchanged(self) -> None:
        """Look once more at all files that an output is made of.

        Raises:
            BadCheckpoint: one is another version than the one that was opened.
            StorageError: one is gone.
        """
        self.source.look_again(entry.name for entry in self.made_of)

    @property
    def size(self) -> int:
        """The bytes of all stored tensors. Tensors that share their bytes count once."""
        return sum(spec.size for spec in self.weights if spec.alias is None)


def open_checkpoint(
    where: str | os.PathLike[str] | Address | Store,
    container: str = "auto",
    key: str | None = None,
    headers: Headers = NO_HEADERS,
) -> Checkpoint:
    """Open a checkpoint in a folder or another store, or one weight file there, reading headers only.

    `container` is a name in CONTAINERS, or "auto" for the first that is found; `key` is what messages call `where`.
    `headers` are the tensors of files that were just written, which then are not read.

    Raises:
        BadSpec: the folder does not exist, or holds no weights of the container.
        BadCheckpoint: the checkpoint is damaged, incomplete or hostile.
    """
    store = open_source(where) if isinstance(where, str | os.PathLike | Address) else where
    key = key or setting("checkpoint")
    if (found := store.absence()) is not None:
        raise BadSpec(f"{key}: expected a folder of weights at {store.address}, found {found}")
    everything = store.list()
    _check_listed(store, everything)
    links = check_links(store, everything)
    if (model_index := pipeline.read_model_index(store, everything)) is not None:
        return _open_pipeline(store, everything, container, key, model_index, headers)
    source = PinnedFiles(store, [entry for entry in everything if "/" not in entry.name])
    chosen = choose(source, everything, container, key)
    if chosen.container == "packed":
        names, weights, config = packed_checkpoint(source)
        notes = list[str]()
    else:
        names = list(chosen.files)
        weights, notes = _tensors(source, chosen.container, names, chosen.index, headers)
        config = gguf_config(source, names, weights) if chosen.container == "gguf" else read_config(source)
    if not weights:
        raise BadCheckpoint(f"{store.address}: its weight files hold no tensors")
    if is_adapter(weights):
        raise BadSpec(adapter_alone(source, key))
    files = tuple(source.entry(name) for name in names)
    aux = find_aux(everything)
    copied = {*aux}
    source.pin(entry for entry in everything if entry.name in copied)
    return Checkpoint(
        source=source,
        container=chosen.container,
        files=files,
        weights=weights,
        config=config,
        aux=aux,
        notes=(*chosen.notes, *notes, *links, *aux_notes(everything)),
    )


def _check_listed(store: Store, everything: Sequence[Entry]) -> None:
    """Raise BadCheckpoint if a folder holds more than any model has."""
    if len(everything) > MOST_FILES:
        raise BadCheckpoint(
            f"{store.address}: {len(everything)} files, at most {MOST_FILES} are looked through; give the folder that"
            " has nothing but the model"
        )
    deepest = max((entry.name for entry in everything), key=lambda name: name.count("/"), default="")
    if deepest.count("/") > MOST_FOLDERS:
        raise BadCheckpoint(
            f"{store.address}: {shown(deepest)} lies {deepest.count('/')} folders deep, at most {MOST_FOLDERS} are"
            " looked through; move it away"
        )


def _open_pipeline(
    store: Store, everything: Sequence[Entry], container: str, key: str, model_index: dict[str, Any], headers: Headers
) -> Checkpoint:
    """Open a pipeline of diffusers. Errors as `open_checkpoint`."""
    parts = {
        part: open_checkpoint(Within(store, part), container, f"{key}, component {part}", _headers_of(part, headers))
        for part in pipeline.parts_of(model_index, everything, store.address)
    }
    source = PinnedFiles(store, everything)
    files = [replace(tag, name=f"{part}/{tag.name}") for part, each in parts.items() for tag in each.files]
    containers = {each.container for each in parts.values()}
    if others := containers - set(pipeline.CONTAINERS):
        part = next(part for part, each in parts.items() if each.container in others)
        raise BadSpec(
            f"{key}: component {part} of {store.address} is {parts[part].container}, which is not read in a pipeline;"
            f" put the weights there as {' or '.join(pipeline.CONTAINERS)}"
        )
    return Checkpoint(
        source=source,
        # Where components differ, each was read by its own; the name stands for the pipeline in what is shown.
        container=containers.pop() if len(containers) == 1 else "safetensors",
        files=tuple(source.entry(tag.name) for tag in files),
        weights=tuple(pipeline.within(part, spec) for part, each in parts.items() for spec in each.weights),
        config=model_index,
        aux=find_aux(everything),
        notes=(
            *(f"{part}: {note}" for part, each in parts.items() for note in each.notes),
            *pipeline.passed_over(everything, tuple(parts)),
            *aux_notes(everything),
        ),
        components=parts,
    )


def _headers_of(part: str, headers: Headers) -> Headers:
    """Return the headers of a component's files, by their names in its folder."""
    return {name.removeprefix(f"{part}/"): found for name, found in headers.items() if name.startswith(f"{part}/")}


def _tensors(
    source: PinnedFiles,
    container: str,
    names: Sequence[str],
    index: Mapping[str, str] | None,
    headers: Headers = NO_HEADERS,
) -> tuple[tuple[WeightSpec, ...], list[str]]:
    """Read the headers of weight files that are not known; returns their tensors and notes about them."""
    said = list[str]()

    def read(name: str) -> tuple[WeightSpec, ...]:
        if name in headers:
            return headers[name]
        if container != "pytorch":
            return CONTAINERS[container].read_specs(source, name)
        state = pytorch.read_state(source, name)
        if state.keys:
            beside = f"; beside it, and not read: {some(state.beside)}" if state.beside else ""
            said.append(f"{name}: the model is what it holds under {'.'.join(state.keys)}{beside}")
        return state.specs

    if source.store.is_local and len(names) <= HEADER_THREADS:
        found = [spec for name in names for spec in read(name)]
    else:
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            found = [spec for specs in pool.map(read, names) for spec in specs]
    weights, notes = single(source, found, index)
    # A GGUF's names are llama.cpp's own, whatever the training's were.
    if container != "gguf":
        weights, renamed = unwrapped(weights)
        notes += [*renamed, *adapter_notes(weights)]
    return weights, [*sorted(said), *notes]


def open_file(where: str | os.PathLike[str] | Address, container: str) -> Checkpoint:
    """Open one weight file as a checkpoint, with the config.json of its folder if there is one.

    Raises:
        BadCheckpoint: the file is damaged, or holds no tensors.
    """
    address = Address.of(where)
    source, name = PinnedFiles(open_store(address.parent)), address.name
    weights, notes = _tensors(source, container, [name], None)
    if not weights:
        raise BadCheckpoint(f"{address}: it holds no tensors")
    config = gguf_config(source, [name], weights) if container == "gguf" else read_config(source)
    described = tuple(each for each in METHOD_FILES if source.find(each) is not None)
    return Checkpoint(
        source=source,
        container=container,
        files=(source.entry(name),),
        weights=weights,
        config=config,
        aux=described,
        notes=tuple(notes),
    )
