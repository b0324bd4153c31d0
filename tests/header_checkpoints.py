"""Checkpoints of real published layouts without their weights: headers, config, index; data are holes in sparse files.

    python -m tests.header_checkpoints OUT                       every layout of tests/headers, each into OUT/NAME
    python -m tests.header_checkpoints OUT qwen3-8b deepseek-v3  these
    python -m tests.header_checkpoints --list                    what there is: tensors, bytes, where it was published
    python -m tests.header_checkpoints --derive config.json HUB_ID tests/headers/NAME.json
                                                                 a new one: names and shapes of transformers' class on
                                                                 the meta device, renamed back to what is published

A layout is one JSON document:

    hub_id     where the model is published
    known      how well the layout is known: see KNOWN
    about      what was done by hand
    config     config.json, as it is
    files      other JSON files that belong there (hf_quant_config.json ...)
    index      the index's file name; null: one file without an index
    shards     bytes a shard (tensors in natural order of names), or [[tensors, shard], ...] runs in that order, as in
               the published index
    count      how many shards, where runs are given
    data       {pattern: text}: tensors that hold this, where a header alone does not tell the format (bitsandbytes'
               quant_state); all others are holes
    total      a name for the shards that has {number} and {count}; "model-{number:05}-of-{count:05}.safetensors"
    tensors    [pattern, dtype, shape]; {0-2,7} in a pattern stands for each of these numbers

A folder of a terabyte takes a few MB of disk and some seconds to make.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loaders.architectures.families import natural_key

HEADERS = Path(__file__).resolve().parent / "headers"
KNOWN = {
    "index": "names and shards of a copy of the published index, and a copy of the published config",
    "names": "names of a published index, shapes of the config; shards by size",
    "derived": "a copy of the published config; names and shapes by transformers' own conversion back",
    "values": "config written from the published values; names and shapes by transformers' own conversion back",
    "hand": "config copied or written from the published values; names written by hand from the engines' loaders",
}
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "U32": 32,
    "BOOL": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
SHARD_NAME = "model-{number:05}-of-{count:05}.safetensors"
PLACE = re.compile(r"\{([\d,-]+)\}")
Tensors = dict[str, tuple[str, tuple[int, ...]]]


# --- patterns


def numbers(text: str) -> list[int]:
    """ "0-2,7" -> [0, 1, 2, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def expand(pattern: str) -> Iterator[str]:
    """Every name that a pattern stands for."""
    parts = PLACE.split(pattern)
    choices = [[p] if i % 2 == 0 else [str(n) for n in numbers(p)] for i, p in enumerate(parts)]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def ranges(found: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    runs: list[list[int]] = []
    for n in sorted(found):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _boxes(tuples: set[tuple[int, ...]]) -> list[tuple[frozenset[int], ...]]:
    """Tuples of numbers as products of sets."""
    if not tuples or not next(iter(tuples)):
        return [()] if tuples else []
    rest: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *others in tuples:
        rest[first].add(tuple(others))
    alike: dict[frozenset[tuple[int, ...]], set[int]] = defaultdict(set)
    for first, others in rest.items():
        alike[frozenset(others)].add(first)
    return [(frozenset(f), *box) for others, f in alike.items() for box in _boxes(set(others))]


def compress(tensors: Tensors) -> list[list[Any]]:
    """Patterns for names; a number between dots is a place."""
    groups: dict[tuple[str, str, tuple[int, ...]], set[tuple[int, ...]]] = defaultdict(set)
    for name, (dtype, shape) in tensors.items():
        pieces = re.split(r"(?:(?<=\.)|^)(\d+)(?=\.|$)", name)
        key = "\0".join(pieces[::2]), dtype, tuple(shape)
        groups[key].add(tuple(int(n) for n in pieces[1::2]))
    rows = []
    for (text, dtype, shape), tuples in groups.items():
        for box in _boxes(tuples):
            places = iter(box)
            pieces = text.split("\0")
            pattern = pieces[0] + "".join(f"{{{ranges(next(places))}}}{piece}" for piece in pieces[1:])
            rows.append([pattern, dtype, list(shape)])
    return rows


def tensors_of(entry: Mapping[str, Any]) -> Tensors:
    """All tensors of an entry, in natural order of their names."""
    found = {name: (dtype, tuple(shape)) for pattern, dtype, shape in entry["tensors"] for name in expand(pattern)}
    return {name: found[name] for name in sorted(found, key=natural_key)}


def size(dtype: str, shape: Sequence[int]) -> int:
    return -(-math.prod(shape) * BITS[dtype] // 8)


EXPERTS = re.compile(r"(?<=\bexperts\.)\{0-(\d+)\}")
ROUTER = re.compile(r"(?:^|\.)(?:gate|router)\.|correction_bias$")
COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok")
GROUPS = {"n_group": 2, "topk_group": 4}  # of experts, which are fewer than these: by how much


def with_few_experts(entry: Mapping[str, Any], few: int) -> dict[str, Any]:
    """Return a layout whose mixtures have `few` experts a layer, where these lie one by one: all of them are alike."""
    if not any(EXPERTS.search(pattern) for pattern, _, _ in entry["tensors"]):
        return dict(entry)

    most = dict.fromkeys(COUNTS, few) | {key: max(1, few // part) for key, part in GROUPS.items()}

    def lowered(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: lowered(value)
            if isinstance(value, dict)
            else min(value, most[key])
            if value and key in most
            else value
            for key, value in config.items()
        }

    def cut(pattern: str, shape: list[int]) -> list[int]:
        return [few if size == count else size for size in shape] if ROUTER.search(pattern) else shape

    count = max(int(found[1]) + 1 for pattern, _, _ in entry["tensors"] if (found := EXPERTS.search(pattern)))
    rows = [
        [EXPERTS.sub(f"{{0-{few - 1}}}", pattern), dtype, cut(pattern, shape)]
        for pattern, dtype, shape in entry["tensors"]
    ]
    return {**entry, "config": lowered(entry["config"]), "tensors": rows, "shards": 5_000_000_000}


# --- files


def shards_of(entry: Mapping[str, Any], tensors: Tensors) -> list[list[str]]:
    """Which tensors lie in which file."""
    shards, names = entry["shards"], list(tensors)
    if isinstance(shards, list):
        made: list[list[str]] = [[] for _ in range(entry["count"])]
        at = 0
        for run, shard in shards:
            made[shard - 1] += names[at : at + run]
            at += run
        assert at == len(names), f"runs cover {at} of {len(names)} tensors"
        return made
    made, held = [[]], 0
    for name in names:
        bytes_ = size(*tensors[name])
        if made[-1] and shards and held + bytes_ > shards:
            made.append([])
            held = 0
        made[-1].append(name)
        held += bytes_
    return made


def write_sparse(path: Path, names: Sequence[str], tensors: Tensors, data: Mapping[str, bytes]) -> None:
    """A safetensors file whose data is a hole, but for what `data` says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        dtype, shape = tensors[name]
        bytes_ = size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + bytes_]}
        at += bytes_
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
        for name in data.keys() & set(names):
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(data[name])


def make(entry: Mapping[str, Any], folder: Path) -> None:
    """The checkpoint of an entry."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(entry)
    shards = shards_of(entry, tensors)
    pattern = entry.get("total", SHARD_NAME)
    data = {name: text.encode() for pattern_, text in entry.get("data", {}).items() for name in expand(pattern_)}
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = pattern.format(number=number, count=len(shards)) if entry.get("index") else "model.safetensors"
        write_sparse(folder / file, names, tensors, data)
        weight_map |= dict.fromkeys(names, file)
    documents = {"config.json": entry["config"], **entry.get("files", {})}
    if entry.get("index"):
        total = sum(size(*tensor) for tensor in tensors.values())
        documents[entry["index"]] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, document in documents.items():
        if document is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(document, indent=1))


# --- the catalogue


def entries() -> dict[str, dict[str, Any]]:
    """Return all layouts by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(HEADERS.glob("*.json"))}


def dump(entry: Mapping[str, Any]) -> str:
    """Return a layout as text: a tensor pattern a line, all else compact."""
    head = {key: value for key, value in entry.items() if key != "tensors"}
    lines = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in head.items()]
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in entry["tensors"])
    return "{" + ",\n".join([*lines, f'"tensors":[\n{rows}\n]']) + "}\n"


def derive(config: Mapping[str, Any]) -> Tensors:
    """Return names, dtypes and shapes as published, by transformers' class and its own conversion back."""
    from loaders.lint.engines.transformers import Model, cleaned

    return published(Model(cleaned(config), "plain"))


def published(found: Any) -> Tensors:
    """Return names, dtypes and shapes that a class of loaders.lint.engines.transformers.Model is saved with."""
    from transformers.core_model_loading import revert_weight_conversion

    state = revert_weight_conversion(found.model, {k: v for k, v in found.state.items() if k not in found.tied})
    known = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "bool": "BOOL"}
    return {name: (known[str(value.dtype).split(".")[-1]], tuple(value.shape)) for name, value in state.items()}


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--list"]:
        for name, entry in entries().items():
            tensors = tensors_of(entry)
            total = sum(size(*tensor) for tensor in tensors.values())
            print(f"{name:32} {len(tensors):7} {total / 1e9:9.1f} GB  {entry['known']:8} {entry.get('hub_id', '')}")
        return 0
    if arguments[:1] == ["--derive"] and len(arguments) == 4:
        config = json.loads(Path(arguments[1]).read_text())
        entry = {"hub_id": arguments[2], "known": "derived", "config": config, "shards": 5_000_000_000,
                 "index": "model.safetensors.index.json", "tensors": compress(derive(config))}  # fmt: skip
        Path(arguments[3]).write_text(dump(entry))
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    known = entries()
    for name in arguments[1:] or known:
        make(known[name], Path(arguments[0]) / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
