"""Detection of a weight file's format: by its first bytes, then by its name."""

from __future__ import annotations

import enum
import os
import struct

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import CONTAINERS, packed
from loaders.containers.pytorch import open_zip
from loaders.errors import BadCheckpoint, BadSpec, MissingFile
from loaders.limits import SAFETENSORS_HEADER
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles

# A safetensors file begins with the length of its header. Eight random bytes are nearly always a larger number than
# this, so the limit also tells safetensors from other files.
# The pickled MAGIC_NUMBER of torch/serialization.py, which begins the files of torch before 1.6 (they are no zips).
LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
LFS = b"version https://git-lfs"
TEXT = (b"<!DOCTYPE", b"<html", LFS)


class WeightFormat(enum.Enum):
    """The format of a weight file: a container that is read here, or UNKNOWN.

    CUSTOM is another name of PACKED, the one format here that is no common one. Libraries that have CUSTOM for whatever
    they do not know mean UNKNOWN.
    """

    SAFETENSORS = "safetensors"
    PYTORCH = "pytorch"
    GGUF = "gguf"
    PACKED = "packed"
    CUSTOM = "packed"  # noqa: PIE796  # a second name of the same format
    UNKNOWN = "unknown"


def detect_weight_format(file_path: str | os.PathLike[str] | Address) -> WeightFormat:
    """Return the format of a file, or of the weights in a folder.

    A file's bytes decide, whatever its name is. Other files are UNKNOWN, as are plain pickles without torch's magic
    number unless they are named .bin, .pt or .pth, and folders without weights. Packed files have no magic bytes: their
    names and their manifest, which is checked, identify them.

    Raises:
        MissingFile: nothing exists at the path.
        BadCheckpoint: a file is empty, is shorter than its header says, or holds something else than its name says (an
            error page, a Git LFS pointer).
    """
    address = Address.of(file_path)
    if open_store(address).absence() is None:
        return _of_folder(address)
    files, name = PinnedFiles(open_store(address.parent)), address.name
    entry = files.find(name)
    if entry is None:
        raise MissingFile(f"{address}: expected a file of weights or a folder, found nothing there")
    first = bytes(files.read(name, 0, min(64, entry.size)))
    is_torch = first[:4] == b"PK\x03\x04" or LEGACY_TORCH in first
    if not is_torch and (folder := packed_folder(address)) is not None:
        packed.read(PinnedFiles(open_store(folder)))
        return WeightFormat.PACKED
    named = format_by_name(name)
    found = _by_bytes(files, name, first, named)
    if found is WeightFormat.UNKNOWN and named is not WeightFormat.UNKNOWN:
        lone = f", with {packed.MANIFEST} beside it if it is packed" if name == packed.WEIGHTS else ""
        raise BadCheckpoint(
            f"{address}: its name says {named.value}, but {_what(first, entry.size)}; fetch it again{lone}"
        )
    return found


def packed_folder(file: Address) -> Address | None:
    """Return the folder of the packed checkpoint that a file belongs to; None if it belongs to none."""
    return packed.folder_of(file, lambda folder, name: open_store(folder).find(name) is not None)


def _of_folder(address: Address) -> WeightFormat:
    try:
        return WeightFormat(open_checkpoint(address).container)
    # No weights are in it. A BadCheckpoint passes: there are some, and they are damaged.
    except BadSpec:
        return WeightFormat.UNKNOWN


def format_by_name(name: str) -> WeightFormat:
    """Return the format that a file's suffix is usual for."""
    for container in CONTAINERS.values():
        if container.suffixes and name.endswith(container.suffixes):
            return WeightFormat(container.name)
    return WeightFormat.UNKNOWN


def _by_bytes(files: PinnedFiles, name: str, first: bytes, named: WeightFormat) -> WeightFormat:
    if first[:4] == b"GGUF":
        return _checked(files, name, WeightFormat.GGUF)
    if first[:4] == b"PK\x03\x04":
        return _of_zip(files, name)
    if first[:1] == b"\x80" and (LEGACY_TORCH in first or named is WeightFormat.PYTORCH):
        return WeightFormat.PYTORCH
    if len(first) >= 9 and first[8:9] == b"{" and struct.unpack("<Q", first[:8])[0] <= SAFETENSORS_HEADER:
        return _checked(files, name, WeightFormat.SAFETENSORS)
    return WeightFormat.UNKNOWN


def _checked(files: PinnedFiles, name: str, found: WeightFormat) -> WeightFormat:
    """Read the file's header, so that a damaged file raises the reader's own error instead of being detected."""
    CONTAINERS[found.value].read_specs(files, name)
    return found


def _of_zip(files: PinnedFiles, name: str) -> WeightFormat:
    try:
        with files.open(name) as file, open_zip(file) as archive:
            names = archive.namelist()
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{files.address / name}: {error}") from None
    is_torch = any(member == "data.pkl" or member.endswith("/data.pkl") for member in names)
    return WeightFormat.PYTORCH if is_torch else WeightFormat.UNKNOWN


def _what(first: bytes, size: int) -> str:
    if size == 0:
        return "it is empty"
    if first.startswith(LFS):
        return "it is a Git LFS pointer, not what that points to (git lfs pull)"
    if first.lstrip().startswith(TEXT):
        return "it is a page of a website"
    return f"it begins with {first[:16]!r} and has {size} bytes"
