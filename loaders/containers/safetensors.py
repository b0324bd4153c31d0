"""The safetensors container: eight bytes of header length, a JSON header, then the tensors without gaps.

Reading trusts nothing: lengths, offsets, shapes, dtypes and names are checked against the file's real size before any
weight is read. The header is written last, at its planned place and length, since a length that depends on values
(`Slot.is_bound`, always at the end of the file) is known only then.

Format: https://github.com/huggingface/safetensors, "Format"; the reading limits are those of its Rust code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any

from loaders.containers.base import Checksum, Places
from loaders.dtypes import DType, Shape, dtype_named
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.limits import SAFETENSORS_HEADER, check_name, check_shape, check_tensors, read_json_text, shown
from loaders.specs import OutputFile, Slot, StoredTensor, WeightSpec
from loaders.storage.base import PinnedFiles

# Bytes of the first read: the header's length, and for most shards the whole header, which saves a second request on a
# remote store.
FIRST = 1 << 16
ABOUT = "__metadata__"  # the key of what a file says beside its tensors
METADATA = {"format": "pt"}  # what transformers writes; before version 5 it refused files whose metadata lacks it


def read_specs(files: PinnedFiles, file: str) -> tuple[WeightSpec, ...]:
    """Read the tensors of one file from its header, in the order of their bytes.

    Raises:
        BadCheckpoint: truncated, overlapping, out of range, unknown dtype, absurd lengths, ...
    """
    header, data_start, data_size = _read_header(files, file)
    header.pop(ABOUT, None)
    check_tensors(len(header), file)
    specs = []
    for name, entry in header.items():
        check_name(name, file)
        try:
            specs.append(_spec(name, entry, file, data_start, data_size))
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{file}: {shown(name)}: {error}") from None
    specs.sort(key=lambda spec: (spec.offset, spec.size))
    _check_cover(specs, file, data_start, data_size)
    return tuple(specs)


def read_metadata(files: PinnedFiles, file: str) -> Mapping[str, Any]:
    """Return what a file's header says beside its tensors, such as the format; errors as `read_specs`."""
    found = _read_header(files, file)[0].get(ABOUT)
    return found if isinstance(found, dict) else {}


def _read_header(files: PinnedFiles, file: str) -> tuple[dict[str, Any], int, int]:
    """Return the header with its metadata, the first byte of the data, and how many bytes of data there are."""
    size = files.entry(file).size
    first = files.read(file, 0, min(size, FIRST))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(SAFETENSORS_HEADER, size - 8):
        raise BadCheckpoint(
            f"{file}: header of {length} bytes in a file of {size}"
            f" (at most {SAFETENSORS_HEADER} allowed); not safetensors, or truncated: fetch it again"
        )
    raw = first[8 : 8 + length] if length <= len(first) - 8 else files.read(file, 8, 8 + length)
    check_tensors(bytes(raw).count(b'"data_offsets"'), file)  # before a million of them are made
    try:
        header = read_json_text(raw, twice=False)
    except ValueError as error:
        raise BadCheckpoint(f"{file}: the header is not JSON ({error}); fetch the file again") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{file}: the header is not a JSON object; fetch the file again")
    return header, 8 + length, size - 8 - length


def _spec(name: str, entry: Any, file: str, data_start: int, data_size: int) -> WeightSpec:
    try:
        dtype, given, (start, stop) = dtype_named(entry["dtype"]), entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise BadCheckpoint(f"its header entry lacks dtype, shape or data_offsets: {shown(entry)}") from None
    if dtype.block > 1:
        raise BadCheckpoint(f"{dtype} is no dtype of safetensors; do not trust this file")
    shape = check_shape(given)
    if type(start) is not int or type(stop) is not int:
        raise BadCheckpoint(
            f"expected two whole numbers as its data_offsets, found {shown(start)} and {shown(stop)}; do not trust this"
            " file"
        )
    if not 0 <= start <= stop <= data_size:
        raise BadCheckpoint(
            f"its bytes [{shown(start)}, {shown(stop)}) leave the {data_size} that the file holds; truncated? fetch it"
            " again"
        )
    size = dtype.size(shape)
    if stop - start != size:
        raise BadCheckpoint(f"{dtype} {shown(shape)} takes {size} bytes, its offsets hold {stop - start}")
    return WeightSpec(name=name, dtype=dtype, shape=_same(shape), file=file, offset=data_start + start, size=size)


@lru_cache(maxsize=4096)
def _same(shape: Shape) -> Shape:
    """Return one object for all equal shapes: a model has many tensors and few shapes."""
    return shape


