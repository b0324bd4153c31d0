"""A PyTorch file that several units write: a head, a piece of tensors for each unit, and the directory at the end.

A piece is a run of zip members with their headers, checksums included, so that it needs nothing of the other pieces.
The head, everything before the first tensor, is known in the plan. The directory repeats the checksums, which are read
back from the members' headers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

from loaders.containers.base import Checksum, Places
from loaders.containers.pytorch_write import Member, directory_bytes, header_bytes, members_of, own_members
from loaders.specs import OutputFile, Slot

CHECKSUM_AT = 14  # the offset of the CRC-32 in a member's local header
Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of the file


@dataclass(frozen=True, slots=True)
class ZipPiece:
    """A piece's place in its file: the folder in the zip, the key of its first tensor, and its byte offset."""

    root: str
    first_key: int
    start: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The bytes after the last piece: the member `version`, and the directory."""

    file: str
    slots: tuple[Slot, ...]
    about: Any
    size: int

    def made(self, read: Read) -> bytes:
        """Return the bytes of the tail; `read` reads from the file before it."""
        own = own_members(self.file, self.slots, self.about, {})
        members = members_of(self.file, self.slots, own)
        sums = {
            member.name: zlib.crc32(own[member.name])
            if member.slot is None
            else int.from_bytes(read(member.header + CHECKSUM_AT, 4), "little")
            for member in members
        }
        return _ending(members, own, sums)


def cut(file: str, shares: Sequence[Sequence[Slot]], about: Any) -> tuple[bytes, tuple[OutputFile, ...], Tail]:
    """Cut a file whose lengths are all known into its head, a piece for each share of the tensors, and its tail."""
    slots = tuple(slot for share in shares for slot in share)
    own = own_members(file, slots, about, {})
    members = members_of(file, slots, own)
    mine = [member for member in members if member.slot is not None]
    head = _whole(members[: members.index(mine[0])], own)
    pieces = []
    firsts = accumulate((len(share) for share in shares), initial=0)
    for number, (first, share) in enumerate(zip(firsts, shares, strict=False), 1):
        run = mine[first : first + len(share)]
        start, end = run[0].header, run[-1].start + run[-1].size
        placed = tuple(
            Slot(name=slot.name, dtype=slot.dtype, shape=slot.shape, offset=member.start - start)
            for slot, member in zip(share, run, strict=True)
        )
        piece = ZipPiece(PurePosixPath(file).stem, first, start)
        pieces.append(
            OutputFile(
                name=f"{file}.{number:05d}",
                header_bytes=0,
                data_bytes=end - start,
                slots=placed,
                container="pytorch piece",
                about=piece,
                within=(file, start),
            )
        )
    return head, tuple(pieces), Tail(file, slots, about, len(_ending(members, own, {})))


def _whole(members: Sequence[Member], own: Mapping[str, bytes]) -> bytes:
    """Return members that are no tensors, one after another, with their headers."""
    return b"".join(header_bytes(m, zlib.crc32(own[m.name])) + own[m.name] for m in members)


def _ending(members: list[Member], own: Mapping[str, bytes], checksums: Mapping[str, int]) -> bytes:
    """Return what follows the last tensor."""
    last = max((index for index, member in enumerate(members) if member.slot is not None), default=-1)
    return _whole(members[last + 1 :], own) + directory_bytes(members, checksums)


def place(file: OutputFile, lengths: Mapping[str, int]) -> Places:
    """Return the places of the tensors in the piece, which are those that were planned."""
    return {slot.name: (slot.offset, slot.size) for slot in file.slots}


def frame(file: OutputFile, places: Places, checksum: Checksum) -> list[tuple[int, bytes]]:
    """Return every member's header, with the checksum of its tensor."""
    piece, found, at = file.about, [], 0
    assert isinstance(piece, ZipPiece)
    for key, slot in enumerate(file.slots, piece.first_key):
        name = f"{piece.root}/data/{key}"
        member = Member(name, piece.start + at, piece.start + slot.offset, slot.size, slot.name)
        found.append((at, header_bytes(member, checksum(slot.offset, slot.size))))
        at = slot.offset + slot.size
    return found
