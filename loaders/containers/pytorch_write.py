"""The writer of PyTorch files: torch.save's zip, whose members are not compressed and so can be planned to the byte.

    NAME/data.pkl                the pickle: see pytorch_pickle.py
    NAME/.format_version, .storage_alignment, byteorder
    NAME/data/0, 1, ...          a tensor each; every member's bytes begin at a multiple of 64, as torch's do
    NAME/version
Then the directory follows. A member's header has its CRC-32, so that all tensors are read back once more when the file
is finished (torch does not check it, other tools do). Members and offsets from 4 GiB on use zip64's fields.

Formats: PKWARE's APPNOTE 6.3, sections 4.3 to 4.5; torch's caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from loaders.containers.base import Checksum, Places
from loaders.containers.pytorch_pickle import PickledTensor, Ref, check_dtype, state_dict
from loaders.specs import OutputFile, Slot, StoredTensor

ALIGNMENT = 64  # kFieldAlignment in torch's inline_container.h
# Zip64: sizes and offsets from LIMIT on are in additional fields of 64 bits, and the fields of 32 bits then hold
# STANDS_FOR_LIMIT. MANY is the same limit for the number of members, whose field has 16 bits.
LIMIT = 0xFFFFFFFF
STANDS_FOR_LIMIT = 0xFFFFFFFF
MANY = 0xFFFF
UTF8 = 0x0800  # the flag that says that names are UTF-8
NO_LENGTHS: Mapping[str, int] = {}
BEFORE = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
AFTER = {"version": b"3\n"}


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the zip: where its header and its bytes begin, its size, and its tensor's name, if it is one."""

    name: str
    header: int
    start: int
    size: int
    slot: str | None

    @property
    def is_large(self) -> bool:
        return self.size >= LIMIT


def lay_out(file: str, tensors: Iterable[StoredTensor], about: Any = None) -> OutputFile:
    """Give every tensor its place: by name, lengths that are not known yet last.

    `about` is the tree that the pickle describes, as (module, {key: value}) pairs; None is a flat dict of the tensors.

    Raises:
        BadSpec: torch has no such dtype.
    """
    whole = {tensor.name: tensor.whole or tensor.spec for tensor in tensors}
    slots = []
    for name, spec in sorted(whole.items(), key=lambda each: (each[1].is_bound, each[0])):
        check_dtype(name, spec.dtype)
        slots.append(Slot(name=name, dtype=spec.dtype, shape=spec.shape, offset=0, is_bound=spec.is_bound))
    members = members_of(file, slots, own_members(file, slots, about, {}))
    starts = {member.slot: member.start for member in members if member.slot is not None}
    first = min(starts.values(), default=0)
    end = max(member.start + member.size for member in members if member.slot is not None or not starts)
    placed = tuple(
        Slot(
            name=slot.name, dtype=slot.dtype, shape=slot.shape, offset=starts[slot.name] - first, is_bound=slot.is_bound
        )
        for slot in slots
    )
    last = members[-1]
    tail = last.start + last.size + len(directory_bytes(members, {})) - end
    return OutputFile(
        name=file,
        header_bytes=first,
        data_bytes=end - first,
        slots=placed,
        container="pytorch",
        tail_bytes=tail,
        about=about,
    )


def place(file: OutputFile, lengths: Mapping[str, int]) -> Places:
    """Return the places of the tensors, given the lengths of those that depend on values."""
    own = own_members(file.name, file.slots, file.about, lengths)
    members = members_of(file.name, file.slots, own, lengths)
    return {member.slot: (member.start, member.size) for member in members if member.slot is not None}


def frame(file: OutputFile, places: Places, checksum: Checksum) -> list[tuple[int, bytes]]:
    """Return every member that is no tensor, every member's header, and the directory."""
    lengths = {slot.name: places[slot.name][1] for slot in file.slots if slot.is_bound}
    own = own_members(file.name, file.slots, file.about, lengths)
    members = members_of(file.name, file.slots, own, lengths)
    pieces, sums = [], {}
    for member in members:
        if member.slot is None:
            data = own[member.name]
            sums[member.name] = zlib.crc32(data)
            pieces.append((member.start, data))
        else:
            sums[member.name] = checksum(member.start, member.size)
        pieces.append((member.header, header_bytes(member, sums[member.name])))
    last = members[-1]
    pieces.append((last.start + last.size, directory_bytes(members, sums)))
    return pieces