def _check_cover(specs: Sequence[WeightSpec], file: str, data_start: int, data_size: int) -> None:
    """Check that the tensors, sorted by their bytes, cover the data without gaps or overlaps, as the format asks."""
    end = data_start
    for spec in specs:
        if spec.offset != end:
            what = "overlaps the tensor before it" if spec.offset < end else f"leaves {spec.offset - end} bytes unused"
            raise BadCheckpoint(f"{file}: {spec.name!r} {what}: starts at byte {spec.offset}, expected {end}")
        end += spec.size
    if end != data_start + data_size:
        raise BadCheckpoint(f"{file}: {data_start + data_size - end} bytes after the last tensor; fetch the file again")


# --- writing


def lay_out(file: str, tensors: Iterable[StoredTensor], about: Any = None) -> OutputFile:
    """Give every tensor its place: wide dtypes first, so that each is aligned; those of variable length last.

    `about` is the file's `__metadata__`, by default what transformers writes.

    Raises:
        BadSpec: safetensors has no such dtype, or no tensor of this name.
    """
    whole = {tensor.name: tensor.whole or tensor.spec for tensor in tensors}
    for name, spec in whole.items():
        if own_name(file, name) == ABOUT:
            raise BadSpec(
                f"{setting('container')}: a tensor is called {name}, which in safetensors is no tensor's name; use"
                " another container, or drop the tensor"
            )
        if spec.dtype.block > 1:
            raise BadSpec(
                f"{setting('container')}: {name} would be {spec.dtype}, which safetensors cannot hold; use gguf"
            )
    slots, offset = [], 0
    for name, spec in sorted(whole.items(), key=lambda t: (t[1].is_bound, -t[1].dtype.item_bytes, t[0])):
        slots.append(Slot(name=name, dtype=spec.dtype, shape=spec.shape, offset=offset, is_bound=spec.is_bound))
        offset += spec.size
    header_bytes = len(
        header({own_name(file, slot.name): (slot.dtype, slot.shape, slot.offset) for slot in slots}, about)
    )
    return OutputFile(
        name=file,
        header_bytes=header_bytes,
        data_bytes=offset,
        slots=tuple(slots),
        container="safetensors",
        about=about,
    )


def own_name(file: str, name: str) -> str:
    """Return a tensor's name in a file: that of a file in a sub-folder begins with the folder in the plan alone."""
    folder = file.rpartition("/")[0]
    return name.removeprefix(f"{folder}/") if folder else name


def header(tensors: dict[str, tuple[DType, tuple[int, ...], int]], about: Any = None, room: int = 0) -> bytes:
    """Return the first bytes of a file, padded to a multiple of 8 bytes, and to `room` bytes at least.

    `tensors` are (dtype, shape, offset among the data) by name.
    """
    said = json.dumps(METADATA if about is None else about, separators=(",", ":"), ensure_ascii=False)
    entries = [f'"{ABOUT}":{said}']
    # Texts rather than dicts and lists, of which a model of many tensors would need several times as many.
    for name, (dtype, shape, offset) in tensors.items():
        sizes, stop = ",".join(map(str, shape)), offset + dtype.size(shape)
        entries.append(
            f'{encode_basestring(name)}:{{"dtype":"{dtype.name}","shape":[{sizes}],"data_offsets":[{offset},{stop}]}}'
        )
    raw = f"{{{','.join(entries)}}}".encode()
    length = max(-(-(8 + len(raw)) // 8) * 8, room) - 8
    return length.to_bytes(8, "little") + raw.ljust(length)


def place(file: OutputFile, lengths: Mapping[str, int]) -> Places:
    """Return the places of the tensors: one after another, without gaps."""
    places, at = {}, file.header_bytes
    for slot in file.slots:
        size = lengths[slot.name] if slot.is_bound else slot.size
        places[slot.name] = (at, size)
        at += size
    return places


def frame(file: OutputFile, places: Places, checksum: Checksum) -> list[tuple[int, bytes]]:
    """Return the header, padded to its planned length: a shorter tensor may have made its JSON shorter."""
    head = header(
        {spec.name: (spec.dtype, spec.shape, spec.offset - file.header_bytes) for spec in _specs(file, places)},
        file.about,
        file.header_bytes,
    )
    assert len(head) == file.header_bytes, (len(head), file.header_bytes)
    return [(0, head)]


def written_specs(file: OutputFile, places: Places) -> tuple[WeightSpec, ...]:
    """Return what `read_specs` reads from a file with this frame, as a file of its own folder."""
    return tuple(sorted(_specs(file, places), key=lambda spec: (spec.offset, spec.size)))


def _specs(file: OutputFile, places: Places) -> Iterator[WeightSpec]:
    own_file = file.name.rpartition("/")[2]
    for slot in file.slots:
        at, size = places[slot.name]
        shape = (size // slot.dtype.item_bytes,) if slot.is_bound else slot.shape
        name = own_name(file.name, slot.name)
        yield WeightSpec(name=name, dtype=slot.dtype, shape=shape, file=own_file, offset=at, size=size)
