"""The engines that schemes belong to, and what layouts, sources and lint must know of each; a row for each engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loaders.architectures.family import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What is true of all schemes of an engine.

    layout: the name in LAYOUTS of what it reads.
    method: what says in a checkpoint that this engine quantized it (`Checkpoint.quantized_by`); None: nothing does.
    whole_stacks: whether its loader builds the model's own class and quantizes only linear layers, so that stacks of
    experts stay as they are.
    """

    layout: str
    method: str | None
    whole_stacks: bool = False


ENGINES = {
    "plain": Engine(layout="hf", method=None, whole_stacks=True),
    "bitsandbytes": Engine(layout="hf", method="bitsandbytes", whole_stacks=True),
    "bitnet": Engine(layout="hf", method="bitnet", whole_stacks=True),
    "hqq": Engine(layout="hqq", method="hqq", whole_stacks=True),
    "compressed-tensors": Engine(layout="hf", method="compressed-tensors"),
    "mlx": Engine(layout="mlx", method="mlx"),
    "ggml": Engine(layout="gguf", method="gguf"),
}


def wants_stacks(engine: str, family: Family) -> bool:
    """Whether an output for this engine has the stacks of experts of this family whole, and not cut into experts."""
    return ENGINES[engine].whole_stacks and engine not in family.single_experts


def builds_own_class(engines: Iterable[str]) -> bool:
    """Whether transformers itself loads what all these engines quantize, into the model's own class."""
    return all(ENGINES[name].layout == "hf" and ENGINES[name].whole_stacks for name in engines)
