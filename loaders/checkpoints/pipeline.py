"""A pipeline of diffusers as one checkpoint: a folder with model_index.json and a checkpoint in each sub-folder.

Each component is opened by itself, with its own config, family and index, and the pipeline is their union: its tensors
are called COMPONENT/NAME and lie in COMPONENT/FILE. So one plan, one journal and one report serve the whole pipeline,
and a rule picks a component by the beginning of a name. In the files themselves tensors have their own names: a
weight file in a sub-folder of an output is written without the folder's name before each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from loaders.checkpoints.aux_files import WEIGHT_SUFFIXES
from loaders.errors import BadCheckpoint
from loaders.limits import CONFIG_VALUES, JSON_CONFIG
from loaders.specs import WeightSpec
from loaders.storage.base import Entry, PinnedFiles, Store
from loaders.storage.json_files import read_json

MODEL_INDEX = "model_index.json"
CONTAINERS = ("safetensors", "pytorch")  # what diffusers reads in a component's folder
# Classes of components that hold no weights, by the words in their names.
WEIGHTLESS = ("Tokenizer", "Processor", "FeatureExtractor", "Scheduler", "Guider")
SHOWN = 4  # files that a note names before it counts the rest


def read_model_index(store: Store, everything: Sequence[Entry]) -> dict[str, Any] | None:
    """Return model_index.json of a pipeline; None if the store holds none. Errors as `read_json`.

    A folder with weights of its own and none of the components' folders is no pipeline.
    """
    files = PinnedFiles(store)
    if files.find(MODEL_INDEX) is None:
        return None
    found = read_json(files, MODEL_INDEX, JSON_CONFIG, CONFIG_VALUES)
    named = classes_of(found) if isinstance(found.get("_class_name"), str) else {}
    there = {entry.name.partition("/")[0] for entry in everything if "/" in entry.name}
    has_own = any("/" not in entry.name and entry.name.endswith(WEIGHT_SUFFIXES) for entry in everything)
    return found if named and (not has_own or not there.isdisjoint(named)) else None


def classes_of(model_index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class of each component that model_index.json names, except those that are null.

    Raises:
        BadCheckpoint: a component's name is no name of a folder.
    """
    found = {}
    for name, value in model_index.items():
        is_pair = isinstance(value, list) and len(value) >= 2 and isinstance(value[1], str)
        if name.startswith("_") or not is_pair:
            continue
        if PurePosixPath(name).parts != (name,) or name == ".." or "\\" in name or not name.isprintable():
            raise BadCheckpoint(f"{MODEL_INDEX}: {name[:200]!r} is no name of a folder; do not trust this file")
        found[name] = value[1]
    return found


def parts_of(model_index: Mapping[str, Any], everything: Sequence[Entry], address: object) -> tuple[str, ...]:
    """Return the components that hold weights, in the order of model_index.json.

    Raises:
        BadCheckpoint: a component's weights are missing.
    """
    folders = {entry.name.partition("/")[0] for entry in everything if entry.name.endswith(WEIGHT_SUFFIXES)}
    there = {entry.name.partition("/")[0] for entry in everything if "/" in entry.name}
    found = []
    for name, kind in classes_of(model_index).items():
        if name in folders:
            found.append(name)
        elif not any(word in kind for word in WEIGHTLESS):
            what = "holds no weights" if name in there else "is not there"
            raise BadCheckpoint(
                f"{address}: {MODEL_INDEX} names {name} ({kind[:80]}), and the folder {name}/ {what}; fetch it"
            )
    if not found:
        raise BadCheckpoint(f"{address}: no component that {MODEL_INDEX} names holds weights; fetch them")
    return tuple(found)


def passed_over(everything: Sequence[Entry], parts: Sequence[str]) -> list[str]:
    """Say which weight files belong to no component."""
    others = [
        entry.name
        for entry in everything
        if entry.name.endswith(WEIGHT_SUFFIXES) and entry.name.partition("/")[0] not in parts
    ]
    if not others:
        return []
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return [
        f"{', '.join(others[:SHOWN])}{more}: weights of no component of {MODEL_INDEX}, which are not read and not"
        " carried over"
    ]


def within(part: str, spec: WeightSpec) -> WeightSpec:
    """Return a component's stored tensor as one of the pipeline."""
    return replace(
        spec,
        name=f"{part}/{spec.name}",
        file=f"{part}/{spec.file}",
        alias=None if spec.alias is None else f"{part}/{spec.alias}",
        own_name=spec.own_name or spec.name,
    )
