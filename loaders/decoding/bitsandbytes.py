"""bitsandbytes' 4-bit weights, each described by its own quant_state."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loaders.checkpoint import Checkpoint
from loaders.decoding.base import decoded, part
from loaders.quantization.bnb4 import Bnb4, read_state
from loaders.recipes import Recipe
from loaders.specs import TensorSpec, WeightSpec, dtype_named
from loaders.strategies import loader

STATE = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$")


def find(checkpoint: Checkpoint) -> dict[str, Recipe]:
    """The quantized weights, by name."""
    by_name = {spec.name: spec for spec in checkpoint.weights}
    states = (STATE.match(name) for name in by_name)
    return {state[1]: _recipe(checkpoint, by_name, state[1], state[2]) for state in states if state}


def _recipe(checkpoint: Checkpoint, by_name: Mapping[str, WeightSpec], name: str, table: str) -> Recipe:
    spec = by_name[f"{name}.quant_state.bitsandbytes__{table}"]
    with loader("read").open(checkpoint.root, (spec,)) as reader:
        state = read_state(reader.read(spec, 0, spec.size).tobytes(), name)
    packed = part(by_name, name, name)
    storage = "uint8" if packed.dtype.name == "U8" else packed.dtype.torch
    scheme = Bnb4(state["quant_type"], state["blocksize"], "nested_offset" in state, storage)
    dtype, shape = dtype_named(state["dtype"]), tuple(state["shape"])
    return decoded(by_name, TensorSpec(name, dtype, shape), scheme)
