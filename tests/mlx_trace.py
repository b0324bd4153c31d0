"""What mlx-lm makes of a checkpoint's tensors: its own sanitize, run on arrays in which each element has a number.

A number tells where an element came from, whatever the code did to it: it was renamed, stacked, cut, turned. Numbers
are multiples of STEP, so that one that was added to is seen.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests import mlx_reference, passes, tiny_models
from tests.engines import mlx_lm_or_skip
from tests.making import Raw, read_safetensors

STEP = 8  # float32 holds multiples of it up to 2^24 exactly, and what is one more
MOST = 2**24 // STEP


@dataclass(frozen=True)
class Numbered:
    """A tiny checkpoint of numbers; `first` is the number of each tensor's first element, in the order of names."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    first: Mapping[str, int]

    def of(self, name: str) -> np.ndarray:
        """Return the numbers of a tensor's elements."""
        shape = self.shapes[name]
        return np.arange(self.first[name], self.first[name] + int(np.prod(shape))).reshape(shape)

    def sources(self, numbers: np.ndarray) -> list[str]:
        """Return the tensors of which an array has elements, in the array's order."""
        names, starts = list(self.first), np.array(list(self.first.values()))
        found = np.searchsorted(starts, numbers.reshape(-1), side="right") - 1
        return [names[index] for index in dict.fromkeys(found.tolist())]


@dataclass(frozen=True)
class Trace:
    """What mlx-lm has: the values of each of its tensors, see `split`; and its predicates' answers.

    fine: modules that it gives settings of their own. plain: weights of two dimensions that are no module to quantize.
    uncast: tensors that keep their dtype.
    """

    tensors: Mapping[str, np.ndarray]
    fine: Mapping[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    uncast: tuple[str, ...] = ()


def numbered(kind: str, folder: Path) -> Numbered:
    """Write the tiny checkpoint of a type with numbers for values."""
    first: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def numbers(name: str, dtype: str, shape: tuple[int, ...], *others: Any) -> Raw:
        first[name], shapes[name] = sum(int(np.prod(s)) for s in shapes.values()), shape
        made = np.arange(first[name], first[name] + int(np.prod(shape))).reshape(shape)
        assert made.max(initial=0) < MOST, f"{kind}: too many elements to number"
        return Raw("F32", (made * STEP).astype(np.float32))

    with patch.object(tiny_models, "filled", numbers):
        mlx_reference.make(kind, folder)
    path = folder / "config.json"
    config = mlx_reference.published(_without_dtype(json.loads(path.read_text())))
    path.write_text(json.dumps(config))
    return Numbered(folder, config, shapes, first)


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without dtypes, to which numbers would be rounded."""
    cleaned = {k: _without_dtype(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    return {k: v for k, v in cleaned.items() if k not in ("dtype", "torch_dtype")}


def traced(kind: str, source: Numbered) -> Trace:
    """Run mlx-lm's own code on the numbers."""
    utils = mlx_lm_or_skip()
    mx: Any = import_module("mlx.core")
    config = tiny_models.merged(source.config, mlx_reference.GIVEN.get(kind, {}))
    model_class, arguments = utils._get_classes(config)
    model = model_class(arguments.from_dict(config))
    stored = {name: mx.array((source.of(name) * STEP).astype(np.float32)) for name in source.shapes}
    made = model.sanitize(stored) if hasattr(model, "sanitize") else stored
    tree_flatten: Any = import_module("mlx.utils").tree_flatten
    owned = {name for name, _ in tree_flatten(model.parameters())}
    found = {name: np.array(array) for name, array in made.items() if name in owned}
    modules = {path: m for path, m in model.named_modules() if hasattr(m, "to_quantized")}
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    answers = {path: predicate(path, module) for path, module in modules.items()}
    casts = getattr(model, "cast_predicate", lambda name: True)
    matrices = [name for name, each in found.items() if each.ndim == 2 and name.endswith(".weight")]
    return Trace(
        found,
        fine={path: answer for path, answer in answers.items() if answer is not True},
        plain=tuple(name for name in matrices if name.removesuffix(".weight") not in modules),
        uncast=tuple(name for name in found if not casts(name)),
    )


def split(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the numbers of an array's elements, and what was added to them; NaN if they were changed otherwise."""
    numbers = np.round(values / STEP)
    added = np.unique(values - numbers * STEP)
    return numbers.astype(np.int64), float(added[0]) if len(added) == 1 else float("nan")


def ours(source: Numbered, out: Path) -> dict[str, np.ndarray]:
    """Return what a family file makes of the numbers."""
    written = passes.run(source.folder, out, "none", settings=("output=mlx",))["none"]
    return {name: raw.data for name, raw in read_safetensors(written.folder).items()}


def described(source: Numbered, values: np.ndarray | None) -> str:
    """Say where a tensor's elements are from."""
    if values is None:
        return "no such tensor"
    numbers, added = split(values)
    names = source.sources(numbers)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    said = f"{list(numbers.shape)} of {names[0]}{more}"
    return f"{said}, changed" if np.isnan(added) else f"{said}{f', plus {added:g}' if added else ''}"


def differences(kind: str, root: Path) -> Iterator[str]:
    """Yield what a family file says of a type's tensors otherwise than mlx-lm does."""
    source = numbered(kind, root / "source")
    theirs, mine = traced(kind, source).tensors, ours(source, root / "out")
    for name in sorted(theirs.keys() | mine.keys()):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None or not np.array_equal(one, other):
            yield f"{name}: the family file gives {described(source, one)}, mlx-lm {described(source, other)}"


def needed(kind: str, source: Numbered) -> list[str]:
    """Return the settings that mlx-lm's class must be given and config.json lacks."""
    utils = mlx_lm_or_skip()
    given = source.config.get("text_config") or source.config
    arguments = utils._get_classes(dict(source.config))[1]
    parameters = inspect.signature(arguments).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name not in {*given, *source.config}]
