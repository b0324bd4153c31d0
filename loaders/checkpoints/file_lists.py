"""Weights as a caller gives them: a checkpoint, a folder, an address, one file of any name, or a list of files.

A list of files is one source. Its files may lie in several folders; they are of one container and of one model, which
is checked by what their headers and the config.json beside them say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from loaders.checkpoints.checkpoint import (
    HEADER_THREADS,
    Checkpoint,
    described_by,
    open_checkpoint,
    open_file,
    read_headers,
    settled,
)
from loaders.checkpoints.derived_config import gguf_config, read_config
from loaders.checkpoints.detect import WeightFormat, detect_weight_format, format_by_name, packed_folder
from loaders.checkpoints.weight_files import SHARD, some
from loaders.containers import packed, safetensors
from loaders.errors import BadSpec, MissingFile
from loaders.specs import WeightSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles, Store
from loaders.storage.hub.names import source_address
from loaders.storage.listed_files import ListedFiles, plain_address
from loaders.words import counted

Place = str | os.PathLike[str] | Address
Given = Checkpoint | Place | Iterable[Place]
# What tells models apart: in the metadata of safetensors files, and in config.json. What only one file says is no
# contradiction.
TELLING = ("format", "model_type", "modelspec.architecture")
TELLING_CONFIG = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")


def open_weights(where: Given) -> Checkpoint:
    """Open what a caller gives as weights. A checkpoint is returned as it is.

    One file, by itself or as a list of one, is exactly that file, whatever it is called, also if it is a shard of
    several; a file of a packed checkpoint stands for its folder.

    Raises:
        MissingFile: nothing exists at a path; of a list, all that are missing are named.
        BadSpec: it holds no known weights, or the files of a list do not belong together.
        BadCheckpoint: a file is damaged.
    """
    if isinstance(where, Checkpoint):
        return where
    if not isinstance(where, str | os.PathLike | Address):
        return open_files(where)
    address = source_address(where)
    # Of a repository, opening it says best why it cannot be read.
    if address.scheme == "hf" or open_store(address).absence() is None:
        return open_checkpoint(address, key="path")
    found = detect_weight_format(where)
    if found is WeightFormat.PACKED and (folder := packed_folder(address)) is not None:
        return open_checkpoint(folder, found.value, key="path")
    if found is WeightFormat.UNKNOWN:
        raise BadSpec(f"{address}: no file of weights; known: {_known()}")
    return open_file(address, found.value)


def open_files(where: Iterable[Place]) -> Checkpoint:
    """Open a list of weight files as one checkpoint, whose tensors are in the order of the list. Errors as
    `open_weights`.
    """
    files = _addresses(where)
    folders = {folder: open_store(folder) for folder in dict.fromkeys(file.parent for file in files)}
    _check_there(files, folders)
    container = _container(files)
    if container == "packed":
        if len(files) > 1:
            raise BadSpec(
                f"file_paths: {files[0].name} is all of a packed checkpoint; {counted(len(files) - 1, 'file')} beside"
                " it in the list: give it alone, or its folder"
            )
        return open_checkpoint(packed_folder(files[0]) or files[0].parent, container, key="file_paths")
    store = ListedFiles(files, folders)
    source, names = PinnedFiles(store), store.names
    _check_sets(names)
    config = _config(folders) if container != "gguf" else {}
    headers, notes = read_headers(source, container, names)
    _check_unique(headers)
    if container == "safetensors":
        _check_metadata(source, names)
    weights, said = settled(source, container, headers, None)
    if not weights:
        raise BadSpec(f"file_paths: {some(names)} hold no tensors")
    return Checkpoint(
        source=source,
        container=container,
        files=tuple(source.entry(name) for name in names),
        weights=weights,
        config=gguf_config(source, sorted(names), weights) if container == "gguf" else config,
        aux=described_by(source),
        notes=(*notes, *said),
    )


def _addresses(where: Any) -> list[Address]:
    listed = list(where) if isinstance(where, Iterable) and not isinstance(where, bytes | Mapping) else None
    if listed is None or not all(isinstance(each, str | os.PathLike | Address) for each in listed):
        raise BadSpec(f"file_paths: expected a path, a checkpoint or a list of paths, found {str(where)[:100]}")
    if not listed:
        raise BadSpec("file_paths: an empty list; give the files that are to be loaded, or their folder")
    files = [plain_address(each) for each in listed]
    twice = [str(file) for file in dict.fromkeys(files) if files.count(file) > 1]
    if twice:
        raise BadSpec(f"file_paths: {some(twice)} more than once in the list; name each file once")
    return files


def _check_there(files: Sequence[Address], folders: Mapping[Address, Store]) -> None:
    missing = [file for file in files if folders[file.parent].find(file.name) is None]
    if inner := [file for file in missing if file.is_local and open_store(file).absence() is None]:
        raise BadSpec(f"file_paths: {inner[0]} is a folder; a list has files only: give a folder by itself")
    if missing:
        every = ", ".join(map(str, missing))
        raise MissingFile(f"file_paths: {len(missing)} of {counted(len(files), 'file')} not found: {every}")


def _container(files: Sequence[Address]) -> str:
    """Return the container of all files, each by its name, or by its first bytes where the name does not tell."""
    found: dict[str, Address] = {}
    for file in files:
        named = format_by_name(file.name)
        if named is WeightFormat.UNKNOWN or packed_folder(file) is not None or file.name == packed.MANIFEST:
            named = detect_weight_format(file)
        if named is WeightFormat.UNKNOWN:
            raise BadSpec(f"{file}: no file of weights; known: {_known()}")
        found.setdefault(named.value, file)
    if len(found) > 1:
        kinds = " and ".join(f"{kind} ({file.name})" for kind, file in found.items())
        raise BadSpec(f"file_paths: files of one list are of one container, found {kinds}; load each kind by itself")
    return next(iter(found))


def _known() -> str:
    return ", ".join(each.value for each in WeightFormat if each is not WeightFormat.UNKNOWN)


# --- whether files are of one model


def _check_sets(names: Sequence[str]) -> None:
    """Check that shards of one name are of one set: those of model-*-of-00002 and of model-*-of-00003 are not."""
    sets: dict[str, tuple[str, str]] = {}
    for name in names:
        if (match := SHARD.match(PurePosixPath(name).name)) is not None:
            count, first = sets.setdefault(match["stem"], (match["count"], name))
            if count != match["count"]:
                raise BadSpec(
                    f"file_paths: files of two models: {first} is of a set of {int(count)} shards, {name} of"
                    f" {int(match['count'])}; give those of one"
                )


def _check_unique(headers: Iterable[WeightSpec]) -> None:
    first: dict[str, str] = {}
    twice: dict[str, str] = {}
    for spec in headers:
        if first.setdefault(spec.name, spec.file) != spec.file:
            twice.setdefault(spec.name, spec.file)
    if twice:
        name, file = next(iter(twice.items()))
        more = f", and {counted(len(twice) - 1, 'other tensor')} likewise" if len(twice) > 1 else ""
        raise BadSpec(
            f"file_paths: {name!r} is in {first[name]} and in {file}{more}; are they of two models, or is one a copy?"
            " give each tensor once"
        )


def _check_metadata(source: PinnedFiles, names: Sequence[str]) -> None:
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        found = list(pool.map(lambda name: safetensors.read_metadata(source, name), names))
    _check_agree("its metadata", TELLING, dict(zip(names, found, strict=True)))


def _config(folders: Mapping[Address, Store]) -> dict[str, Any]:
    """Return the config.json of the first folder that has one."""
    found = {str(folder / "config.json"): read_config(PinnedFiles(store)) for folder, store in folders.items()}
    _check_agree("it", TELLING_CONFIG, found)
    return next((config for config in found.values() if config), {})


def _check_agree(what: str, keys: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that what several files say of their model does not contradict."""
    for key in keys:
        says = [(file, said[key]) for file, said in found.items() if said.get(key) is not None]
        for file, value in says[1:]:
            if value != says[0][1]:
                raise BadSpec(
                    f"file_paths: files of two models: in {says[0][0]} {what} says {key}: {str(says[0][1])[:50]}, in"
                    f" {file} {str(value)[:50]}; give those of one"
                )
