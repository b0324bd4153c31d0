"""A checkpoint: a folder with weight files, an optional index, and auxiliary files (config, tokenizer, code).

Opening a checkpoint reads headers only, and checks everything that headers tell: all indexed files and tensors exist,
no tensor exists twice, no path leaves the folder. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from loaders.architectures.families import Family, family_of
from loaders.architectures.mlx import model_of
from loaders.checkpoints.aux_files import INDEX_SUFFIX, WEIGHT_SUFFIXES, find_aux
from loaders.checkpoints.derived_config import gguf_config, packed_checkpoint, read_config
from loaders.checkpoints.quantized_by import METHOD_FILES, Declaration, declaration
from loaders.containers import CONTAINERS, packed, safetensors
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.specs import WeightSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles, Store
from loaders.storage.hashes import text_digest
from loaders.storage.json_files import INDEX_LIMIT, read_json

DESCRIPTION_LIMIT = 64 << 20  # the most bytes of a file that describes a quantization
READS_FOLDERS = "the engine reads files of a folder"
# Files whose headers are read at once. A header is a few small reads, so on a network or an object store the time is
# all latency, which threads overlap; on a local disk more threads gain nothing.
HEADER_THREADS = 8
ENDINGS = "|".join(re.escape(suffix) for container in CONTAINERS.values() for suffix in container.suffixes)
SHARD = re.compile(rf"^(?P<stem>.*)-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})(?:{ENDINGS})$")
# Files that training runs leave beside the weights: pickles with the suffixes of weights, but of other things.
TRAINING = re.compile(r"^(?:training_args|optimizer|scheduler|rng_state.*|scaler|trainer_state)\.(?:bin|pt|pth)$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: its files, the headers of its tensors, its config. No weights are in memory.

    `files` are the weight files, `aux` the names of the auxiliary ones; `notes` are sentences for the user about files
    that were found but not read.
    """

    source: PinnedFiles
    container: str
    files: tuple[Entry, ...]
    weights: tuple[WeightSpec, ...]
    config: Mapping[str, Any]
    aux: tuple[str, ...]
    notes: tuple[str, ...] = ()
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        # A frozen dataclass has no other way to set it.
        object.__setattr__(self, "family", family_of(self.config))

    @property
    def address(self) -> Address:
        """The address of the checkpoint's folder, or of what stands for one in another store."""
        return self.source.address

    def folder(self, why: str) -> Path:
        """Return the local folder, for engines that read folders themselves.

        Raises:
            BadSpec: the checkpoint is not on this machine; `why` begins the message and says who needs a folder.
        """
        return self.source.path("", why)

    @cached_property
    def declaration(self) -> Declaration | None:
        """What says that the weights are quantized; None for plain weights.

        Raises:
            BadCheckpoint: a file that should describe it holds no JSON object.
        """
        read = lambda name: read_json(self.source, name, DESCRIPTION_LIMIT)  # noqa: E731
        found = declaration(self.container, self.config, self.weights, self.aux, read)
        if found is None and self.container == "safetensors" and model_of(self.config) is None:
            # mlx-lm gives weights names and norms of its own even where it does not quantize them; of the models that
            # are known here, none changes so.
            first = self.files[0].name
            if safetensors.read_metadata(self.source, first).get("format") == "mlx":
                return Declaration("mlx", f"the metadata of {first}")
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
    def size(self) -> int:
        """The bytes of all stored tensors. Tensors that share their bytes count once."""
        return sum(spec.size for spec in self.weights if spec.alias is None)


def open_checkpoint(
    where: str | os.PathLike[str] | Address | Store, container: str = "auto", key: str | None = None
) -> Checkpoint:
    """Open a checkpoint in a folder or another store, reading headers only.

    `container` is a name in CONTAINERS, or "auto" for the first that is found; `key` is what messages call `where`.

    Raises:
        BadSpec: the folder does not exist, or holds no weights of the container.
        BadCheckpoint: the checkpoint is damaged, incomplete or hostile.
    """
    store = open_store(where) if isinstance(where, str | os.PathLike | Address) else where
    key = key or setting("checkpoint")
    if (found := store.absence()) is not None:
        raise BadSpec(f"{key}: expected a folder of weights at {store.address}, found {found}")
    source = PinnedFiles(store, store.list(deep=False))
    container, names, index, notes = _find(source, container, key)
    if container == "packed":
        names, weights, config = packed_checkpoint(source)
    else:
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            read = list(pool.map(lambda name: CONTAINERS[container].read_specs(source, name), names))
        weights = tuple(spec for specs in read for spec in specs)
        _check_names(weights, index)
        config = gguf_config(source, names, weights) if container == "gguf" else read_config(source)
    if not weights:
        raise BadCheckpoint(f"{store.address}: its weight files hold no tensors")
    files = tuple(source.entry(name) for name in names)
    return Checkpoint(
        source=source,
        container=container,
        files=files,
        weights=weights,
        config=config,
        aux=find_aux(source),
        notes=tuple(notes),
    )


# --- which files


