"""Auxiliary files: all files of a checkpoint that hold no weights (tokenizer, templates, code), copied to an output."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loaders.containers import CONTAINERS, packed
from loaders.errors import BadCheckpoint
from loaders.limits import shown
from loaders.storage.base import OUR_PAGE, OUR_REPORT, Entry, Store
from loaders.words import LINE_BREAK, counted

# Weights of any container, including those that are not read here. They are never copied: an output with the weights of
# its source beside its own would be twice as large, and an engine could load the wrong ones.
WEIGHT_SUFFIXES = (
    *(suffix for container in CONTAINERS.values() for suffix in container.suffixes),
    ".ggml", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".tflite", ".mlmodel", ".ot", ".pkl", ".pickle", ".nemo", ".llamafile", ".distcp",
)  # fmt: skip


INDEX_SUFFIX = ".index.json"
VARIANT_INDEX = re.compile(r"\.index\.\w+\.json$")  # the index of a variant, as diffusers and transformers call it


# Files that describe the source's weights, and would be wrong beside the output's, which has a report and a page of its
# own; and what says how git stores a
# repository, which is with a download from the Hub, and of which it has its own.
NOT_AUX = (OUR_REPORT, OUR_PAGE, packed.MANIFEST, packed.EXPERT_LAYOUT, ".gitattributes", ".gitignore")

# An adapter's weights are never copied; its config alone would have peft look for them wherever the output is loaded.
ADAPTER_CONFIG = "adapter_config.json"


def is_weights(name: str) -> bool:
    """Whether a file holds weights or an index of weights, by its name; such files are never copied to an output."""
    plain = VARIANT_INDEX.sub(INDEX_SUFFIX, name)
    return plain.endswith(WEIGHT_SUFFIXES) or plain.endswith(tuple(s + INDEX_SUFFIX for s in WEIGHT_SUFFIXES))


def find_aux(everything: Iterable[Entry]) -> tuple[str, ...]:
    """Return the auxiliary files among all files of a folder and its sub-folders, by their paths from the root."""
    names = (entry.name for entry in everything if entry.name.rpartition("/")[2] not in (".DS_Store", ADAPTER_CONFIG))
    return tuple(name for name in names if not is_weights(name) and name not in NOT_AUX)


def check_links(store: Store, everything: Iterable[Entry]) -> list[str]:
    """Check that no link leads out of a folder, before a byte of it is read; returns notes on those that may.

    Links of weights may lead to weights elsewhere: folders of links to large files are common.

    Raises:
        BadCheckpoint: one does, or a name has a line break. Links within the Hub's cache are accepted.
    """
    outside = {}
    for name in (entry.name for entry in everything):
        if LINE_BREAK.search(name):
            raise BadCheckpoint(f"{shown(name)}: the name has a line break; give the file another, or move it away")
        if name.rpartition("/")[2] != ".DS_Store":
            outside[name] = store.check_inside(name, may_leave=name.endswith(WEIGHT_SUFFIXES))
    found = [(name, where) for name, where in outside.items() if where is not None]
    if not found:
        return []
    what = counted(len(found), "link of weights leads", "links of weights lead")
    return [f"{what} out of the folder, {found[0][0]} to {found[0][1]}; what is there is read"]


def aux_notes(everything: Iterable[Entry]) -> list[str]:
    """Say what is not carried over although it may be a stranger's own."""
    names = {entry.name for entry in everything}
    notes = [
        f"{name} is not carried over: no adapter's weights are, and nothing could be loaded by it alone"
        for name in sorted(names)
        if name.rpartition("/")[2] == ADAPTER_CONFIG
    ][:1]
    if OUR_PAGE in names and OUR_REPORT not in names:
        notes.append(f"{OUR_PAGE} is not carried over: an output has a page of its own by that name")
    return notes
