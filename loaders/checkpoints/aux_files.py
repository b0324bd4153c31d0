"""What lies beside the weights and is carried over: tokenizers, templates, code, sub-folders."""

from __future__ import annotations

from loaders.containers import packed
from loaders.storage.base import PinnedFiles

# Weights of any container: never carried over as aux files
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".tflite", ".mlmodel", ".ot", ".pkl", ".pickle", ".nemo", ".llamafile",
)  # fmt: skip


INDEX_SUFFIX = ".index.json"


OUR_REPORT = "weightmill.json"


NOT_AUX = (OUR_REPORT, packed.MANIFEST, packed.EXPERT_LAYOUT)


def is_weights(name: str) -> bool:
    """Whether a file holds weights or their index: such files are never carried over as they are."""
    return name.endswith(WEIGHT_SUFFIXES) or name.endswith(tuple(s + INDEX_SUFFIX for s in WEIGHT_SUFFIXES))


def find_aux(files: PinnedFiles) -> tuple[str, ...]:
    """Every other file, in sub-folders too, by its path from the root.

    Raises:
        BadCheckpoint: a link leads out of the folder (the Hub's cache, where snapshots link to blobs, may).
    """
    found = []
    for entry in files.store.list():
        name = entry.name.rpartition("/")[2]
        if not is_weights(name) and entry.name not in NOT_AUX and name != ".DS_Store":
            files.store.check_inside(entry.name)
            found.append(entry.name)
    return tuple(found)