def _find(source: PinnedFiles, container: str, key: str) -> tuple[str, list[str], dict[str, str] | None, list[str]]:
    """Find the container, its weight files in order, the index's map of tensor names to files, and notes."""
    names = sorted(name for name in source.entries if not name.startswith("."))
    for candidate in CONTAINERS if container == "auto" else (container,):
        if candidate == "packed":
            others = [n for n in names if n.endswith(WEIGHT_SUFFIXES) and not TRAINING.match(n)]
            others = [n for n in others if n != packed.WEIGHTS]
            if packed.is_packed(names, alone=not others) or (container == "packed" and packed.WEIGHTS in names):
                return candidate, [], None, [_others(others)] if others else []
            continue
        mine = [n for n in names if n.endswith(CONTAINERS[candidate].suffixes) and not TRAINING.match(n)]
        indexes = [n for n in names if n.endswith(tuple(s + INDEX_SUFFIX for s in CONTAINERS[candidate].suffixes))]
        if mine or indexes:
            files, index = _with_index(source, indexes) if indexes else (_without_index(source.address, mine), None)
            skipped = sorted(set(mine) - set(files))
            notes = [f"not read, since {_why_not(index)}: {', '.join(skipped)}"] if skipped else []
            if candidate == "gguf" and len(files) > 1 and not SHARD.match(files[0]):
                raise BadSpec(
                    f"{key}: {len(files)} GGUF files in {source.address}, each a model of its own:"
                    f" {', '.join(files[:4])};"
                    " put the one that is wanted in a folder of its own"
                )
            others = [n for n in names if n.endswith(WEIGHT_SUFFIXES) and n not in mine and not TRAINING.match(n)]
            notes += [_others(others)] if others else []
            return candidate, files, index, notes
    wanted = " or ".join(CONTAINERS) if container == "auto" else container
    others = [n for n in names if n.endswith(WEIGHT_SUFFIXES)]
    found = f"{len(others)} other weight files ({', '.join(others[:4])})" if others else f"{len(names)} files"
    raise BadSpec(f"{key}: expected {wanted} weights in {source.address}, found {found}")


def _others(names: Sequence[str]) -> str:
    return f"other weight files, not read and not carried over: {', '.join(names)}"


def _why_not(index: dict[str, str] | None) -> str:
    return "they are not one set of shards with the others" if index is None else "the index does not name them"


def _with_index(source: PinnedFiles, indexes: list[str]) -> tuple[list[str], dict[str, str]]:
    preferred = [n for n in indexes if n in ("model.safetensors" + INDEX_SUFFIX, "pytorch_model.bin" + INDEX_SUFFIX)]
    if len(indexes) > 1 and not preferred:
        raise BadCheckpoint(
            f"{source.address}: several indexes, expected one: {', '.join(indexes)}; remove those that are stale"
        )
    name = (preferred or indexes)[0]
    index = read_json(source, name, INDEX_LIMIT)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadCheckpoint(f"{name}: expected a weight_map of tensor names to file names")
    files = sorted(set(weight_map.values()))
    for file in files:
        _check_inside(name, file)
    missing = [file for file in files if source.find(file) is None]
    if missing:
        raise BadCheckpoint(f"{name}: {len(missing)} of its {len(files)} files are missing: {', '.join(missing[:4])}")
    return files, weight_map


def _check_inside(index: str, file: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.parts:
        raise BadCheckpoint(
            f"{index}: it names {file!r}, which leaves the checkpoint's folder; do not trust this index"
        )


def _without_index(address: Address, names: list[str]) -> list[str]:
    """Choose the weight files where no index names them: one file with the usual name, a complete set of shards, or all
    of them.
    """
    for usual in ("model.safetensors", "pytorch_model.bin"):
        if usual in names:
            return [usual]
    shards: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = SHARD.match(name)
        if match:
            shards.setdefault((match["stem"], int(match["count"])), []).append(name)
    if not shards:
        return names
    # A folder may hold stray shards of another set, such as those of an interrupted download; the larger set is meant.
    (stem, count), found = max(shards.items(), key=lambda item: len(item[1]))
    if len(found) != count:
        numbers = {int(SHARD.match(name)["number"]) for name in found}  # type: ignore[index]
        missing = sorted(set(range(1, count + 1)) - numbers)
        raise BadCheckpoint(f"{address}: {stem} has {len(found)} of {count} shards; missing: {missing[:8]}; fetch them")
    return found


def _check_names(weights: tuple[WeightSpec, ...], index: dict[str, str] | None) -> None:
    files: dict[str, str] = {}
    for spec in weights:
        if spec.name in files:
            raise BadCheckpoint(f"{spec.name!r} is in {files[spec.name]} and in {spec.file}; one of them is stale")
        files[spec.name] = spec.file
    if index is None:
        return
    wrong = [name for name, file in index.items() if files.get(name) != file]
    if wrong:
        name = wrong[0]
        where = f"it is in {files[name]}" if name in files else "no file has it"
        raise BadCheckpoint(
            f"the index puts {len(wrong)} tensors where they are not, {name!r} in {index[name]}: {where};"
            " fetch the index and its shards again"
        )
    extra = sorted(set(files) - set(index))
    if extra:
        raise BadCheckpoint(
            f"{files[extra[0]]}: it holds {len(extra)} tensors that the index does not name, {extra[0]!r} first;"
            " fetch the index again, or remove it to read every shard"
        )


# --- the rest


def open_file(where: str | os.PathLike[str] | Address, container: str) -> Checkpoint:
    """Open one weight file as a checkpoint, with the config.json of its folder if there is one.

    Raises:
        BadCheckpoint: the file is damaged, or holds no tensors.
    """
    address = Address.of(where)
    source, name = PinnedFiles(open_store(address.parent)), address.name
    weights = CONTAINERS[container].read_specs(source, name)
    if not weights:
        raise BadCheckpoint(f"{address}: it holds no tensors")
    _check_names(weights, None)
    config = gguf_config(source, [name], weights) if container == "gguf" else read_config(source)
    described = tuple(each for each in METHOD_FILES if source.find(each) is not None)
    return Checkpoint(
        source=source, container=container, files=(source.entry(name),), weights=weights, config=config, aux=described
    )
