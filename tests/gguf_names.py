"""Write gguf-py's names of tensors to loaders/architectures/gguf_names.json: python -m tests.gguf_names FOLDER

FOLDER is the gguf-py of a llama.cpp source, whose names a release of the `gguf` package may lack.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from loaders.architectures.gguf_names import NAMES_FILE
from tests.gguf_goldens import dump

TOWERS = ("mmproj", "clip")  # files of their own


def _open(text: str) -> str:
    return text.replace("{bid}", "{}")


def names(gguf: Any) -> dict[str, Any]:
    """Return the names of modules for each of gguf-py's tensors, with {} for a layer's number, and what each
    architecture has of them.

    "tensors" are GGUF's name by kind, "modules" the names in checkpoints by kind, "own" those that an architecture has
    instead.
    """
    mapping = gguf.TensorNameMap
    architectures = {
        name: [kind.name for kind in gguf.MODEL_TENSORS[arch] if kind in gguf.TENSOR_NAMES]
        for arch, name in sorted(gguf.MODEL_ARCH_NAMES.items(), key=lambda each: each[1])
        if name not in TOWERS
    }
    modules = {**mapping.mappings_cfg, **mapping.block_mappings_cfg}
    needed = {name for names in architectures.values() for name in names}
    # In gguf-py's order: of two kinds that have the name of a module in common, the later one has it.
    used = [kind for kind in dict.fromkeys((*modules, *gguf.MODEL_TENSOR)) if kind.name in needed]
    return {
        "tensors": {kind.name: _open(gguf.TENSOR_NAMES[kind]) for kind in used},
        "modules": {kind.name: [_open(name) for name in modules[kind]] for kind in used if kind in modules},
        "own": {
            gguf.MODEL_ARCH_NAMES[arch]: {kind.name: [_open(name) for name in found] for kind, found in own.items()}
            for arch, own in mapping.arch_block_mappings_cfg.items()
        },
        "architectures": architectures,
    }


def main(arguments: Sequence[str]) -> int:
    """Write the table; with --print after the folder, print it instead."""
    sys.path.insert(0, arguments[0])
    import gguf

    if "--print" in arguments:
        print(dump(names(gguf)), end="")
    else:
        NAMES_FILE.write_text(dump(names(gguf)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
