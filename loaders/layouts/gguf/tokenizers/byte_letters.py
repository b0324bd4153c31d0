"""The letter by which a byte-level BPE shows each byte: GPT-2's bytes_to_unicode."""

from __future__ import annotations

from functools import cache


@cache
def byte_letters() -> tuple[str, ...]:
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in shown else next(others)) for byte in range(256))