def own_members(file: str, slots: Iterable[Slot], about: Any, lengths: Mapping[str, int]) -> dict[str, bytes]:
    """Return the bytes of the members that are no tensors, by name."""
    root = PurePosixPath(file).stem
    tensors = {}
    for key, slot in enumerate(slots):
        size = lengths.get(slot.name, slot.size)
        shape = (size // slot.dtype.item_bytes,) if slot.is_bound else slot.shape
        tensors[slot.name] = PickledTensor(str(key), slot.dtype, shape)
    flat = ((name, Ref(name)) for name in tensors)
    pickled = state_dict(flat if about is None else ((module, dict(values)) for module, values in about), tensors)
    plain = {"data.pkl": pickled, **BEFORE, **AFTER}
    return {f"{root}/{name}": data for name, data in plain.items()}


def members_of(
    file: str, slots: Iterable[Slot], own: Mapping[str, bytes], lengths: Mapping[str, int] = NO_LENGTHS
) -> list[Member]:
    """Return all members in the order of their bytes; `own` are those that are no tensors: see `own_members`."""
    root = PurePosixPath(file).stem
    sizes = {name: len(data) for name, data in own.items()}
    order: list[tuple[str, int, str | None]] = [(f"{root}/{name}", 0, None) for name in ("data.pkl", *BEFORE)]
    order += [(f"{root}/data/{key}", lengths.get(s.name, s.size), s.name) for key, s in enumerate(slots)]
    order += [(f"{root}/{name}", 0, None) for name in AFTER]
    members, at = [], 0
    for name, size, slot in order:
        size = sizes.get(name, size)
        # 30 bytes of local header, the name, zip64's extra field where it is needed, and 4 of the one that pads.
        start = at + 30 + len(name.encode()) + (20 if size >= LIMIT else 0) + 4
        start += -start % ALIGNMENT
        members.append(Member(name, at, start, size, slot))
        at = start + size
    return members


def header_bytes(member: Member, checksum: int) -> bytes:
    """Return a member's local header, padded by an extra field so that the member's bytes are aligned.

    The field has the id "FB" and is filled with "Z", as torch's getPadding in inline_container.cc makes it.
    """
    name, size = member.name.encode(), STANDS_FOR_LIMIT if member.is_large else member.size
    extra = struct.pack("<HHQQ", 1, 16, member.size, member.size) if member.is_large else b""
    room = member.start - member.header - 30 - len(name) - len(extra) - 4
    extra += b"FB" + struct.pack("<H", room) + b"Z" * room
    version = 45 if member.is_large else 20  # 4.5 is the first version of the format with zip64
    return (
        struct.pack("<4sHHHHHIIIHH", b"PK\3\4", version, UTF8, 0, 0, 0, checksum, size, size, len(name), len(extra))
        + name
        + extra
    )


def _narrow(number: int) -> int:
    """Return what a field of 32 bits holds for a number."""
    return STANDS_FOR_LIMIT if number >= LIMIT else number


def directory_bytes(members: list[Member], checksums: Mapping[str, int]) -> bytes:
    """Return the directory, which follows the last member: an entry for each, and where the entries begin.

    A missing checksum counts as 0, which is enough to know the directory's length.
    """
    entries = []
    for member in members:
        wide = [each for each in (member.size, member.size, member.header) if each >= LIMIT]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, header = _narrow(member.size), _narrow(member.header)
        name, version = member.name.encode(), 45 if wide else 20
        entries.append(
            struct.pack(
                "<4sHHHHHHIIIHHHHHII", b"PK\1\2", version, version, UTF8, 0, 0, 0, checksums.get(member.name, 0), size,
                size, len(name), len(extra), 0, 0, 0, 0, header,
            )
            + name
            + extra
        )  # fmt: skip
    made, last = b"".join(entries), members[-1]
    at, count = last.start + last.size, len(members)
    end = b""
    if at >= LIMIT or count >= MANY or len(made) >= LIMIT:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(made), at)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, at + len(made), 1)
    few = min(count, MANY)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, _narrow(len(made)), _narrow(at), 0)
    return made + end
