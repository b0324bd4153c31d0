"""Questions to an engine's own code about an output that is only planned, and its answers. Both travel as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loaders.dtypes import Shape
from loaders.lint.base import Finding

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
SHOWN = 4  # patterns of names that a finding lists before it counts the rest
FEW = 0.9  # the share of the weights that a recipe quantizes below which an output is remarkable


class Unanswerable(Exception):
    """The engine's code does not know the model; the message continues "PACKAGE VERSION ..."."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A weight of the source: its name and shape, and what becomes of it (quantize, keep, cast, drop)."""

    name: str
    shape: Shape
    action: str

    @property
    def is_quantized(self) -> bool:
        return self.action == "quantize"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Question:
    """A planned output: who will load it, its config.json (of diffusers: each component's, by its prefix), its weights.

    `engine` is bitsandbytes, bitnet, compressed-tensors, diffusers, mlx or ggml. `stored` are the tensors of the
    output's files, with dtype and shape, where the engine goes by these; `architecture` is llama.cpp's name of the
    model in a GGUF.
    """

    engine: str
    config: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...]
    stored: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    architecture: str | None = None

    def to_json(self) -> str:
        # An array for each tensor, not an object: a model may have half a million.
        rows = [[t.name, t.shape, t.action] for t in self.tensors]
        return json.dumps([self.engine, self.config, rows, dict(self.stored), self.architecture], separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Question:
        engine, config, rows, stored, architecture = json.loads(text)
        tensors = tuple(PlannedTensor(name, tuple(shape), action) for name, shape, action in rows)
        shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in stored.items()}
        return Question(engine, config, tensors, shapes, architecture)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine's code makes of a planned output.

    by: the code that was asked: a class, its package and version. unanswered: why nobody could be asked, else empty.
    recipe: weights that the engine's published recipe quantizes, and how many of them the plan does. left: the largest
    tensor of those that the plan does not quantize.
    """

    by: str = ""
    findings: tuple[Finding, ...] = ()
    unanswered: str = ""
    recipe: tuple[int, int] = (0, 0)
    left: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Answer:
        made = json.loads(text)
        findings = tuple(Finding(**finding) for finding in made["findings"])
        return Answer(made["by"], findings, made["unanswered"], (made["recipe"][0], made["recipe"][1]), made["left"])

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fatal]

    @property
    def share(self) -> float:
        """The share of what the engine's recipe quantizes that the plan quantizes; 1 where it quantizes nothing."""
        wanted, done = self.recipe
        return done / wanted if wanted else 1.0


def patterns(names: Sequence[str]) -> str:
    """Return many names as few patterns, `#` for a number, with how many names each stands for."""
    found = Counter(NUMBER.sub("#", name) for name in names)
    said = [f"{pattern} ({count})" if count > 1 else pattern for pattern, count in found.items()]
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return ", ".join(said[:SHOWN]) + more
