"""Family files, proposed and checked by the engines' own code.

    python -m tests.families qwen3_5_moe          propose the section of a model type, to be read by a person
    python -m tests.families --check              hold every family file against the installed engine
    python -m tests.families --check qwen3_5_moe  these types

--engine mlx is the engine, mlx-lm. A type is asked about by a tiny checkpoint: give it a row in tests/tiny_configs.py,
or in MORE of tests/mlx_reference.py.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from loaders.architectures.family import text_config
from loaders.architectures.family_files import section
from loaders.architectures.layers import layer_of
from loaders.errors import BadCheckpoint, BadSpec
from loaders.tensors.form_views import VIEWS, Piece
from tests import mlx_reference, mlx_trace
from tests.mlx_trace import Numbered, Trace
from tests.tiny_configs import TINY

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
SINGLE = re.compile(r"^(.*layers\.\d+)\.?(.*?)\.?experts\.\d+\.(\w+)\.(weight|bias)$")
STACKED = re.compile(r"^(.*layers\.\d+)\.(.*)\.(\w+)\.(weight|bias)$")
REASON = "say why"


def kinds() -> dict[str, str]:
    """Return the kinds of tiny checkpoints that mlx-lm can be asked about, and their model types."""
    found = {**TINY, **mlx_reference.MORE}
    return {kind: kind if kind in mlx_reference.OWN_TYPES else tiny.model_type for kind, tiny in found.items()}


# --- proposing


def proposed(source: Numbered, trace: Trace) -> dict[str, Any]:
    """Return the section that a trace shows."""
    made: dict[str, Any] = {}
    pairs, forms, experts = list[tuple[str, str]](), dict[str, dict[str, Any]](), dict[str, Any]()
    cut: dict[str, list[str]] = {}
    found = {own: mlx_trace.split(values) for own, values in trace.tensors.items()}
    for own, (numbers, added) in found.items():
        names = source.sources(numbers)
        if len(names) > 1 and (one := SINGLE.match(names[0])) and (stack := STACKED.match(own)):
            experts |= {"module": one[2], "stack": stack[2].removeprefix(f"{one[2]}.")}
            experts.setdefault("matrices", {})[stack[3]] = one[3]
            continue
        row = _form(source, names[0], numbers, added)
        if row is None:
            cut.setdefault(names[0], []).append(own)
        elif row:
            forms.setdefault(_open(names[0]), row)
        if row is not None:
            pairs.append((names[0], own))
    forms |= {_open(name): _cutting(source, trace, name, owns) for name, owns in cut.items()}
    published = {own: source.sources(numbers)[0] for own, (numbers, _) in found.items()}
    used = {name for numbers, _ in found.values() for name in source.sources(numbers)}
    names, inside = _renamings(pairs)
    settings = {
        "nested": "text_config" in source.config, "experts": experts, "names": names, "inside": inside,
        "drop": [[f"^{re.escape(start)}", REASON] for start in _starts(_of_the_model(source) - used, used)],
        "keep": _rows(published[name] for name in trace.plain),
        "fine": _rows(published[f"{path}.weight"] for path in trace.fine),
        "uncast": [pattern for pattern, _ in _rows(published[name] for name in trace.uncast)],
        "forms": [{"name": f"{re.escape(name)}$".replace(r"\#", r"\d+"), **row} for name, row in forms.items()],
    }  # fmt: skip
    made |= {key: value for key, value in settings.items() if value}
    heads = [name for name in trace.tensors if name.endswith("lm_head.weight")]
    return made if heads else {**made, "head": "tied, or as config.json says"}


def _of_the_model(source: Numbered) -> set[str]:
    """Return the tensors of layers that config.json counts; no family says anything of the others."""
    count = text_config(source.config, "num_hidden_layers")
    beyond = {name for name in source.shapes if count is not None and (layer_of(name) or 0) >= count}
    return source.shapes.keys() - beyond


def _open(name: str) -> str:
    """Return a name's last parts, from its layer on."""
    return NUMBER.sub("#", name).rpartition("layers.#.")[2]


def _form(source: Numbered, name: str, numbers: np.ndarray, added: float) -> dict[str, Any] | None:
    """Return the words that make a tensor of one source, {} if it is as published; None if it is a part of it."""
    values = {"values": "plus_one"} if added == 1 else {} if added == 0 else {"values": "?"}
    whole = source.of(name)
    if np.array_equal(numbers, whole):
        return values
    for word, view in VIEWS.items():
        pieces = _pieces(view, whole, source)
        if len(pieces) == 1 and np.array_equal(pieces[0], numbers):
            return {"view": word, **values}
    return {"view": "?", **values} if numbers.size == whole.size else None


