"""The decoder layers that a checkpoint's names have and those that its config.json speaks of.

Every engine builds as many layers as the config says. A layer beyond is ignored by transformers and refused by mlx-lm
and llama.cpp; one that is missing is computed with random numbers, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loaders.architectures.family import text_config
from loaders.words import counted

# Layers of a text model that are counted by the keys below. Towers and encoders have counts of their own.
LAYERS = r"^(?:(?:language_model|model|transformer|backbone)\.)*(?:layers|h)\."
OF_LAYER = re.compile(rf"{LAYERS}(\d{{1,6}})\.")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
PREDICTING = re.compile(r"nextn|mtp")  # keys that count the layers for multi-token prediction, after the others
PREDICTS = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head|nextn\w*|mtp\w*)\.")
NEXT_TOKENS = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_\w+)?\.")  # parts for multi-token prediction that have a name
MOST = 10_000  # a larger count is taken for nonsense, and layers are not looked for
SHOWN = 8  # numbers of layers that a sentence lists


@dataclass(frozen=True, slots=True)
class Layers:
    """What is said of layers beyond the config's count, and of those without tensors.

    beyond: the names of tensors in layers of which the config does not speak. missing: the layers without tensors.
    predicting: those of tensors for multi-token prediction, in layers after the others or under names of their own.
    """

    count: int
    beyond: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    predicting: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user."""
        said = []
        if self.beyond:
            found = sorted({number for name in self.beyond if (number := layer_of(name)) is not None})
            said.append(
                f"config.json has {self.count} layers, and {counted(len(self.beyond), 'tensor is', 'tensors are')}"
                " of layers beyond"
                f" ({_some(found)}): no engine computes with them. They are left out of what is converted, unless a"
                " rule of yours takes them; if they belong to the model, set the number of layers"
            )
        if self.missing:
            said.append(
                f"config.json has {self.count} layers, and {counted(len(self.missing), 'has', 'have')} no tensors"
                f" ({_some(self.missing)}):"
                " an engine fails, or computes with random ones; fetch the missing files, or set the number of layers"
            )
        return tuple(said)


def layers_of(config: Mapping[str, Any], names: Iterable[str]) -> Layers:
    """Compare the layers in tensors' names with the count in config.json."""
    count = next((n for key in COUNTS if (n := _count(text_config(config, key)))), None)
    listed = list(names)
    predicting = [name for name in listed if NEXT_TOKENS.search(name)]
    if count is None:
        return Layers(0, predicting=tuple(predicting))
    last, present = count + _predicting(config), set[int]()
    after: dict[int, list[str]] = {}
    for name in listed:
        number = layer_of(name)
        if number is not None:
            present.add(number)
            if number >= last:
                after.setdefault(number, []).append(name)
            if number >= count and not NEXT_TOKENS.search(name):
                predicting.append(name)
    unclaimed = {number for number, inside in after.items() if any(map(PREDICTS.search, inside))}
    beyond = [name for number, inside in after.items() if number not in unclaimed for name in inside]
    missing = [number for number in range(count) if number not in present] if present else []
    unknown = {*beyond}
    return Layers(count, tuple(beyond), tuple(missing), tuple(name for name in predicting if name not in unknown))


def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer to which a tensor belongs; None for any other tensor."""
    found = OF_LAYER.match(name)
    return None if found is None else int(found[1])


def _predicting(config: Mapping[str, Any]) -> int:
    """Return how many layers for multi-token prediction come after the others, as the config says."""
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, Mapping) else [config]
    return max((_count(value) for part in parts for key, value in part.items() if PREDICTING.search(key)), default=0)


def _count(value: Any) -> int:
    """Return a count of layers; 0 for what is none."""
    return value if type(value) is int and 0 < value < MOST else 0


def _some(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(map(str, listed[:SHOWN])) + more
