"""Bounds of everything that a file from a stranger may choose: counts, lengths, depths, products, texts.

A limit is that of the format's own reader where there is one, and else several times what the largest published models
need. A file beyond it is refused before memory or time is spent on it; no limit has to be raised for a model in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.words import LINE_BREAK

# --- files

MOST_FILES = 100_000  # in a checkpoint's folder; the largest published have a few thousand
MOST_FOLDERS = 100  # one in another: what walks through or removes folders calls itself for each

# --- tensors

MOST_TENSORS = 600_000  # of a checkpoint: several times those of models with a tensor for each of some hundred experts
LONGEST_NAME = 4096  # bytes of a tensor's name; GGUF has 63 (below)
NAME_PARTS = 64  # of a tensor's name, between dots: each is a place at which a pattern for names may begin
MOST_DIMENSIONS = 32  # torch's and numpy's own are 64, of which no weight has more than 5
MOST_NUMBERS = (1 << 63) - 1  # elements of a tensor, and bytes of one: what file offsets and numpy's sizes hold

# --- containers

SAFETENSORS_HEADER = 100_000_000  # bytes: MAX_HEADER_SIZE of safetensors' Rust code
GGUF_NAME = 63  # bytes: GGML_MAX_NAME without the terminating zero
GGUF_DIMENSIONS = 4  # GGML_MAX_DIMS
GGUF_TEXT = 16 << 20  # bytes of one text of the metadata; llama.cpp's own limit, 1 GiB, is for no model in use
GGUF_ITEMS = 8_000_000  # items of all arrays of the metadata: large vocabularies have 300,000, merges 600,000
GGUF_KEYS = 65_536  # entries of the metadata; llama.cpp's converter writes some dozens
GGUF_HEADER = 512 << 20  # bytes of all of the metadata
PICKLE_BYTES = 256 << 20  # of data.pkl, which has a few hundred bytes a tensor
PICKLE_LINE = 1024  # bytes of a line in it: names of torch, and numbers
PICKLE_ARGUMENTS = 16  # of a call
PICKLE_KEY = (1 << 31) - 1  # the largest whole number as a key of a dict: those of optimizers count parameters
# Operations: each tensor takes some sixty. A legacy file does not say how many tensors it has.
PICKLE_OPS, PICKLE_OPS_PER_MEMBER, PICKLE_LEGACY_OPS = 1 << 18, 256, 1 << 20
ZIP_DIRECTORY = 256 << 20  # bytes of a zip's directory: MOST_MEMBERS of some 100 bytes
ZIP_MEMBERS = 2 * MOST_TENSORS  # a storage for each tensor, and files beside them
# Times that a PyTorch file's bytes may be a tensor's: as views, such as a matrix beside its transposed self, and under
# several names, such as those of layers that are one. More would be an output out of proportion to its source.
PICKLE_VIEWS, PICKLE_SHARED = 4, 64
PACKED_EXPERTS = 65_536  # of a layer
TINY = 1 << 20  # bytes up to which a tensor may claim more numbers than its file holds, as an expanded view does

# --- JSON, TOML and texts

JSON_CONFIG = 16 << 20  # bytes of config.json and of files of its kind: the largest published have some 2 MB
JSON_INDEX = 256 << 20  # bytes of an index, of a tokenizer: a hundred bytes for each of MOST_TENSORS
JSON_REPORT = 1 << 30  # bytes of a report of weightmill's: some 1,500 for each of MOST_TENSORS
JSON_VALUES = 8_000_000  # values in one file of JSON: 13 for each of MOST_TENSORS
CONFIG_VALUES = 1_000_000  # values in a config.json
CONFIG_LAYERS = 10_000  # of a model
CONFIG_NUMBER = 1 << 53  # the largest whole number that every reader of JSON takes
CONFIG_DEPTH = 32  # objects in one another
PATTERN = 20_000  # characters of a regular expression; some tools list every layer in one
PATTERNS = 4096  # regular expressions of one list, each of which may meet every name
PATTERN_SECONDS = 1.0  # for which one pattern may be matched with one name where no linear engine takes it
LIST_SECONDS = 5.0  # for which the patterns of one list may be matched so
PATTERN_TRIES = 1 << 24  # names that those of one list may meet: 28 patterns for each of MOST_TENSORS, some 20 seconds
SCANNED = 1 << 33  # characters of names that are looked through for entries of a list which are no module's: 8 seconds
RULE_VALUES = 10_000  # values in a file of rules, those of aliases counted each time
TOKEN = 512  # letters of a token that is cut into pairs, for merges

# --- messages

SHOWN_CHARACTERS = 80  # of a stranger's value in a message


def shown(value: object) -> str:
    """Return a short text of a stranger's value for a message: long texts are cut, and of lists and such the type.

    A value can refer to itself or share its parts, so that its repr would take for ever; nothing is asked of it.
    """
    if isinstance(value, str | bytes):
        cut = value[:SHOWN_CHARACTERS]
        return repr(cut) if len(value) <= SHOWN_CHARACTERS else f"{cut!r}... ({len(value)} characters)"
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple) and len(value) <= 8 and all(type(n) in (int, float, bool) for n in value):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Sequence | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def check_name(name: object, where: str = "") -> str:
    """Return the name of a tensor, if it is one; `where`, a file, begins the message.

    Raises:
        BadCheckpoint: it is no text, empty, longer than LONGEST_NAME, or of several lines.
    """
    place = f"{where}: " if where else ""
    if not isinstance(name, str) or not name:
        raise BadCheckpoint(f"{place}the name {shown(name)} is none of a tensor; do not trust this file")
    # At most four bytes a letter, so that few names need be encoded to be counted.
    try:
        size = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError:
        raise BadCheckpoint(f"{place}the name {shown(name)} is no text; do not trust this file") from None
    if size > LONGEST_NAME or name.count(".") >= NAME_PARTS:
        raise BadCheckpoint(
            f"{place}the name {shown(name)} has {size} bytes and {name.count('.') + 1} parts; at most {LONGEST_NAME}"
            f" and {NAME_PARTS} are read"
        )
    if LINE_BREAK.search(name):
        raise BadCheckpoint(f"{place}the name {shown(name)} has a line break, which no model's has; rename the tensor")
    return name


def check_tensors(count: int, where: str) -> None:
    """Raise BadCheckpoint if a file, or a checkpoint, has more than MOST_TENSORS tensors."""
    if count > MOST_TENSORS:
        raise BadCheckpoint(f"{where}: {count} tensors, at most {MOST_TENSORS} are read; do not trust it")


def check_patterns(count: int, place: str) -> None:
    """Raise BadCheckpoint if a list of a config has more than PATTERNS regular expressions, before one is compiled."""
    if count > PATTERNS:
        raise BadCheckpoint(f"{place}: {count} patterns, at most {PATTERNS} are read; name the modules, or use fewer")


def check_shape(shape: Any, most: int = MOST_DIMENSIONS) -> tuple[int, ...]:
    """Return the shape of a tensor: at most `most` whole numbers from 0, whose product a file could hold.

    Raises:
        BadCheckpoint: it is none.
    """
    if not isinstance(shape, list | tuple):
        raise BadCheckpoint(f"its shape is {shown(shape)}, expected a list of whole numbers")
    if len(shape) > most:
        raise BadCheckpoint(f"its shape has {len(shape)} dimensions, at most {most} are read")
    if not all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in shape):
        raise BadCheckpoint(f"its shape is {shown(shape)}, expected whole numbers from 0 to {MOST_NUMBERS}")
    product(shape)
    return tuple(shape)


def product(numbers: Iterable[int]) -> int:
    """Return a product of whole numbers from 0.

    Raises:
        BadCheckpoint: it, or it without a factor of 0, is more than MOST_NUMBERS.
    """
    found, has_zero = 1, False
    for number in numbers:
        has_zero = has_zero or number == 0
        found *= number or 1
        if found > MOST_NUMBERS:
            raise BadCheckpoint("its shape has more numbers than any file could hold; do not trust it")
    return 0 if has_zero else found


def first_twice(names: Sequence[str]) -> str | None:
    """Return the first name that stands twice in a list; None if none does."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON's pairs, for `json.loads`. Python would keep the last of equal names, another the first.

    Raises:
        ValueError: a name appears twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(first_twice([name for name, _ in pairs]))} appears twice")
    return found


def read_json_text(raw: bytes | memoryview, most_values: int = JSON_VALUES, *, twice: bool = True) -> Any:
    """Parse JSON of at most `most_values` values, which are counted, roughly, before any is made.

    Without `twice` a name that an object has twice is refused.

    Raises:
        ValueError: it is no JSON, has too many values, or nests too deep.
    """
    data = bytes(raw)
    # What separates values; in texts they count as well, of which no file has so many.
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > most_values:
        raise ValueError(f"about {values} values, at most {most_values} are read")
    try:
        return json.loads(data, object_pairs_hook=None if twice else unique)
    except RecursionError:
        raise ValueError("lists or objects nest too deep") from None
