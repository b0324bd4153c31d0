"""The reader of SentencePiece's tokenizer.model: the pieces of its vocabulary, and the settings that matter here.

The file is a protobuf message (sentencepiece, src/sentencepiece_model.proto: ModelProto). Only what is needed is read,
which takes no protobuf library. No length or number is trusted beyond the bytes that are left. sentencepiece itself
(0.2.3) would not do: its processor tells neither which tokens are a user's, nor the kind of model, nor what its
normalizer does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from loaders.errors import BadCheckpoint
from loaders.storage.base import PinnedFiles

LARGEST = 1 << 28  # bytes: the largest published models have some 5 MB
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]{1,200}={0,2} [0-9]+\s")  # its first line: a token in base64, and its rank
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf's wire types


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its text with U+2581 for spaces, its score, and one of the types above."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A tokenizer.model.

    `model_type` is UNIGRAM, BPE, or another; `adds_prefix`: a text gets a space before it; `removes_spaces`: of several
    spaces one stays; `charsmap`: what characters become before anything else, as a trie of sentencepiece's own.
    """

    pieces: tuple[Token, ...]
    model_type: int
    adds_prefix: bool
    removes_spaces: bool = True
    charsmap: bytes = b""


def read_model(files: PinnedFiles, name: str) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        BadCheckpoint: it is not a SentencePiece model, or damaged.
    """
    raw = files.read_all(name, LARGEST)
    if TIKTOKEN.match(raw[:256]):
        raise BadCheckpoint(
            f"{name}: not a model of SentencePiece but tiktoken's, without special tokens; fetch the model's"
            " tokenizer.json as well"
        )
    try:
        pieces, model_type, normalizer = [], UNIGRAM, b""
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):  # TrainerSpec
                model_type = _last_int(value, 3, UNIGRAM)
            elif number == 3 and isinstance(value, bytes):  # NormalizerSpec
                normalizer += value  # a message that comes in parts is all of them
        adds_prefix, removes_spaces = (bool(_last_int(normalizer, field, 1)) for field in (3, 4))
        maps = [value for number, value in _fields(normalizer) if number == 2 and isinstance(value, bytes)]
        charsmap = maps[-1] if maps else b""
    except (ValueError, struct.error) as error:
        raise BadCheckpoint(f"{name}: not a model of SentencePiece, or damaged ({error}); fetch it again") from None
    if not pieces:
        raise BadCheckpoint(f"{name}: it holds no pieces; not a model of SentencePiece? fetch it again")
    return SentencePieceModel(tuple(pieces), model_type, adds_prefix, removes_spaces, charsmap)


def _piece(raw: bytes) -> Token:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"the piece {text!r} has the unknown type {kind}")
    return Token(text, score, kind)


def _last_int(raw: bytes, wanted: int, default: int) -> int:
    """Return an integer field of a message. Of repeated ones the last counts, as protobuf wants it."""
    found = [value for number, value in _fields(raw) if number == wanted and isinstance(value, int)]
    return found[-1] if found else default


def _fields(raw: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield the fields of a message by number. Those of 64 bits are skipped: none of them is needed."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(raw, at)
            yield key >> 3, value
        elif kind == LENGTH:
            length, at = _varint(raw, at)
            if length > len(raw) - at:
                raise ValueError(f"{length} bytes announced where {len(raw) - at} are left")
            yield key >> 3, raw[at : at + length]
            at += length
        elif kind == FIXED32:
            yield key >> 3, struct.unpack_from("<f", raw, at)[0]
            at += 4
        elif kind == FIXED64 and len(raw) - at >= 8:
            at += 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first, of at most ten bytes; return it and where it ends."""
    value = 0
    for index in range(10):
        if at + index >= len(raw):
            raise ValueError("it ends within a number")
        byte = raw[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"a number of more than 10 bytes at byte {at}")
