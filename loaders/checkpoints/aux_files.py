"""What lies beside the weights and is carried over: tokenizers, templates, code, sub-folders."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.containers import packed
from loaders.errors import BadCheckpoint

# Weights of any container: never carried over as aux files
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".tflite", ".mlmodel", ".ot", ".pkl", ".pickle", ".nemo", ".llamafile",
)  # fmt: skip


INDEX_SUFFIX = ".index.json"


NOT_CARRIED = (".git", ".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints")


OUR_REPORT = "weightmill.json"


NOT_AUX = (OUR_REPORT, packed.MANIFEST, packed.EXPERT_LAYOUT)


def is_weights(name: str) -> bool:
    """Whether a file holds weights or their index: such files are never carried over as they are."""
    return name.endswith(WEIGHT_SUFFIXES) or name.endswith(tuple(s + INDEX_SUFFIX for s in WEIGHT_SUFFIXES))


def find_aux(root: Path) -> tuple[str, ...]:
    """Every other file, in sub-folders too, by its path from the root.

    Raises:
        BadCheckpoint: a link leads out of the folder (the Hub's cache, where snapshots link to blobs, may).
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in NOT_CARRIED)
        for link in (f for f in folders if (Path(folder) / f).is_symlink()):
            raise BadCheckpoint(f"{Path(folder) / link}: a linked folder; its files are not followed: copy it in")
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if is_weights(name) or relative in NOT_AUX or name == ".DS_Store":
                continue
            if path.is_symlink() and not _is_ours(root, path):
                raise BadCheckpoint(f"{relative}: it links to {path.resolve()}, outside the checkpoint; copy it in")
            if path.is_file():
                found.append(relative)
    return tuple(found)


def _is_ours(root: Path, link: Path) -> bool:
    target = link.resolve()
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(root.resolve().parent.parent / "blobs")
    return in_cache or target.is_relative_to(root.resolve())
