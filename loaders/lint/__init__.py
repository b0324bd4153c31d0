"""Lint: checks whether engines will load a checkpoint, whoever wrote it, from its headers and config alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from loaders.architectures.diffusers import class_of
from loaders.checkpoints.aux_files import INDEX_SUFFIX
from loaders.checkpoints.checkpoint import NO_HEADERS, Checkpoint, Headers, open_checkpoint
from loaders.containers import CONTAINERS
from loaders.errors import BadCheckpoint, setting
from loaders.lint import compressed_tensors, diffusers, files, gguf, hqq, mlx, packed, transformers
from loaders.lint.base import Finding, Subject, fault, warning
from loaders.storage.address import Address
from loaders.storage.base import Store
from loaders.storage.json_files import read_json
from loaders.tensors.quantized_sources import FINDERS
from loaders.tensors.quantized_sources.consistency import STALE_CURE, stale
from loaders.tensors.sources import Sources, tensors_of

__all__ = ["BY_METHOD", "Finding", "lint", "lint_at", "lint_source"]

# the check for each method by which a checkpoint says that it was quantized
BY_METHOD: Mapping[str, Callable[[Subject], Iterator[Finding]]] = {
    **dict.fromkeys(transformers.SKIP_KEYS, transformers.check),
    "compressed-tensors": compressed_tensors.check,
    "mlx": mlx.check,
    "hqq": hqq.check,
}

BY_FILES = ("hqq", "mlx")  # recognized by their tensors, so that they are checked even without a block in config.json


def lint_at(where: str | os.PathLike[str] | Address | Store, headers: Headers = NO_HEADERS) -> list[Finding]:
    """Return all findings about a checkpoint in a folder or another store. One that cannot be opened is a finding too.

    `headers` are those that are known without reading them: see `open_checkpoint`.

    Raises:
        BadSpec: there are no weights.
    """
    try:
        return lint(open_checkpoint(where, key=setting("output"), headers=headers))
    except BadCheckpoint as error:
        return [fault("every engine", str(error), "fails, or loads wrong weights", "make it again")]


def lint(checkpoint: Checkpoint) -> list[Finding]:
    """Return all findings about an open checkpoint, faults first.

    Raises:
        BadCheckpoint: a quantized weight lacks one of its parts.
    """
    if checkpoint.components:
        return _of_components({part: lint(each) for part, each in checkpoint.components.items()})
    # GGUFs are checked under their own names, so that those of unknown architectures can be checked too.
    is_gguf = checkpoint.container == "gguf"
    subject = Subject(checkpoint, tensors_of(checkpoint, decode=not is_gguf, check=False), _index_of(checkpoint))
    found = list(gguf.check(subject) if is_gguf else files.check(subject))
    method = checkpoint.quantized_by
    check = (
        BY_METHOD.get(method or "") if class_of(checkpoint.config) is None else diffusers.BY_METHOD.get(method or "")
    )
    contradiction = stale(checkpoint) if method in FINDERS else None
    if contradiction is not None:
        happens = "makes quantized modules and finds no codes for them"
        found.append(fault("the engine of that method", contradiction, happens, STALE_CURE))
    elif checkpoint.container == "packed":
        found += packed.check(subject)
    elif check is not None and (method in BY_FILES or isinstance(checkpoint.config.get("quantization_config"), dict)):
        found += check(subject)
    elif check is not None and method not in BY_FILES:
        found.append(
            fault(
                "transformers",
                f"weights are stored as {method} packs them, and config.json has no quantization_config",
                "takes their codes for plain weights: it fails, or computes with random ones",
                "put quantization_config back, from where the checkpoint came from, or quantize the model again",
            )
        )
    elif method is not None and method != "gguf":
        found.append(
            warning(
                "its engine",
                f"it is quantized by {method}, and what that method's engines want is not checked here",
                "may load it or not",
                "load it once",
            )
        )
    return sorted(found, key=lambda finding: finding.level != "fault")


def _of_components(parts: Mapping[str, list[Finding]]) -> list[Finding]:
    """Return the findings about a pipeline's components, faults first; a text encoder's tokenizer lies beside it."""
    found = [replace(each, what=f"{part}: {each.what}") for part, mine in parts.items() for each in mine]
    found = [finding for finding in found if not finding.what.endswith(files.NO_TOKENIZER)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def lint_source(checkpoint: Checkpoint, sources: Sources) -> list[Finding]:
    """Return what is wrong with a source in such a way that every output of it would have it, too."""
    if checkpoint.components:
        parts = checkpoint.components.items()
        each = {part: lint_source(one, tensors_of(one, decode=True, check=False)) for part, one in parts}
        return _of_components(each)
    return list(files.carried(Subject(checkpoint, sources, None)))


def _index_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Read the index of the weight files, if there is one: by the usual name of their container, or another."""
    container = CONTAINERS[checkpoint.container]
    indexes = tuple(suffix + INDEX_SUFFIX for suffix in container.suffixes)
    names = [entry.name for entry in checkpoint.source.store.list(deep=False) if entry.name.endswith(indexes)]
    names.sort(key=lambda name: name != container.index)
    return read_json(checkpoint.source, names[0]) if names else None
