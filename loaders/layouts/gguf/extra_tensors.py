"""Tensors of a GGUF that no tensor of the source becomes: they follow from config.json.

An architecture's words for them are the names of the functions here. They are those of generate_extra_tensors in
llama.cpp's conversion package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from loaders.architectures.gguf import Architecture
from loaders.architectures.rope import frequency_factors, rope_number, rope_of
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.architecture import head_size, of_full_attention

Config = Mapping[str, Any]
Extras = dict[str, np.ndarray]
NEVER = 1e30  # divides a frequency so far that nothing is rotated


def extra_tensors(architecture: Architecture, config: Config) -> Extras:
    """Return the float32 tensors by name.

    Raises:
        BadSpec: config.json lacks what they are made of, or asks for one that llama.cpp's architecture does not load.
    """
    found: Extras = {}
    for word in architecture.extras:
        found |= EXTRAS[word](config)
    if "sliding" in architecture.ropes or architecture.own_rope:
        return found
    factors = frequency_factors(rope_of(config), head_size(config))
    if factors is not None and not found:
        if not architecture.has_factors:
            raise BadSpec(
                f"config.json: llama.cpp's {architecture.name} loads no rope_freqs.weight, which the rope scaling"
                f" {rope_of(config)['rope_type']!r} needs"
            )
        found["rope_freqs.weight"] = factors
    return found


def long_factors(config: Config) -> Extras:
    """The factors of a longrope: one set for texts of the usual length, and one for longer ones."""
    rope = rope_of(config, "full_attention")
    if not rope.get("long_factor"):
        return {}
    return {f"rope_factors_{kind}.weight": _factors(rope, f"{kind}_factor", config) for kind in ("long", "short")}


def _factors(rope: Config, key: str, config: Config) -> np.ndarray:
    found, size = rope.get(key), head_size(config)
    wanted = int(size * rope_number(rope, "partial_rotary_factor", 1.0)) // 2
    numbers = found if isinstance(found, list) else []
    if len(numbers) != wanted or not all(isinstance(n, int | float) and 0 < n < NEVER for n in numbers):
        raise BadSpec(f"config.json: expected {wanted} numbers above 0 as {key} of its longrope, found {found!r:.80}")
    return np.array(numbers, np.float32)


def proportional_factors(config: Config) -> Extras:
    """Factors that leave a part of each head of full attention unrotated: Gemma 4's."""
    size = of_full_attention(config, "head_dim", "global_head_dim") or head_size(config)
    rotated = int(size * rope_number(rope_of(config, "full_attention"), "partial_rotary_factor", 1.0) / 2)
    factors = np.full(size // 2, NEVER, np.float32)
    factors[:rotated] = 1
    return {"rope_freqs.weight": factors}


EXTRAS: dict[str, Callable[[Config], Extras]] = {each.__name__: each for each in (long_factors, proportional_factors)}