def _pieces(
    view: Callable[[np.ndarray, Mapping[str, Any]], list[Piece]], whole: np.ndarray, source: Numbered
) -> list[np.ndarray]:
    """Return what a word makes of a tensor; nothing if it is for tensors of another shape, or other settings."""
    try:
        return [piece.view for piece in view(whole, source.config.get("text_config") or source.config)]
    except (BadCheckpoint, BadSpec, ValueError, IndexError):
        return []


def _cutting(source: Numbered, trace: Trace, name: str, owns: Sequence[str]) -> dict[str, Any]:
    """Return the words that cut a tensor into several of mlx-lm's."""
    found = {own: mlx_trace.split(trace.tensors[own])[0] for own in owns}
    for word, view in VIEWS.items():
        pieces = _pieces(view, source.of(name), source)
        order = [next((own for own, each in found.items() if np.array_equal(each, p)), None) for p in pieces]
        if pieces and None not in order and len(order) == len(owns):
            return {"view": word, "to": [_open(str(own)) for own in order]}
    return {"view": "?", "to": [_open(own) for own in owns]}


def _renamings(pairs: Iterable[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the beginnings and the inner parts of names that differ."""
    names, inside = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for published, own in pairs:
        one, other = published.split("."), own.split(".")
        same = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), None)
        same = min(len(one), len(other)) if same is None else same
        start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        if one == other:
            continue
        first, second = one[: len(one) - same], other[: len(other) - same]
        # Where one of the two is empty, the next part that both have says where it is.
        more = one[len(one) - same :][:1] if start >= min(len(first), len(second)) or not first else []
        if start and any(part.isdigit() for part in first):
            inside[f".{'.'.join(first[start:] + more)}.", f".{'.'.join(second[start:] + more)}."] += 1
        else:
            names[f"{'.'.join(first + more)}.", f"{'.'.join(second + more)}."] += 1
    return [list(pair) for pair, _ in names.most_common()], [list(pair) for pair, _ in inside.most_common()]


def _starts(unused: Iterable[str], used: Iterable[str]) -> list[str]:
    """Return the shortest beginnings of unused names that no used name has."""
    found = dict[str, None]()
    taken = set(used)
    for name in sorted(unused):
        parts = name.split(".")
        starts = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        found[next((s for s in starts if not any(u.startswith(f"{s}.") for u in taken)), name)] = None
    return list(found)


def _rows(names: Iterable[str]) -> list[list[str]]:
    return [[f"{re.escape(name)}$".replace(r"\#", r"\d+"), REASON] for name in dict.fromkeys(map(_open, names))]


# --- the command


def propose(kind: str, root: Path) -> str:
    source = mlx_trace.numbered(kind, root)
    made = proposed(source, mlx_trace.traced(kind, source))
    needs = mlx_trace.needed(kind, source)
    said = f"# mlx-lm needs {', '.join(needs)}, which this config.json lacks\n" if needs else ""
    head = f"# {kind}.\nmodel_types: [{kinds()[kind]}]\n"
    return said + head + yaml.safe_dump({"mlx": made}, sort_keys=False, width=110)


def checked(kind: str) -> list[str]:
    """Return what a type's family file says otherwise than the installed mlx-lm."""
    with tempfile.TemporaryDirectory(prefix="families-") as root:
        return list(mlx_trace.differences(kind, Path(root)))


def main(arguments: Sequence[str]) -> int:
    engine = dict(pairwise(arguments)).get("--engine", "mlx")
    names = [each for each in arguments if not each.startswith("-") and each != engine]
    known: Mapping[str, str] = kinds()
    if engine != "mlx" or not (names or "--check" in arguments) or not set(names) <= known.keys():
        print(__doc__, f"\nTypes: {', '.join(known)}")
        return 2
    if "--check" not in arguments:
        for kind in names:
            with tempfile.TemporaryDirectory(prefix="families-") as root:
                print(propose(kind, Path(root)))
        return 0
    wrong = 0
    for kind in names or [k for k, t in known.items() if section(t, "mlx") and k not in mlx_reference.APART]:
        found = checked(kind)
        wrong += bool(found)
        print("\n".join([f"{kind:24} {'differs' if found else 'as mlx-lm'}", *(f"    {each}" for each in found[:8])]))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
